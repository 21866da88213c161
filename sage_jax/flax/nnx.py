"""NNX: an attention layer, 8-bit inside, with the parameters of `nnx.MultiHeadAttention`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sage_jax import decode as kv
from sage_jax.flax import _layer
from sage_jax.flax.attention_fn import attention_fn
from sage_jax.recipe import Recipe
from sage_jax.sparge import Selection

__all__ = ["SageAttention", "attention_fn"]

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class SageAttention(nnx.Module):
    """Multi-head attention in 8 bits: GQA, rotary positions, QK-norm, windows, quantized decoding.

    Parameters, in `param_dtype`, named, shaped and (for equal seeds) initialised as those of
    `nnx.MultiHeadAttention`, so that checkpoints of either load into the other; F input features,
    Fkv those of keys and values, Fo output features, N heads, K key/value heads, H the head
    dimension qkv_features / N:

    | name | shape |
    |---|---|
    | query.kernel, query.bias | [F, N, H], [N, H] |
    | key.kernel, key.bias, value.kernel, value.bias | [Fkv, K, H], [K, H] |
    | out.kernel, out.bias | [N, H, Fo], [Fo] |
    | query_ln.scale, key_ln.scale (with normalize_qk) | [H] |

    After `init_cache`, as `nnx.Cache` variables (B batch, S capacity; `sage_jax.decode.KVCache`):
    cached_key and cached_value int8 [B, K, S, H], cached_key_scale and cached_value_scale float32
    [B, K, S], cached_key_mean float32 [B, K, H], cache_index int32 [] or [B].

    Args:
      num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features: sizes, with
        the defaults of `nnx.MultiHeadAttention`.
      recipe, implementation, scale, local_window_size: as in `sage_jax.dot_product_attention`;
        decoding follows scale and window, its numerics are those of the cache. recipe may also be
        "exact": float32 attention in plain JAX, O(T·S) memory, see `sage_jax.load_recipes`.
      is_causal: whether query i sees the keys up to i only.
      rope_theta: base of the rotary position embedding, None for none; after QK-norm.
      sparge: which tiles are computed, as in `attention_fn`; None: all. Decoding computes all.
      normalize_qk: layer norm without bias of each head of queries and keys.
      dropout_rate: of the layer's output; probabilities are never dropped.
      deterministic: whether dropout is off; `eval()` and `train()` set it too.
      decode: whether calls append to the cache and attend over it.
      dtype: of the computation; None: that of inputs and parameters.
      precision: of the projections.
      rngs: `params` for the initialisation and `dropout` if there is any.
      *_init, *_metadata: as in `nnx.MultiHeadAttention`: initializers, and metadata of the
        parameters such as {"out_sharding": ("fsdp", "heads", None)}.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        recipe: str | Recipe | None = None,
        implementation: str | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        local_window_size: int | tuple[int | None, int | None] | None = None,
        rope_theta: float | None = None,
        sparge: Selection | None = None,
        normalize_qk: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        decode: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        use_bias: bool = True,
        kernel_init=nnx.nn.linear.default_kernel_init,
        out_kernel_init=None,
        bias_init=nnx.initializers.zeros,
        out_bias_init=None,
        kernel_metadata: Mapping[str, Any] = NO_METADATA,
        out_kernel_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        out_bias_metadata: Mapping[str, Any] = NO_METADATA,
        query_ln_scale_metadata: Mapping[str, Any] = NO_METADATA,
        key_ln_scale_metadata: Mapping[str, Any] = NO_METADATA,
        rngs: nnx.Rngs,
    ):
        qkv_features = in_features if qkv_features is None else qkv_features
        out_features = in_features if out_features is None else out_features
        in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = _layer.check_settings(
            num_heads, self.num_kv_heads, qkv_features, rope_theta
        )
        self.decode = decode
        self.attention = _layer.Attention(
            recipe, implementation, scale, is_causal, local_window_size, rope_theta, sparge
        )

        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        linear = functools.partial(
            nnx.LinearGeneral, use_bias=use_bias, precision=precision, **common
        )
        into_heads = functools.partial(
            linear,
            kernel_init=kernel_init,
            bias_init=bias_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.query = into_heads(in_features, (num_heads, self.head_dim))
        self.key = into_heads(in_kv_features, (self.num_kv_heads, self.head_dim))
        self.value = into_heads(in_kv_features, (self.num_kv_heads, self.head_dim))
        norm = functools.partial(nnx.LayerNorm, self.head_dim, use_bias=False, **common)
        self.query_ln = self.key_ln = nnx.data(None)
        if normalize_qk:
            self.query_ln = norm(scale_metadata=query_ln_scale_metadata)
            self.key_ln = norm(scale_metadata=key_ln_scale_metadata)
        self.out = linear(
            (num_heads, self.head_dim),
            out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )
        self.dropout = nnx.data(None)
        if dropout_rate > 0:
            self.dropout = nnx.Dropout(dropout_rate, deterministic=deterministic, rngs=rngs)
        for name in _layer.CACHE_NAMES:
            setattr(self, name, nnx.data(None))

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        is_causal: bool | None = None,
        input_positions: jax.Array | None = None,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        query_segment_ids: jax.Array | None = None,
        key_value_segment_ids: jax.Array | None = None,
        decode: bool | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        qkv_sharding=None,
        out_sharding=None,
    ) -> jax.Array:
        """Projects, attends and projects back.

        Args:
          inputs_q: [..., T, F].
          inputs_k, inputs_v: [..., S, Fkv] for cross-attention; inputs_v defaults to inputs_k.
          mask: bool or number, attend where it is not zero, broadcastable to [..., N, T, S]; in
            decode mode S is the capacity.
          is_causal: overrides the constructor's; decode mode is causal always.
          input_positions: int [..., T], positions of the rotary embedding; default 0, 1, 2, ... or
            the places in the cache.
          query_seq_lengths, key_value_seq_lengths: int32 [...]. In decode mode with a ragged cache
            key_value_seq_lengths says how many of the T tokens count.
          query_segment_ids, key_value_segment_ids: int32 [..., T] and [..., S].
          decode, deterministic, rngs: override the constructor's.
          qkv_sharding, out_sharding: sharding of the projections' results on explicit meshes.

        Returns:
          [..., T, Fo].
        """
        inputs_k, inputs_v, is_self = _layer.choose_inputs(inputs_q, inputs_k, inputs_v)
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)

        if self.decode if decode is None else decode:
            _layer.check_decode_arguments(
                is_self,
                is_causal=None if is_causal else is_causal,
                query_seq_lengths=query_seq_lengths,
                query_segment_ids=query_segment_ids,
                key_value_segment_ids=key_value_segment_ids,
            )
            out, cache = self.attention.cached(
                self._cache(),
                query,
                key,
                value,
                mask=mask,
                positions=input_positions,
                lengths=key_value_seq_lengths,
            )
            for name, array in zip(_layer.CACHE_NAMES, cache, strict=True):
                getattr(self, name)[...] = array
        else:
            out = self.attention.full(
                query,
                key,
                value,
                mask=mask,
                is_causal=is_causal,
                positions=input_positions,
                is_self=is_self,
                query_seq_lengths=query_seq_lengths,
                key_value_seq_lengths=key_value_seq_lengths,
                query_segment_ids=query_segment_ids,
                key_value_segment_ids=key_value_segment_ids,
            )
        out = self.out(out, out_sharding=out_sharding)
        if self.dropout is not None:
            out = self.dropout(out, deterministic=deterministic, rngs=rngs)
        return out

    def init_cache(
        self,
        input_shape: tuple[int, ...],
        *,
        ragged: bool = False,
        sharding: jax.sharding.NamedSharding | None = None,
    ) -> None:
        """An empty cache for inputs of shape [..., capacity, F].

        Args:
          input_shape: the shape of the longest input to come; its last number is not used.
          ragged: whether every row has its own length (prompts of different lengths).
          sharding: of the codes [B, K, S, H], see `sage_jax.decode.init_cache`.
        """
        *batch, capacity, _ = input_shape
        cache = kv.init_cache(
            math.prod(batch),
            capacity,
            self.num_kv_heads,
            self.head_dim,
            ragged=ragged,
            sharding=sharding,
        )
        for name, array in zip(_layer.CACHE_NAMES, cache, strict=True):
            setattr(self, name, nnx.Cache(array))

    def set_view(
        self,
        decode: bool | None = None,
        batch_size: int | tuple[int, ...] | None = None,
        max_length: int | None = None,
    ) -> None:
        """Class method used by `nnx.view`: sets decode mode, and makes the cache if there is none of these sizes.

        A cache that has them stays, with its tokens. An empty one that takes the place of another is ragged if that was,
        and has no sharding; `init_cache` gives one.

        Args:
          decode: whether calls use the cache; None: as before.
          batch_size: the cache's batch axes; None: those of the cache that there is.
          max_length: the cache's capacity in tokens; None: that of the cache that there is.
        """
        self.decode = self.decode if decode is None else decode
        if not self.decode or (decode is None and batch_size is None and max_length is None):
            return
        ragged, held = False, (None, None)
        if self.cache_index is not None:
            ragged, held = self.cache_index.ndim > 0, self.cached_key_scale.shape[::2]
        batch_size = held[0] if batch_size is None else batch_size
        max_length = held[1] if max_length is None else max_length
        if batch_size is None or max_length is None:
            raise ValueError(
                f"decode=True makes a cache and needs batch_size and max_length, but got "
                f"{batch_size} and {max_length}."
            )
        batch = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
        if (math.prod(batch), max_length) != held:
            self.init_cache((*batch, max_length, 0), ragged=ragged)

    def _cache(self) -> kv.KVCache:
        if self.cache_index is None:
            raise ValueError(
                "decode=True needs a cache; call init_cache((batch, capacity, features)) first."
            )
        return kv.KVCache(*(getattr(self, name)[...] for name in _layer.CACHE_NAMES))
