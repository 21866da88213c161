"""Prints errors of O on values that are hard for e4m3: wide ranges, and sums that grow with the sequence.

    python tools/value_ranges.py [--tokens N,..] [--head-dim N] [--data NAME,..]             ranges of P and V, on the CPU
    python tools/value_ranges.py --headroom [--tokens N,..] [--head-dim N] [--data NAME,..]  scales of V, on the CPU
    python tools/value_ranges.py --kernel [--tokens N,..] [--head-dim N] [--data NAME,..]    `sage2` as this device runs it

Relative L2 against exact float32 attention of the same bfloat16 inputs, one head, one seed; the first 256 query rows, 2048
with --kernel. With --headroom scales of V are for the largest value of all, and for 2, 3, ... times the largest of the sample
(`docs/numerics.md`). The tables of docs/kernels/sm90_forward.md and the lengths in docs/numerics.md come from here.
"""

from __future__ import annotations

import argparse
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import sage_jax
from sage_jax import quantization, reference
from sage_jax.accuracy import error, exact, synthetic
from sage_jax.masking import OPEN, no_masks

HEADROOMS = (None, 2, 3, 4, 8)  # over the largest value of the sample; None: the largest of all counts
RANGES = ((256.0, 448.0), (256.0, 0.875), (128.0, 1.75), (64.0, 3.5), (32.0, 7.0))  # largest codes of P and of V


def drift(v):
    return v + jnp.linspace(-1, 1, v.shape[1])[None, :, None, None]


def step(v):
    return v + jnp.where(jnp.arange(v.shape[1]) < v.shape[1] // 2, -1.0, 1.0)[None, :, None, None]


def wide(v):
    return v * jnp.exp(1.2 * jax.random.normal(jax.random.key(2), (1, v.shape[1], 1, 1)))


def spike(v):
    return v.at[:, jax.random.randint(jax.random.key(3), (8,), 0, v.shape[1])].multiply(200)


# Kinds of `sage_jax.accuracy.synthetic`, and what is done to the values of normal ones.
DATA = {"normal": None, "outlier": None, "sink": None, "drift": drift, "step": step, "wide": wide, "spike": spike}


def make(name, rows, tokens, head_dim):
    """q [1, at most rows, 1, H], k and v [1, tokens, 1, H] in bfloat16."""
    change = DATA[name]
    q, k, v, _ = synthetic("normal" if change else name, jax.random.key(1), tokens=tokens, head_dim=head_dim)
    return tuple(x.astype(jnp.bfloat16) for x in (q[:, :rows], k, change(v) if change else v))


@functools.partial(jax.jit, static_argnames=("p_range", "v_range", "headroom"))
def specified(q, k, v, p_range, v_range, headroom=float(quantization.HEADROOM)):
    """O of `sage2` by the specification, with other ranges of the codes of P and V, and other scales of V."""
    recipe, tokens, head_dim = sage_jax.recipes["sage2"], k.shape[1], k.shape[3]
    masks, scale = no_masks(1, q.shape[1], tokens), head_dim**-0.5
    scaled_for = quantization.scaled_for if headroom else lambda x, sample, valid: jnp.max(jnp.abs(x), axis=2)
    with mock.patch.multiple(quantization, HEADROOM=np.float32(headroom or 1), scaled_for=scaled_for):
        kv = reference.quantize_kv(
            k, v, masks.bounds, pv="e4m3", v_range=v_range, smooth_k=True, smooth_v=True, dp=None
        )
    qq = reference.quantize_q(q, kv.k_mean, masks.bounds, q_block=recipe.q_block, scale=scale)
    with mock.patch.object(reference, "P_SCALE", np.float32(p_range)):
        return reference.attend(
            qq, kv, masks, pv="e4m3", f16_accumulate=False, scale=scale, window_left=OPEN, window_right=OPEN,
            head_dim=head_dim, out_dtype=jnp.float32, key_tile=128,
        )[0]  # fmt: skip


def range_errors(name, tokens, head_dim):
    """Errors of O for each of RANGES."""
    inputs = make(name, 256, tokens, head_dim)
    expected = exact(*inputs)["o"]
    return [error(specified(*inputs, *pair), expected).rel_l2 for pair in RANGES]


def headroom_errors(name, tokens, head_dim):
    """Errors of O for each of HEADROOMS."""
    inputs = make(name, 256, tokens, head_dim)
    expected = exact(*inputs)["o"]
    ranges = float(reference.BOUNDED_P_SCALE), sage_jax.recipes["sage2"].v_range
    return [error(specified(*inputs, *ranges, headroom), expected).rel_l2 for headroom in HEADROOMS]


def kernel_error(name, tokens, head_dim):
    inputs = make(name, 2048, tokens, head_dim)
    return error(sage_jax.dot_product_attention(*inputs, recipe="sage2"), exact(*inputs)["o"]).rel_l2


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="store_true")
    parser.add_argument("--headroom", action="store_true")
    parser.add_argument("--tokens", type=lambda text: [int(x) for x in text.split(",")], default=[4096])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--data", type=lambda text: text.split(","), default=list(DATA))
    options = parser.parse_args(words)
    unknown = [name for name in options.data if name not in DATA]
    if unknown:
        parser.error(f"--data {unknown[0]} is unknown; choose from {', '.join(DATA)}")
    measure, heads = range_errors, [f"{p:g}; {v:g}" for p, v in RANGES]
    if options.headroom:
        measure, heads = headroom_errors, ["all" if times is None else f"{times} times" for times in HEADROOMS]
    if options.kernel:
        heads = ["sage2"]
    print(f"{'data':8} {'tokens':>7} " + " ".join(f"{head:>10}" for head in heads))
    for tokens in options.tokens:
        for name in options.data:
            if options.kernel:
                errors = [kernel_error(name, tokens, options.head_dim)]
            else:
                with jax.default_device(jax.devices("cpu")[0]):
                    errors = measure(name, tokens, options.head_dim)
            print(f"{name:8} {tokens:7} " + " ".join(f"{error:10.4f}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
