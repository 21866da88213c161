"""How much of K's smoothing is lost where its mean is that of a sample of its tokens (`docs/numerics.md`, "The mean of K").

    python tools/key_sample.py [--tokens 1024,4096] [--valid 100] [--seeds 4]

Prints, for each kind of keys, the error of Q·Kᵀ by the INT8 codes of K alone, relative to what it is where K loses the mean of
all its valid tokens: without smoothing, and with the specification's sample. Q is normal, the head dimension 128.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import quantization as qz
from sage_jax import reference

HEAD_DIM = 128
OPTIONS = dict(pv="bf16", v_range=448.0, smooth_v=False, dp=None)


def normal(rng, *shape):
    return rng.standard_normal(shape)


def alike(rng, tokens, correlation=0.98):
    """Neighbours resemble each other, and nothing else."""
    x = normal(rng, tokens, HEAD_DIM)
    for i in range(1, tokens):
        x[i] = correlation * x[i - 1] + (1 - correlation**2) ** 0.5 * x[i]
    return 2 * x + 0.5 * normal(rng, tokens, HEAD_DIM)


def sinks(rng, tokens):
    x = normal(rng, tokens, HEAD_DIM)
    x[:4] *= 30
    return x


KEYS = {
    "normal": lambda rng, tokens: normal(rng, tokens, HEAD_DIM),
    "and a vector 8 times as large": lambda rng, tokens: normal(rng, tokens, HEAD_DIM) + 8 * normal(rng, HEAD_DIM),
    "and a random walk of 4": lambda rng, tokens: (
        normal(rng, tokens, HEAD_DIM) + 4 * np.cumsum(normal(rng, tokens, HEAD_DIM), 0) / tokens**0.5
    ),
    "neighbours alike, a vector 8 times as large": lambda rng, tokens: alike(rng, tokens) + 8 * normal(rng, HEAD_DIM),
    "four sinks 30 times as large, a vector 4 times": lambda rng, tokens: sinks(rng, tokens) + 4 * normal(rng, HEAD_DIM),
    "heavy tails (t, 3), a vector 3 times as large": lambda rng, tokens: (
        rng.standard_t(3, (tokens, HEAD_DIM)) + 3 * normal(rng, HEAD_DIM)
    ),
}


@jax.jit
def errors(q, k, bounds):
    """Squared norms of the errors of Q·Kᵀ: [the mean of all, no mean, the sample's]."""
    valid = (jnp.arange(k.shape[0]) < bounds[0, 1])[:, None]
    mean = jnp.sum(jnp.where(valid, k, 0), 0) / jnp.sum(valid)

    def error(keys, smooth_k):
        kv = reference.quantize_kv(keys[None, :, None], keys[None, :, None], bounds, smooth_k=smooth_k, **OPTIONS)
        wrong = qz.dequantized_keys(kv)[0, 0] - (keys - kv.k_mean[0, 0])
        return jnp.sum(jnp.where(valid, wrong @ q.T, 0) ** 2)

    return jnp.stack([error(k - mean, False), error(k, False), error(k, True)])


def ratios(kind, tokens, valid, seeds):
    """Errors without a mean and with the sample's, over that with the mean of all: of `seeds` draws together."""
    total = np.zeros(3)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        k, q = np.zeros((tokens, HEAD_DIM), np.float32), normal(rng, 64, HEAD_DIM).astype(np.float32)
        k[:valid] = KEYS[kind](rng, valid)
        total += np.asarray(errors(q, k, jnp.array([[1, valid, 0]], jnp.int32)), np.float64)
    return np.sqrt(total[1:] / total[0])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1024,4096,16384", help="lengths of K, with commas between")
    parser.add_argument("--valid", type=int, help="how many of them count (all)")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args(arguments)
    lengths = [int(n) for n in options.tokens.split(",")]
    print("| keys | tokens | no mean | the sample's |\n|---|---|---|---|")
    for kind in KEYS:
        rows = [ratios(kind, n, options.valid or n, options.seeds) for n in lengths]
        columns = ["; ".join(f"{row[i]:.2f}" for row in rows) for i in range(2)]
        print(f"| {kind} | {'; '.join(map(str, lengths))} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
