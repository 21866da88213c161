"""Prints errors of O on values that are hard for e4m3: wide ranges, and sums that grow with the sequence.

    python tools/value_ranges.py [--tokens N,..] [--head-dim N] [--data NAME,..]             ranges of P and V, on the CPU
    python tools/value_ranges.py --kernel [--tokens N,..] [--head-dim N] [--data NAME,..]    `sage2` as this device runs it

Relative L2 against exact float32 attention of the same bfloat16 inputs, one head, one seed; 256 query rows, 2048 with
--kernel. The tables of docs/kernels/sm90_forward.md and the lengths in docs/numerics.md come from here.
"""

from __future__ import annotations

import argparse
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import sage_jax
from sage_jax import reference
from sage_jax.masking import OPEN, no_masks

RANGES = ((256.0, 448.0), (256.0, 0.875), (128.0, 1.75), (64.0, 3.5), (32.0, 7.0))  # largest codes of P and of V


def outlier(rng, q, k, v):
    chosen = rng.random(q.shape[1]) < 0.06
    q += 6 * rng.standard_normal(q.shape[1]) * chosen
    k += 12 * rng.standard_normal(k.shape[1]) * chosen
    v += 0.5 * rng.standard_normal(v.shape[1])


def sink(rng, q, k, v):
    direction = rng.standard_normal(q.shape[1])
    direction /= np.linalg.norm(direction)
    q += 8 * direction
    k[0] = 10.5 * direction
    v[0] *= 0.05


def drift(rng, q, k, v):
    v += np.linspace(-1, 1, len(v))[:, None]


def step(rng, q, k, v):
    v += np.where(np.arange(len(v)) < len(v) // 2, -1.0, 1.0)[:, None]


def heavy(rng, q, k, v):
    v *= np.exp(1.2 * rng.standard_normal((len(v), 1)))


def spike(rng, q, k, v):
    v[rng.integers(0, len(v), 8)] *= 200


DATA = {
    "normal": lambda *_: None, "outlier": outlier, "sink": sink, "drift": drift, "step": step, "heavy": heavy,
    "spike": spike,
}  # fmt: skip


def make(name, rows, tokens, head_dim):
    """q [1, rows, 1, H], k and v [1, tokens, 1, H] in bfloat16."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n, head_dim)) for n in (rows, tokens, tokens))
    DATA[name](rng, q, k, v)
    return tuple(jnp.asarray(x, jnp.bfloat16)[None, :, None, :] for x in (q, k, v))


@jax.jit
def exact(q, k, v):
    """float32 [1, T, 1, H], 256 rows at a time."""
    q, k, v = (x[0, :, 0].astype(jnp.float32) for x in (q, k, v))

    def rows(q):
        logits = jnp.dot(q, k.T, precision="highest") * q.shape[-1] ** -0.5
        return jnp.dot(jax.nn.softmax(logits, axis=-1), v, precision="highest")

    return jax.lax.map(rows, q.reshape(-1, 256, q.shape[-1])).reshape(q.shape)[None, :, None, :]


@functools.partial(jax.jit, static_argnames=("p_range", "v_range"))
def specified(q, k, v, p_range, v_range):
    """O of `sage2` by the specification, with other ranges of the codes of P and V."""
    recipe, tokens, head_dim = sage_jax.recipes["sage2"], k.shape[1], k.shape[3]
    masks, scale = no_masks(1, q.shape[1], tokens), head_dim**-0.5
    kv = reference.quantize_kv(
        k, v, masks.bounds, pv="e4m3", v_range=v_range, smooth_k=True, smooth_v=True, dp=None
    )
    qq = reference.quantize_q(q, kv.k_mean, masks.bounds, q_block=recipe.q_block, scale=scale)
    with mock.patch.object(reference, "P_SCALE", np.float32(p_range)):
        return reference.attend(
            qq, kv, masks, pv="e4m3", f16_accumulate=False, scale=scale, window_left=OPEN, window_right=OPEN,
            head_dim=head_dim, out_dtype=jnp.float32, key_tile=128,
        )[0]  # fmt: skip


def relative_l2(x, expected):
    x = jnp.asarray(x, jnp.float32)
    return float(jnp.linalg.norm(x - expected) / jnp.linalg.norm(expected))


def range_errors(name, tokens, head_dim):
    """Errors of O for each of RANGES."""
    inputs = make(name, 256, tokens, head_dim)
    expected = exact(*inputs)
    return [relative_l2(specified(*inputs, *pair), expected) for pair in RANGES]


def kernel_error(name, tokens, head_dim):
    inputs = make(name, 2048, tokens, head_dim)
    return relative_l2(sage_jax.dot_product_attention(*inputs, recipe="sage2"), exact(*inputs))


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="store_true")
    parser.add_argument("--tokens", type=lambda text: [int(x) for x in text.split(",")], default=[4096])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--data", type=lambda text: text.split(","), default=list(DATA))
    options = parser.parse_args(words)
    unknown = [name for name in options.data if name not in DATA]
    if unknown:
        parser.error(f"--data {unknown[0]} is unknown; choose from {', '.join(DATA)}")
    heads = ["sage2"] if options.kernel else [f"{p:g}; {v:g}" for p, v in RANGES]
    print(f"{'data':8} {'tokens':>7} " + " ".join(f"{head:>10}" for head in heads))
    for tokens in options.tokens:
        for name in options.data:
            if options.kernel:
                errors = [kernel_error(name, tokens, options.head_dim)]
            else:
                with jax.default_device(jax.devices("cpu")[0]):
                    errors = range_errors(name, tokens, options.head_dim)
            print(f"{name:8} {tokens:7} " + " ".join(f"{error:10.4f}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
