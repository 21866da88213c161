"""`dot_product_attention`: 8-bit attention with the signature and meaning of
`jax.nn.dot_product_attention`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sage_jax import _refusal, _sharding, _vjp, masking, support
from sage_jax.masking import Masks
from sage_jax.recipe import Recipe

_OPERANDS = "B.N. B.K. B.K. B. B. B. bn.. bn.."


def dot_product_attention(
    query: jax.typing.ArrayLike,
    key: jax.typing.ArrayLike,
    value: jax.typing.ArrayLike,
    bias: jax.typing.ArrayLike | None = None,
    mask: jax.typing.ArrayLike | None = None,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.typing.ArrayLike | None = None,
    key_value_seq_lengths: jax.typing.ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    recipe: str | Recipe | None = None,
    query_segment_ids: jax.typing.ArrayLike | None = None,
    key_value_segment_ids: jax.typing.ArrayLike | None = None,
    causal_alignment: str = "top_left",
    deterministic: bool = False,
    block_mask: jax.typing.ArrayLike | None = None,
):
    """softmax(scale · query·keyᵀ + bias) · value with 8-bit matrix products, forward and backward.

    Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head
    dimension (1 to 256). Query head n uses key/value head n // (N/K). A query sees a key if every
    mask given below lets it; a query that sees no key gives zeros, LSE −inf and zero gradients
    (where jax.nn averages the values).

    Args:
      query: [B, T, N, H] or [T, N, H]; bfloat16, float16 or float32.
      key, value: [B, S, K, H] or [S, K, H], of the same dtype; N a multiple of K. They are never
        repeated in memory.
      bias: added to the scaled logits; broadcastable to [B, N, T, S]. Not on CUDA.
      mask: bool, True = attend; broadcastable to [B, N, T, S]. Axes that are missing or 1
        broadcast, in `bias` too.
      scale: of the logits; 1/√H by default. May be traced, and then has a gradient.
      is_causal: query i sees keys j ≤ i (see causal_alignment).
      query_seq_lengths, key_value_seq_lengths: integer [B]; tokens at or past the length take no
        part.
      local_window_size: query i sees keys from i − left to i + right; one int means both, None
        (inside a pair) no limit.
      implementation: "cpu", "cuda" or "reference" (plain JAX, O(T·S) memory); None takes the
        platform's own. A name given here is used or refused, never replaced.
      return_residual: True: also return the natural-log sum-exp of the logits. It is differentiable. Where neither it nor a
        gradient is wanted, a GPU may take a faster kernel, whose output errs as much but has other bits (docs/semantics.md).
      recipe: a name from `sage_jax.recipes`, a name with changes ("train8:delta=exact") or a
        `Recipe`. None computes `sage2`, and differentiates it as `train8`.
      query_segment_ids, key_value_segment_ids: integer [B, T] and [B, S]: packed sequences; a query
        sees its own id only.
      causal_alignment: "top_left": the diagonal starts at the first query and key, as in jax.nn.
        "bottom_right": it ends at the last valid ones, as in FlashAttention. Moves windows as well.
      deterministic: gradients repeat bit for bit from run to run. Without it the one of query may
        differ by rounding, on sm_90 with 16-bit inputs and head dimension 64 or 128: its terms are
        added up in the order in which blocks end, which is a fifth faster. All else repeats anyway.
      block_mask: bool, True = attend; broadcastable to [B, N, ceil(T/64), ceil(S/64)]: one entry
        for each tile of 64 queries and 64 keys. Tiles that no query sees cost nothing, in either
        pass. Not together with `mask`. `sage_jax.sparge` chooses one by the data.

    Returns:
      out, shaped and typed like query; with return_residual (out, lse), lse float32 [B, T, N] or
      [T, N].

    Raises:
      ValueError, TypeError, ImportError: before anything runs; see `supports` and `explain`.

    Sources: SageAttention2 (arXiv 2411.10958) for the forward pass; docs/numerics.md for `train8`.
    """
    planned = support.plan(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        recipe=recipe,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        causal_alignment=causal_alignment,
        return_residual=return_residual,
        deterministic=deterministic,
        block_mask=block_mask,
    )
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    guard = _refusal.reverse_mode_only
    q, k, v = (guard(_leading_axes(x, 4)) for x in (query, key, value))
    if (
        planned.fold_scale
    ):  # the kernels' own scale is a positive constant; float32 keeps the product exact enough
        q = q.astype(jnp.float32) * guard(jnp.asarray(scale, jnp.float32))
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    masks = Masks(
        bounds(q, k, query_seq_lengths, key_value_seq_lengths, causal_alignment),
        _optional(query_segment_ids, 2, jnp.int32),
        _optional(key_value_segment_ids, 2, jnp.int32),
        _optional(mask if block_mask is None else block_mask, 4, jnp.bool_),
        # one without entries adds nothing, and has nothing to differentiate
        None if bias is None or jnp.size(bias) == 0 else guard(_optional(bias, 4, jnp.float32)),
    )
    operands, restore = _sharding.settle(_OPERANDS, (q, k, v, *masks))
    q, k, v, *masks = _sharding.align(*operands)
    results = _vjp.attention(planned.settings, q, k, v, Masks(*masks))
    out, *rows = restore(*(x for x in results if x is not None))
    results = (out.astype(query.dtype), *(jnp.swapaxes(lse, 1, 2) for lse in rows))
    if query.ndim == 3:
        results = tuple(jnp.squeeze(x, 0) for x in results)
    return results if return_residual else results[0]


def _leading_axes(x, ndim):
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def _optional(x, ndim, dtype):
    """x with leading axes of size 1 added, or None."""
    return None if x is None else _leading_axes(jnp.asarray(x), ndim).astype(dtype)


def bounds(q, k, query_lengths, key_lengths, causal_alignment):
    """int32 [B, 3]: valid queries, valid keys, and the key that query 0's diagonal starts at."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]

    def valid(lengths, tokens):
        if lengths is None:
            return jnp.full((batch,), tokens, jnp.int32)
        return jnp.asarray(masking.clipped(lengths, 0, tokens))

    q_len, kv_len = _sharding.alike(valid(query_lengths, queries), valid(key_lengths, keys))
    offset = kv_len - q_len if causal_alignment == "bottom_right" else jnp.zeros_like(q_len)
    return jnp.stack([q_len, kv_len, offset], axis=1)
