"""Works the recipe `train8` out in NumPy, on its own, and prints its errors next to those of a results file.

    python tools/train8_in_numpy.py [--tokens N] [--head-dim N,..] [--data NAME,..] [--results FILE]

Relative L2 of O, dQ, dK, dV against exact float32 attention, on the data that benchmarks/attention.py measures accuracy on: one
head, bfloat16. The formulas are those of docs/numerics.md; no code is shared with the specification or with a kernel, and
nothing is done in their order: products are float32, and the masks, ragged lengths and odd tiles of docs/abi.md are left out.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sage_jax.accuracy import error, exact, synthetic

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ("normal", "outlier", "sink", "sigma3")
TENSORS = ("o", "dq", "dk", "dv")


def codes(x):
    """x as saturating e4m3 codes."""
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def e4m3(x, largest=448.0, magnitude=0.0):
    """x rounded to e4m3 codes, of which the largest of each channel, or that of `magnitude` if it is larger, is `largest`."""
    scale = np.maximum(np.abs(x).max(axis=0, keepdims=True), magnitude) / largest
    scale = np.where(scale == 0, 1, scale)
    return codes(x / scale) * scale


def int8(x, tokens=1):
    """x rounded to INT8 codes, with a scale for so many tokens."""
    groups = x.reshape(-1, tokens * x.shape[1])
    scale = np.abs(groups).max(axis=1, keepdims=True) / 127
    return (np.round(groups / np.where(scale == 0, 1, scale)) * scale).reshape(x.shape)


def sample(x, size):
    """`size` rows of x that stand for all: one of each of as many equal parts, at another place of each."""
    i = np.arange(size)
    return x if len(x) <= size else x[(size * i + 79 * i % size) * len(x) // size**2]


def train8(q, k, v, dout):
    """O, dQ, dK, dV of one head without masks; all arguments [tokens, H], a multiple of 64 tokens."""
    scale = 1 / np.sqrt(q.shape[1])
    some = sample(v, 256)
    v_mean = some.mean(axis=0)
    v_mean = np.where(np.abs(v_mean) < np.abs(some).max(axis=0) / 8, 0, v_mean)
    room = 3 * np.abs(some - v_mean).max(axis=0) if len(v) > 256 else 0
    v = v - v_mean
    # The backward pass has the codes of Q and K and no more: what it makes of them errs twice.
    q, k = int8(q), int8(k - sample(k, 128).mean(axis=0), 64)
    scores = q @ k.T * scale
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    row_sum = e.sum(axis=1, keepdims=True)
    o = codes(64 * e) / 64 @ e4m3(v, 3.5, room) / row_sum
    delta = (dout * o).sum(axis=1, keepdims=True)
    p = codes(256 * e) / 256
    bound = 8 / 7 * np.linalg.norm(dout, axis=1, keepdims=True) * np.linalg.norm(v, axis=1).max()
    g = codes(256 * e * (int8(dout) @ int8(v, 64).T - delta) / bound) / 256
    dq = g @ e4m3(k) * bound / row_sum * scale
    dk = g.T @ e4m3(q * bound / row_sum) * scale
    dv = p.T @ e4m3(dout / row_sum)
    return {"o": o + v_mean, "dq": dq, "dk": dk, "dv": dv}


def errors(name, tokens, head_dim):
    """Relative L2 of each tensor, on the data of that name."""
    inputs = synthetic(name, jax.random.key(0), tokens=tokens, head_dim=head_dim, dtype=jnp.bfloat16)
    truth = exact(*inputs)
    found = train8(*(np.asarray(x, np.float32)[0, :, 0] for x in inputs))
    return {t: error(found[t][None, :, None], truth[t]).rel_l2 for t in TENSORS}


def measured(path, name, tokens, head_dim):
    """The same of a results file, as far as it has them."""
    rows = json.loads(path.read_text())["accuracy"]
    wanted = {"recipe": "train8", "data": name, "seq": tokens, "head_dim": head_dim}
    return {row["tensor"]: row["rel_l2"] for row in rows if wanted.items() <= row.items()}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--head-dim", type=lambda text: [int(x) for x in text.split(",")], default=[128, 64])
    parser.add_argument("--data", type=lambda text: text.split(","), default=DATA)
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks/results/nvidia-h200.json")
    options = parser.parse_args(words)
    if unknown := set(options.data) - set(DATA):
        parser.error(f"--data {','.join(sorted(unknown))} is unknown; choose from {', '.join(DATA)}")
    if options.tokens <= 0 or options.tokens % 64:
        parser.error(f"--tokens {options.tokens} is no multiple of 64; give one from 64 on")
    print("head dim, data: in NumPy (measured, ratio) of " + ", ".join(TENSORS))
    for head_dim in options.head_dim:
        for name in options.data:
            device = measured(options.results, name, options.tokens, head_dim)
            cells = [
                f"{ours:.4f}" + (f" ({device[t]:.4f}, {device[t] / ours:.2f})" if t in device else "")
                for t, ours in errors(name, options.tokens, head_dim).items()
            ]
            print(f"{head_dim:4} {name:8} " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
