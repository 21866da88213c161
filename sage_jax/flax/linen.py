"""Linen: an attention layer, 8-bit inside, with `MultiHeadDotProductAttention`'s parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from sage_jax import decode as kv
from sage_jax.flax import _layer
from sage_jax.flax.attention_fn import attention_fn
from sage_jax.recipe import Recipe
from sage_jax.sparge import Selection

__all__ = ["SageAttention", "attention_fn"]


class SageAttention(nn.Module):
    """Multi-head attention in 8 bits: GQA, rotary positions, QK-norm, windows, quantized decoding.

    Parameters, in `param_dtype`, named and shaped as those of `nn.MultiHeadDotProductAttention`, so
    that checkpoints of either load into the other; F input features, Fkv those of keys and values,
    Fo output features, N heads, K key/value heads, H the head dimension qkv_features / N:

    | name | shape |
    |---|---|
    | query/kernel, query/bias | [F, N, H], [N, H] |
    | key/kernel, key/bias, value/kernel, value/bias | [Fkv, K, H], [K, H] |
    | out/kernel, out/bias | [N, H, Fo], [Fo] |
    | query_ln/scale, key_ln/scale (with normalize_qk) | [H] |

    With `decode`, the collection "cache" (B batch, S capacity; `sage_jax.decode.KVCache`):
    cached_key and cached_value int8 [B, K, S, H], cached_key_scale and cached_value_scale float32
    [B, K, S], cached_key_mean float32 [B, K, H], cache_index int32 [] or [B]. As with Flax's layer,
    `init` with an input of full length makes the cache and `apply(..., mutable=["cache"])` uses it;
    an apply may append one token or many.

    Attributes:
      num_heads, qkv_features, out_features: sizes, with the defaults of Flax's layer.
      num_kv_heads: key/value heads, default num_heads.
      recipe, implementation, scale, local_window_size: as in `sage_jax.dot_product_attention`;
        decoding follows scale and window, its numerics are those of the cache. recipe may also be
        "exact": float32 attention in plain JAX, O(T·S) memory, see `sage_jax.load_recipes`.
      is_causal: whether query i sees the keys up to i only.
      rope_theta: base of the rotary position embedding, None for none; after QK-norm.
      sparge: which tiles are computed, as in `attention_fn`; None: all. Decoding computes all.
      normalize_qk: layer norm without bias of each head of queries and keys.
      dropout_rate: of the layer's output; probabilities are never dropped.
      deterministic: whether dropout is off.
      decode: whether calls append to the cache and attend over it.
      ragged_cache: whether every row of the cache has its own length.
      dtype: of the computation; None: that of inputs and parameters.
      precision: of the projections.
      kernel_init, out_kernel_init, bias_init, out_bias_init: initializers; wrap them in
        `nn.with_partitioning` for sharding metadata. None: as the one without `out_`.
    """

    num_heads: int
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    recipe: str | Recipe | None = None
    implementation: str | None = None
    scale: float | None = None
    is_causal: bool = False
    local_window_size: int | tuple[int | None, int | None] | None = None
    rope_theta: float | None = None
    normalize_qk: bool = False
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    decode: bool = False
    ragged_cache: bool = False
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    use_bias: bool = True
    kernel_init: Callable = nn.linear.default_kernel_init
    out_kernel_init: Callable | None = None
    bias_init: Callable = nn.initializers.zeros
    out_bias_init: Callable | None = None
    sparge: Selection | None = None

    def __post_init__(self):
        if isinstance(self.local_window_size, list):  # a module has to be hashable
            self.local_window_size = tuple(self.local_window_size)
        _layer.check_choices(self.recipe, self.implementation, self.sparge)
        super().__post_init__()

    @nn.compact
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
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Projects, attends and projects back.

        Args:
          inputs_q: [..., T, F].
          inputs_k, inputs_v: [..., S, Fkv] for cross-attention; inputs_v defaults to inputs_k.
          mask: bool or number, attend where it is not zero, broadcastable to [..., N, T, S]; in
            decode mode S is the capacity.
          is_causal: overrides the attribute; decode mode is causal always.
          input_positions: int [..., T], positions of the rotary embedding; default 0, 1, 2, ... or
            the places in the cache.
          query_seq_lengths, key_value_seq_lengths: int32 [...]. In decode mode with a ragged cache
            key_value_seq_lengths says how many of the T tokens count.
          query_segment_ids, key_value_segment_ids: int32 [..., T] and [..., S].
          deterministic: overrides the attribute.
          dropout_rng: key of the output's dropout; None: the stream "dropout".

        Returns:
          [..., T, Fo].
        """
        inputs_k, inputs_v, is_self = _layer.choose_inputs(inputs_q, inputs_k, inputs_v)
        features = inputs_q.shape[-1]
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        head_dim = _layer.check_settings(
            self.num_heads, num_kv_heads, self.qkv_features or features, self.rope_theta
        )
        attention = _layer.Attention(
            self.recipe,
            self.implementation,
            self.scale,
            self.is_causal,
            self.local_window_size,
            self.rope_theta,
            self.sparge,
        )

        common = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = functools.partial(
            nn.DenseGeneral, use_bias=self.use_bias, precision=self.precision, **common
        )
        into_heads = functools.partial(
            dense, kernel_init=self.kernel_init, bias_init=self.bias_init
        )
        query = into_heads((self.num_heads, head_dim), name="query")(inputs_q)
        key = into_heads((num_kv_heads, head_dim), name="key")(inputs_k)
        value = into_heads((num_kv_heads, head_dim), name="value")(inputs_v)
        if self.normalize_qk:
            norm = functools.partial(nn.LayerNorm, use_bias=False, **common)
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)

        cache = self._cache_variables(key) if self.decode else None
        if cache is not None:
            _layer.check_decode_arguments(
                is_self,
                is_causal=None if is_causal else is_causal,
                query_seq_lengths=query_seq_lengths,
                query_segment_ids=query_segment_ids,
                key_value_segment_ids=key_value_segment_ids,
            )
            out, new = attention.cached(
                kv.KVCache(*(variable.value for variable in cache)),
                query,
                key,
                value,
                mask=mask,
                positions=input_positions,
                lengths=key_value_seq_lengths,
            )
            for variable, array in zip(cache, new, strict=True):
                variable.value = array
        else:
            out = attention.full(
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
        out = dense(
            self.out_features or features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
        )(out)
        if self.dropout_rate > 0:
            deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
            dropout = nn.Dropout(self.dropout_rate, name="dropout")
            out = dropout(out, deterministic=deterministic, rng=dropout_rng)
        return out

    def _cache_variables(self, key: jax.Array) -> tuple[nn.Variable, ...] | None:
        """The variables of the cache; None while `init` makes them, for keys [..., S, K, H]."""
        exists = self.has_variable("cache", _layer.CACHE_NAMES[-1])
        *batch, capacity, kv_heads, head_dim = key.shape
        empty = functools.partial(
            kv.init_cache,
            math.prod(batch),
            capacity,
            kv_heads,
            head_dim,
            ragged=self.ragged_cache,
        )
        variables = tuple(
            self.variable("cache", name, lambda field: getattr(empty(), field), field)
            for name, field in zip(_layer.CACHE_NAMES, kv.KVCache._fields, strict=True)
        )
        return variables if exists else None
