"""What the NNX and the Linen layer have in common: everything between the projections.

Letters: ... batch axes, B their product, T query length, S key length, N query heads, K key/value
heads, H head dimension.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sage_jax import decode, support
from sage_jax.flax._batch import attend_folded, fold_batch, fold_extents, fold_logits_shape, layer_recipe
from sage_jax.recipe import Recipe
from sage_jax.sparge import Selection, check_selection

# Where a layer keeps the fields of `decode.KVCache`, in their order; the names that Flax has too
# (cached_key, cached_value, cache_index) mean the same there.
CACHE_NAMES = (
    "cached_key",
    "cached_key_scale",
    "cached_value",
    "cached_value_scale",
    "cached_key_mean",
    "cache_index",
)


@dataclasses.dataclass(frozen=True)
class Attention:
    """The settings of a layer that concern attention itself; static and hashable.

    Attributes: as the arguments of `nnx.SageAttention`.
    """

    recipe: str | Recipe | None
    implementation: str | None
    scale: float | None
    is_causal: bool
    local_window_size: int | tuple[int | None, int | None] | None
    rope_theta: float | None
    sparge: Selection | None = None

    def __post_init__(self):
        if isinstance(self.local_window_size, list):
            object.__setattr__(self, "local_window_size", tuple(self.local_window_size))
        check_choices(self.recipe, self.implementation, self.sparge)

    def full(self, query, key, value, *, mask, is_causal, positions, is_self, **extents):
        """Attention over the keys and values at hand.

        Args:
          query: [..., T, N, H]; key, value: [..., S, K, H], not rotated yet.
          mask: bool or number, broadcastable to [..., N, T, S], or None.
          is_causal: overrides the setting unless None.
          positions: int [..., T], for the rotation; None: 0, 1, 2, ...
          is_self: keys come from the tokens that ask.
          **extents: lengths [...] and segment ids [..., length] of
            `sage_jax.dot_product_attention`, or None.
        """
        query, key = self._rotated(query, key, positions, is_self)
        batch = query.shape[:-3]
        extents = {name: fold_extents(x, batch, name) for name, x in extents.items()}
        return attend_folded(
            query,
            key,
            value,
            mask=None if mask is None else mask.astype(jnp.bool_),
            scale=self.scale,
            is_causal=self.is_causal if is_causal is None else is_causal,
            local_window_size=self.local_window_size,
            implementation=self.implementation,
            recipe=layer_recipe(self.recipe),
            sparge=self.sparge,
            **extents,
        )

    def cached(self, cache, query, key, value, *, mask, positions, lengths):
        """Attention over the cache after the tokens at hand were appended to it; always causal.

        Args:
          cache: `decode.KVCache` for a batch of B.
          query: [..., T, N, H]; key, value: [..., T, K, H], not rotated yet.
          mask: bool or number, broadcastable to [..., N, T, capacity], or None.
          positions: int [..., T], for the rotation; None: the places in the cache.
          lengths: int32 [...], how many of the T tokens count, or None for all.

        Returns:
          ([..., T, N, H], the new cache).
        """
        batch = query.shape[:-3]
        if positions is not None:
            positions = fold_batch(jnp.broadcast_to(jnp.asarray(positions), query.shape[:-2]), batch)
        query, key, value = (fold_batch(x, batch) for x in (query, key, value))
        lengths = fold_extents(lengths, batch, "key_value_seq_lengths")
        slots = cache.length[..., None] + jnp.arange(query.shape[1], dtype=jnp.int32)
        query, key = self._rotated(query, key, positions, True, slots)
        cache = decode.append(cache, key, value, lengths=lengths)
        out = decode.attend(
            cache,
            query,
            scale=self.scale,
            local_window_size=self.local_window_size,
            mask=fold_logits_shape(None if mask is None else mask.astype(bool), batch, "mask"),
            positions=slots,
        )
        return out.reshape(*batch, *out.shape[1:]), cache

    def _rotated(self, query, key, positions, is_self, places=None):
        """Queries and keys, rotated to `positions`, or where those are None to `places`, by default 0, 1, 2, ..."""
        if self.rope_theta is None:
            if positions is not None:
                raise ValueError(
                    "input_positions is where queries and keys are rotated to, but this layer has "
                    "rope_theta=None; leave it out, or make the layer with a rope_theta."
                )
            return query, key
        if not is_self:
            raise ValueError(
                f"rope_theta={self.rope_theta} rotates self-attention, but inputs_k was given; "
                "make the cross-attention layer with rope_theta=None."
            )
        if positions is None:
            positions = jnp.arange(query.shape[-3], dtype=jnp.int32) if places is None else places
        return tuple(rotate(x, positions, self.rope_theta) for x in (query, key))


def check_choices(recipe, implementation, sparge) -> None:
    """Raises ValueError or TypeError for what does not exist."""
    layer_recipe(recipe)
    support.check_names(implementation)
    check_selection(sparge)


def check_settings(
    num_heads: int, num_kv_heads: int, qkv_features: int, rope_theta: float | None
) -> int:
    """The head dimension.

    Raises:
      ValueError: heads are none, do not divide the features or each other, or cannot be rotated.
    """
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if value < 1:
            raise ValueError(f"{name} should be at least 1, but got {value}.")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads should be a multiple of num_kv_heads, but got {num_heads} and "
            f"{num_kv_heads}."
        )
    if qkv_features % num_heads:
        raise ValueError(
            f"qkv_features should be a multiple of num_heads, but got {qkv_features} and "
            f"{num_heads}."
        )
    head_dim = qkv_features // num_heads
    if rope_theta is not None and head_dim % 2:
        raise ValueError(
            f"rope_theta needs an even head dimension, but qkv_features={qkv_features} over "
            f"num_heads={num_heads} gives {head_dim}; change one of them or use rope_theta=None."
        )
    return head_dim


def choose_inputs(inputs_q, inputs_k, inputs_v):
    """(inputs_k, inputs_v, is_self): keys default to the queries' input, values to the keys'."""
    if inputs_k is None and inputs_v is not None:
        raise ValueError(
            "inputs_v was given without inputs_k; give inputs_k alone to use it for both."
        )
    is_self = inputs_k is None
    inputs_k = inputs_q if is_self else inputs_k
    return inputs_k, inputs_k if inputs_v is None else inputs_v, is_self


def check_decode_arguments(is_self: bool, **unused) -> None:
    """Raises ValueError for what decoding has no use for."""
    if not is_self:
        raise ValueError(
            "decode=True caches the layer's own tokens, but inputs_k was given; call a "
            "cross-attention layer with decode=False."
        )
    for name, value in unused.items():
        if value is not None:
            raise ValueError(
                f"{name} is not used in decode mode, which is causal over the cache; use mask "
                "[..., heads, queries, capacity] to hide cached tokens, or decode=False."
            )


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) of x [..., T, N, H], positions int [..., T].

    Channel h is paired with channel h + H/2 and turned by positions · theta^(−2h/H), in float32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.asarray(positions, jnp.float32)[..., None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)
