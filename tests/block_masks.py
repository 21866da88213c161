"""Problems with block masks: each is told a second time with a mask of pairs, which must give the same bits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from cases import Case, make_inputs

from sage_jax.masking import TILE, of_pairs, tiles

CASES = [
    Case("plain", B=2, T=200, S=260, N=2, K=1),
    Case("causal", B=1, T=300, S=300, N=4, K=2, right=0, H=128),
    Case("bottom_right", B=2, T=130, S=330, N=2, K=2, right=0, bottom_right=True, lengths=True, empty_rows=True),
    Case("window", B=1, T=330, S=330, N=2, K=1, left=90, right=20, H=40),
    Case("segments", B=2, T=200, S=200, N=2, K=2, right=0, segments=True, H=128),
    Case("one_tile", B=1, T=20, S=64, N=2, K=1),
    Case("wide", B=1, T=140, S=200, N=2, K=1, H=200),
]


def with_block_mask(case, axes=(1, 1, 1, 1), density=0.5, seed=0):
    """(inputs of the case whose mask is a block mask, the same masks with an entry for each pair). Some rows of tiles see
    nothing, some everything.
    """
    inputs = make_inputs(dataclasses.replace(case, mask=None))
    full = (case.B, case.N, tiles(case.T), tiles(case.S))
    shape = tuple(n if axis else 1 for n, axis in zip(full, axes, strict=True))
    rng = np.random.default_rng((seed, *case.name.encode()))
    mask = rng.random(shape) < density
    mask[..., rng.integers(shape[2]), :] = rng.random() < 0.5
    masks = inputs[-1]._replace(mask=jnp.asarray(mask))
    return (*inputs[:-1], masks), of_pairs(masks, TILE, case.T, case.S)
