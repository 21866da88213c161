"""A key/value cache that holds 8-bit codes, and attention over it: autoregressive decoding at half
a bf16 cache's bytes.

Layout. `KVCache` is a plain pytree of arrays, so it can be a carry of `lax.scan`, a donated
argument of `jit`, or live in the variables of any neural network library. Keys and values are INT8
with one float32 scale a token and head: a token costs 2·H + 8 bytes a head, against 4·H in bf16
(53% at H = 64, 52% at H = 128).

Numerics. The codes of a token are final when it is appended; nothing is ever requantized.
- K is smoothed (SageAttention, arXiv 2410.02367, section 4.2) by a vector fixed when a row gets its
  first tokens: their mean. Adding one vector to all keys moves every logit of a query by the same
  amount, which softmax does not see, so *any* constant vector is correct and one that is near the
  mean of K makes the codes finer.
- V is INT8, not e4m3. With one scale a token the output's relative error is 0.7% in INT8 and 2.6%
  in e4m3 on normal values, 1.2% and 2.5% on heavy-tailed ones (Student t, 4 degrees of freedom).
  With outlier channels INT8 still has the smaller total error, by a third at least; but where they
  are 20 times as large as the rest, the error of the other channels is 4.8% against 2.5%. V is not
  smoothed: its sums are float32, and a mean fixed by the first tokens would say little of later ones.
- Queries, probabilities and accumulators stay in floating point: decoding is bound by the cache's
  bytes, which these are not part of. The scales of K multiply the scores, those of V the
  probabilities, so no dequantized K or V is formed.

Shapes: B batch, T new tokens, S capacity, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax import support
from sage_jax.masking import OPEN, clipped
from sage_jax.quantization import int8_codes, scale_and_inverse

QUERY_BLOCK = 128  # queries whose scores are held at once: a prefill needs [B, N, 128, S] float32


class KVCache(NamedTuple):
    """Quantized keys and values of the tokens seen so far; a pytree.

    Attributes:
      k8: int8 [B, K, S, H], codes of K − k_mean.
      k_scale: float32 [B, K, S], one scale a token; NaN for a token whose key has a NaN or Inf.
      v8: int8 [B, K, S, H], codes of V.
      v_scale: float32 [B, K, S], as k_scale.
      k_mean: float32 [B, K, H], the smoothing vector, fixed by the first append.
      length: int32, tokens held: [] if all rows advance together, [B] if every row has its own
        length.
    """

    k8: jax.Array
    k_scale: jax.Array
    v8: jax.Array
    v_scale: jax.Array
    k_mean: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens for which there is room, S."""
        return self.k8.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in self)


def init_cache(
    batch: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    *,
    ragged: bool = False,
    sharding: NamedSharding | None = None,
) -> KVCache:
    """An empty cache.

    Args:
      batch, capacity, kv_heads, head_dim: B, S, K, H.
      ragged: whether every batch row has its own length.
      sharding: of the codes [B, K, S, H]; the other arrays follow. Only B and K may be split. A
        mesh with explicit axes needs it, on one with automatic axes XLA chooses.

    Raises:
      ValueError: capacity, kv_heads or head_dim is below 1, or S or H would be split.
    """
    if capacity < 1:
        raise ValueError(f"capacity should be at least 1 token, but got {capacity}.")
    if kv_heads < 1 or head_dim < 1:
        raise ValueError(
            f"a cache should have at least 1 key/value head of 1 channel, but got kv_heads="
            f"{kv_heads} and head_dim={head_dim}; give those of the model."
        )
    axes = () if sharding is None else tuple(sharding.spec)
    if any(axes[2:]):
        raise ValueError(
            f"a cache may be split over batch and heads only, but got the sharding {sharding.spec} "
            "of [B, K, S, H]; leave S and H whole."
        )

    def zeros(shape, dtype):
        if sharding is None:
            return jnp.zeros(shape, dtype)
        spec = PartitionSpec(*axes[: min(2, len(shape))])
        return jnp.zeros(shape, dtype, device=NamedSharding(sharding.mesh, spec))

    codes = (batch, kv_heads, capacity, head_dim)
    return KVCache(
        k8=zeros(codes, jnp.int8),
        k_scale=zeros(codes[:3], jnp.float32),
        v8=zeros(codes, jnp.int8),
        v_scale=zeros(codes[:3], jnp.float32),
        k_mean=zeros((batch, kv_heads, head_dim), jnp.float32),
        length=zeros((batch,) if ragged else (), jnp.int32),
    )


def append(
    cache: KVCache,
    key: jax.Array,
    value: jax.Array,
    *,
    lengths: jax.typing.ArrayLike | None = None,
) -> KVCache:
    """The cache with T more tokens: a whole prompt, or one step.

    Under `jit` donate the cache (`donate_argnums`): then the codes are written in place.

    Args:
      cache: not modified.
      key, value: floating point [B, T, K, H], keys already rotated if the model uses rotary
        positions.
      lengths: integer [B], for a ragged cache: only the first lengths[b] of the T tokens of row b
        count (a prompt padded on the right); the next append overwrites the rest. Numbers below 0
        count as 0, above T as T. Padding needs no room in the cache.

    Raises:
      ValueError: shapes or types do not fit the cache, or the tokens that count do not, where that
        can be seen: T against the capacity always if `lengths` is None, `lengths` and the lengths
        held so far outside of `jit`. Inside of `jit` a row that is overfull has lost tokens, and
        `attend` returns NaN for it.
    """
    _check_tokens(cache, key, value)
    tokens = key.shape[1]
    added = jnp.int32(tokens) if lengths is None else _counts(lengths, cache, tokens)
    _check_room(cache, tokens if lengths is None else added)
    k, v = (jnp.swapaxes(x.astype(jnp.float32), 1, 2) for x in (key, value))
    first = jnp.reshape(cache.length == 0, (-1, 1, 1))
    k_mean = jnp.where(first, _finite_mean(k, added), cache.k_mean)
    k8, k_scale = _int8_tokens(k - k_mean[:, :, None])
    v8, v_scale = _int8_tokens(v)
    place = cache.length if cache.length.ndim == 0 else _slots(cache.length, k_scale)
    return KVCache(
        k8=_write(cache.k8, k8, place),
        k_scale=_write(cache.k_scale, k_scale, place),
        v8=_write(cache.v8, v8, place),
        v_scale=_write(cache.v_scale, v_scale, place),
        k_mean=k_mean,
        length=cache.length + added,
    )


def attend(
    cache: KVCache,
    query: jax.Array,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    mask: jax.Array | None = None,
    positions: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Attention of T queries over the tokens in the cache (their own included: append first).

    Args:
      cache: K key/value heads; query head n uses head n // (N/K). K and V are not repeated.
      query: floating point [B, T, N, H].
      scale: softmax scale, a number or a scalar array, default H ** -0.5.
      is_causal: True or False: a query sees the tokens up to its own position.
      local_window_size: (left, right), or one number for both: a query at position p sees p − left
        to p + right; None in place of a number leaves that side open.
      mask: bool, broadcastable to [B, N, T, S], True = attend; applied as well.
      positions: integer [T] or [B, T], place of each query in its row; default: the T newest,
        length − T to length − 1.

    Returns:
      [B, T, N, H] in the query's type; accumulated in float32. A query that sees no token gets
      zeros. A NaN or Inf in a key, a value or a query gives NaN in the rows that see it. Rows of an
      overfull cache are NaN.

    Raises:
      ValueError: a shape or type does not fit, the window is negative, or scale is not finite.
      TypeError: is_causal is not a bool, or scale is neither a number nor an array.
    """
    support.check_flag("is_causal", is_causal)
    left, right = support.window(local_window_size, is_causal)
    if left < 0 or right < 0:
        raise ValueError(
            f"local_window_size={local_window_size!r} has a negative side; use numbers from 0 up, or None for an open side."
        )
    _check_query(cache, query, mask)
    batch, tokens, heads, head_dim = query.shape
    if positions is None:
        positions = jnp.arange(tokens, dtype=jnp.int32)[None] - tokens
        positions = jnp.reshape(cache.length, (-1, 1)) + positions
    else:
        shapes = ((tokens,), (batch, tokens), (1, tokens))
        support.check_integers("positions", positions, shapes, "give one place for each query")
        positions = clipped(positions, -OPEN, OPEN)
    positions = jnp.broadcast_to(positions, (batch, tokens))
    scale = head_dim**-0.5 if scale is None else scale
    support.check_scale(scale)
    scale = jnp.asarray(scale, jnp.float32)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)

    def block(query, positions, mask):
        return _attend_block(cache, query, positions, mask, scale, left, right)

    out = _over_query_blocks(block, query, positions, mask)
    overfull = jnp.reshape(cache.length > cache.capacity, (-1, 1, 1, 1))
    return jnp.where(overfull, jnp.nan, out).astype(query.dtype)


def _attend_block(cache, query, positions, mask, scale, left, right):
    """`attend` for queries [B, T, N, H] at positions [B, T]; float32."""
    batch, tokens, heads, head_dim = query.shape
    kv_heads = cache.k8.shape[1]
    # INT8 codes are exact in bf16 and float32, but the scores' and probabilities' range needs more
    # than float16's.
    compute = jnp.bfloat16 if query.dtype == jnp.bfloat16 else jnp.float32
    grouped = query.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    scores = _dot("btkgh,bksh->bkgts", grouped, cache.k8, compute)
    scores = scores * (scale * cache.k_scale[:, :, None, None, :])

    j = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None]
    seen = j < jnp.reshape(cache.length, (-1, 1, 1))
    diagonal = j - positions[..., None]
    if left < OPEN:
        seen = seen & (diagonal >= -left)
    if right < OPEN:
        seen = seen & (diagonal <= right)
    seen = seen[:, None, None]
    if mask is not None:
        head_axes = (kv_heads, heads // kv_heads) if mask.shape[1] > 1 else (1, 1)
        seen = seen & mask.reshape(mask.shape[0], *head_axes, *mask.shape[2:])

    top = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, keepdims=True)
    # NaN here reaches the whole row. The scores alone would not do: −Inf for every key is no NaN.
    finite = jnp.all(jnp.isfinite(grouped), axis=-1)
    top = jnp.where(jnp.moveaxis(finite, 1, -1)[..., None], top, jnp.nan)
    top = jnp.where(jnp.any(seen, axis=-1, keepdims=True), top, 0.0)
    p = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    # Where nothing is seen the scale must not enter: it may be NaN, and 0 · NaN is not 0.
    weights = jnp.where(seen, p * cache.v_scale[:, :, None, None, :], 0.0)
    weights = weights / jnp.where(total == 0, 1.0, total)
    out = _dot("bkgts,bksh->btkgh", weights, cache.v8, compute)
    return out.reshape(batch, tokens, heads, head_dim)


def _dot(spec, x, codes, dtype):
    """einsum of x and INT8 codes as `dtype` operands, accumulated in float32."""

    def product(dtype):
        return lambda x, codes: jnp.einsum(
            spec, x.astype(dtype), codes.astype(dtype), preferred_element_type=jnp.float32
        )

    if dtype == jnp.float32:
        return product(dtype)(x, codes)
    # XLA's CPU backend lacks some products of bf16 operands into float32.
    return lax.platform_dependent(x, codes, cpu=product(jnp.float32), default=product(dtype))


def _over_query_blocks(block, query, positions, mask):
    """block(query, positions, mask), `QUERY_BLOCK` queries at a time, one after another."""
    tokens = query.shape[1]
    if tokens <= QUERY_BLOCK:
        return block(query, positions, mask)
    blocks = -(-tokens // QUERY_BLOCK)

    def split(x, axis):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, blocks * QUERY_BLOCK - tokens)
        shape = x.shape[:axis] + (blocks, QUERY_BLOCK) + x.shape[axis + 1 :]
        return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)

    if mask is None or mask.shape[2] == 1:
        outs = lax.map(lambda x: block(*x, mask), (split(query, 1), split(positions, 1)))
    else:
        outs = lax.map(lambda x: block(*x), (split(query, 1), split(positions, 1), split(mask, 2)))
    outs = jnp.moveaxis(outs, 0, 1)  # [B, blocks, QUERY_BLOCK, N, H]
    return outs.reshape(outs.shape[0], -1, *outs.shape[3:])[:, :tokens]


def _finite_mean(k, count):
    """Mean [B, K, H] of the first `count` ([] or [B]) tokens of k [B, K, T, H] that hold neither
    NaN nor Inf.
    """
    j = jnp.arange(k.shape[2], dtype=jnp.int32)[None]
    valid = (j < jnp.reshape(count, (-1, 1)))[:, None] & jnp.all(jnp.isfinite(k), axis=-1)
    number = jnp.maximum(jnp.sum(valid, axis=-1), 1)
    total = jnp.sum(jnp.where(valid[..., None], k, 0.0), axis=2)
    return total / number[..., None].astype(jnp.float32)


def _int8_tokens(x):
    """float32 [..., H] -> codes int8 [..., H], scale float32 [...]: NaN marks a token that holds a
    NaN or Inf.
    """
    amax = jnp.max(jnp.abs(x), axis=-1)
    good = jnp.isfinite(amax)
    scale, inverse = scale_and_inverse(jnp.where(good, amax, 0.0), 127.0)
    codes = int8_codes(jnp.where(good[..., None], x, 0.0), inverse[..., None])
    return codes, jnp.where(good, scale, jnp.nan)


def _slots(length, like):
    """int32 [B, K, T]: where the tokens of `like` [B, K, T] go in rows that hold `length` [B]."""
    j = jnp.arange(like.shape[2], dtype=jnp.int32)[None, None]
    # Zeros of `like` have its sharding, which a mesh with explicit axes asks of the sum.
    return jnp.zeros_like(like, jnp.int32) + (length[:, None, None] + j)


def _write(buffer, new, place):
    """buffer [B, K, S, ...] with new [B, K, T, ...] put at `place`: the slot of the first token, [],
    or of each, [B, K, T]. Of the latter those past S are dropped.
    """
    if place.ndim == 0:
        return lax.dynamic_update_slice_in_dim(buffer, new, place, axis=2)

    # A dynamic_update_slice would move its start until the padding fits as well. With an index for
    # the head too, the scatter's indices stand for the leading axes: for others XLA's GPU compiler
    # transposes the whole buffer.
    def head(buffer, new, slots):
        options = dict(mode="drop", unique_indices=True, indices_are_sorted=True)
        return buffer.at[slots].set(new, **options)

    return jax.vmap(jax.vmap(head))(buffer, new, place)


def _check_tokens(cache, key, value):
    batch, kv_heads, _, head_dim = cache.k8.shape
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, kv_heads, head_dim):
            raise ValueError(
                f"{name} should have shape [{batch}, T, {kv_heads}, {head_dim}] to fit the "
                f"cache, but got {list(x.shape)}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} should be floating point, but got {x.dtype}.")
    if key.shape != value.shape:
        raise ValueError(
            f"key and value should have the same shape, but got {list(key.shape)} and "
            f"{list(value.shape)}."
        )


def _counts(lengths, cache, tokens):
    """How many of `tokens` new tokens count in each row: int32 [B]."""
    if cache.length.ndim == 0:
        raise ValueError(
            "lengths was given, but all rows of this cache have one length; make it with "
            "init_cache(..., ragged=True)."
        )
    shapes = ((cache.k8.shape[0],),)
    support.check_integers("lengths", lengths, shapes, "give one count for each batch row")
    return clipped(lengths, 0, tokens)


def _check_room(cache, added):
    """Raises ValueError if a row cannot take `added` tokens, a number or [B], as far as is known."""
    held, added = _known(cache.length), _known(added)
    rows = zip if len(held) == len(added) else itertools.product  # one number stands for all rows
    for old, new in rows(held, added):
        if old + new > cache.capacity:
            raise ValueError(
                f"{new} tokens do not fit a cache of capacity {cache.capacity} that holds {old} "
                "already; make a larger one with init_cache."
            )


def _known(counts):
    """List of the counts, 0 for those that cannot be seen here."""
    if not isinstance(counts, (jax.Array, np.ndarray)):
        return [counts]  # one number, symbolic under `jax.export`
    traced = isinstance(counts, jax.core.Tracer)
    if traced or not getattr(counts, "is_fully_addressable", True):
        return [0]
    return np.ravel(np.asarray(counts)).tolist()


def _check_query(cache, query, mask):
    batch, kv_heads, capacity, head_dim = cache.k8.shape
    if query.ndim != 4 or (query.shape[0], query.shape[3]) != (batch, head_dim):
        raise ValueError(
            f"query should have shape [{batch}, T, N, {head_dim}] to fit the cache, "
            f"but got {list(query.shape)}."
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"query should be floating point, but got {query.dtype}.")
    if query.shape[2] % kv_heads:
        raise ValueError(
            f"the number of query heads should be a multiple of the cache's {kv_heads} key/value "
            f"heads, but got {query.shape[2]}."
        )
    if mask is None:
        return
    full = (batch, query.shape[2], query.shape[1], capacity)
    fits = mask.ndim <= 4 and all(
        m in (1, f) for m, f in zip(mask.shape[::-1], full[::-1], strict=False)
    )
    if mask.dtype != jnp.bool_ or not fits:
        raise ValueError(
            f"mask should be bool and broadcastable to {list(full)} (capacity last), "
            f"but got {mask.dtype} {list(mask.shape)}."
        )
