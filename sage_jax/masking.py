"""Masks as one value: what every backend means by "query i sees key j" (`docs/abi.md`, common operands)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

OPEN = 2**30  # a window edge that excludes nothing
TILE = 64  # tokens of a tile: keys that share an INT8 scale, queries or keys that share an entry of a block mask


class Masks(NamedTuple):
    """The array part of a mask; every field is always an array, zero-size where absent.

    Attributes:
      bounds: int32 [B, 3]: valid queries, valid keys, diagonal offset.
      q_seg, kv_seg: int32 [B, T] and [B, S] segment ids, or [0, 0].
      mask: bool [B|1, N|1, T|1, S|1], True = attend, or [0, 0, 0, 0]. A block mask has an entry for each tile of 64
        queries and 64 keys, [B|1, N|1, ceil(T/64)|1, ceil(S/64)|1]; which of the two it is the operations' `mask_tile` says.
      bias: float32 [B|1, N|1, T|1, S|1], added to the scaled logits, or [0, 0, 0, 0].
    """

    bounds: jax.Array
    q_seg: jax.Array
    kv_seg: jax.Array
    mask: jax.Array
    bias: jax.Array


def full_bounds(batch: int, queries: int, keys: int) -> jax.Array:
    """int32 [B, 3] bounds under which every token is valid and the diagonal starts at the top left."""
    return jnp.broadcast_to(jnp.array([queries, keys, 0], jnp.int32), (batch, 3))


def no_masks(batch: int, queries: int, keys: int) -> Masks:
    """Masks that exclude nothing."""
    none2 = jnp.zeros((0, 0), jnp.int32)
    return Masks(
        full_bounds(batch, queries, keys),
        none2,
        none2,
        jnp.zeros((0, 0, 0, 0), bool),
        jnp.zeros((0, 0, 0, 0), jnp.float32),
    )


def as_array(x) -> jax.Array | np.ndarray:
    """x as it is if JAX made it, otherwise as a NumPy array, in which wide integers stay what they are."""
    if isinstance(x, jax.Array):
        return x
    try:
        return np.asarray(x)
    except jax.errors.TracerArrayConversionError:  # a list with traced numbers
        return jnp.asarray(x)


def clipped(x, low: int, high: int) -> jax.Array | np.ndarray:
    """Integers of any type clipped to [low, high], as int32. Nothing wraps on the way: narrow types are widened before, wide
    ones narrowed after, those of NumPy arrays and lists before JAX makes int32 of them.
    """
    x = as_array(x)
    x = x.astype(np.int32) if x.dtype.itemsize < 4 else x
    low = max(low, int(jnp.iinfo(x.dtype).min))  # of unsigned types
    clip = jnp.clip if isinstance(x, jax.Array) else np.clip
    return clip(x, low, high).astype(np.int32)


def tiles(tokens: int) -> int:
    """How many tiles of 64 tokens there are."""
    return -(-tokens // TILE)


def of_pairs(masks: Masks, mask_tile: int, queries: int, keys: int) -> Masks:
    """The masks with an entry for each pair in place of one for `mask_tile` queries and keys."""
    mask = masks.mask
    for axis, length in ((2, queries), (3, keys)):
        if mask_tile > 1 and mask.shape[axis] > 1:
            mask = jax.lax.slice_in_dim(jnp.repeat(mask, mask_tile, axis=axis), 0, length, axis=axis)
    return masks._replace(mask=mask)


def visible(
    masks: Masks, queries: int, keys: int, window_left: int = OPEN, window_right: int = OPEN
) -> jax.Array:
    """Boolean [B, N|1, T, S]: whether query i sees key j."""
    i = jnp.arange(queries, dtype=jnp.int32)[None, :, None]
    j = jnp.arange(keys, dtype=jnp.int32)[None, None, :]
    q_len, kv_len, offset = (masks.bounds[:, n, None, None] for n in range(3))
    seen = (i < q_len) & (j < kv_len)
    diagonal = j - i - offset
    if window_left < OPEN:
        seen &= diagonal >= -window_left
    if window_right < OPEN:
        seen &= diagonal <= window_right
    if masks.q_seg.size:
        seen &= masks.q_seg[:, :, None] == masks.kv_seg[:, None, :]
    seen = seen[:, None]
    if masks.mask.size:
        seen = seen & masks.mask
    return seen
