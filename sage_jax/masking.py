"""Masks as one value: what every backend means by "query i sees key j" (`docs/abi.md`, common operands)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

OPEN = 2**30  # a window edge that excludes nothing


class Masks(NamedTuple):
    """The array part of a mask; every field is always an array, zero-size where absent.

    Attributes:
      bounds: int32 [B, 3]: valid queries, valid keys, diagonal offset.
      q_seg, kv_seg: int32 [B, T] and [B, S] segment ids, or [0, 0].
      mask: bool [B|1, N|1, T|1, S|1], True = attend, or [0, 0, 0, 0].
      bias: float32, shaped like `mask`, added to the scaled logits, or [0, 0, 0, 0].
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
