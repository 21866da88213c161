"""Random problems for the FP4 kernels, which hold every feature and the lengths at which kernels go wrong."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from cases import Case, make_inputs
from oracle import exact_forward, window

from sage_jax.masking import OPEN

SEEDS = range(24)
DTYPES = ("float32", "bfloat16", "float16")
# Queries. 128 share a mean; where one is left to a block it is its own mean, and ΔS is all there is of its scores.
QUERIES = (1, 129, 257, None)
LEFT_OVER = (1, 129)  # the same by lengths
# So many outputs that a few probabilities that round the other way do not show in their error.
LEAST_OUTPUTS = 20000


def random_case(seed: int) -> Case:
    """Sizes, masks and dtype: every dtype at every kind of length within twelve seeds in a row, all else drawn."""
    rng = np.random.default_rng(seed)
    flag = lambda: bool(rng.integers(2))  # noqa: E731
    queries, kv_heads = QUERIES[seed % len(QUERIES)] or int(rng.integers(2, 600)), int(rng.integers(1, 3))
    bottom_right = flag()
    return Case(
        f"random{seed}", B=int(rng.integers(1, 3)), T=queries, S=int(rng.integers(1, 900)), K=kv_heads,
        N=kv_heads * int(rng.integers(1, 4)), H=int(rng.choice([24, 64, 96, 128, 200])), dtype=DTYPES[seed % len(DTYPES)],
        left=int(rng.integers(0, 300)) if flag() else OPEN, right=int(rng.integers(0, 300)) if flag() else OPEN,
        bottom_right=bottom_right, lengths=flag(), mask=(1, 0, 1, 1) if flag() else None,
        segments=flag() and not bottom_right,  # together they would leave few queries a key
    )  # fmt: skip


def random_problem(seed: int):
    """(case, q, k, v, masks, exact): a batch so large that `exact`, float32 [B, T, N, H], has LEAST_OUTPUTS that count.

    With lengths, every other row of the batch keeps one query, or one more than a block.
    """
    case = random_case(seed)
    while True:
        q, k, v, _, _, masks = make_inputs(case)
        if case.lengths:
            masks = masks._replace(bounds=_left_over(case, masks.bounds, LEFT_OVER[seed // 4 % 2]))
        exact, lse = exact_forward(*(x.astype(jnp.float32) for x in (q, k, v)), masks, **window(case))
        count = int(np.isfinite(np.asarray(lse)).sum()) * case.H
        if count >= LEAST_OUTPUTS:
            return case, q, k, v, masks, np.asarray(exact)
        case = dataclasses.replace(case, B=case.B * (1 + LEAST_OUTPUTS // max(count, LEAST_OUTPUTS // 50)))


def _left_over(case: Case, bounds, queries):
    """Bounds [B, 3] with other query lengths in every other row, and the offset that follows from them."""
    length, keys, _ = (np.array(x) for x in np.asarray(bounds).T)
    length[::2] = queries if queries <= case.T else 1
    offset = keys - length if case.bottom_right else np.zeros_like(keys)
    return jnp.asarray(np.stack([length, keys, offset], axis=1), jnp.int32)
