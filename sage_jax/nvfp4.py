"""The executable specification of `sage3`: attention whose two products take FP4 operands.

SageAttention3 (arXiv 2505.11594, section 3), with what measurements added to it (`docs/nvfp4.md`): a tensor scale, blocks
scaled to 4 or 6, a smoothed V, any mask, grouped heads, an LSE. Quantisers are exact to the bit, attention to float32
summation order. Like `reference.py` it runs on any JAX backend, with O(T·S) memory.

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N/K, H head dimension, Hp = H padded,
Sp = S padded to a multiple of 64, T128 = ceil(T/128).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sage_jax import fp4_formats as fp4
from sage_jax import masking
from sage_jax import quantization as qz
from sage_jax.fp4_formats import Blocks
from sage_jax.exponentials import exp2_below
from sage_jax.masking import TILE, Masks
from sage_jax.recipe import padded_head_dim
from sage_jax.reference import (
    F32,
    LN2,
    LOG2E,
    _by_head,
    _dot,
    _group,
    _heads_first,
    _products,
    _tiles,
    _tokens_first,
    _ungroup,
)

Q_TILE = 128  # queries that share a mean and a tensor scale (SageAttention3, section 3.2)
P_TOP = np.float32(448.0 * 6.0)  # a row's largest probability: the largest number that nvfp4 holds


class FP4KeysValues(NamedTuple):
    """Keys and values in FP4.

    Attributes:
      k, v: `Blocks` of K′ = K − k_mean [B, K, S, Hp], blocks along channels; of (V − v_mean)ᵀ [B, K, Hp, Sp], blocks along
        tokens. Both divided by their tensor's scale. The first scale of a token with a NaN or Inf is NaN in k.
      k_tensor, v_tensor: float32 [B, K], powers of two.
      k_mean, v_mean: float32 [B, K, Hp], representable in bf16; 0 where not smoothed.
    """

    k: Blocks
    k_tensor: jax.Array
    k_mean: jax.Array
    v: Blocks
    v_tensor: jax.Array
    v_mean: jax.Array


class FP4Queries(NamedTuple):
    """Queries in FP4.

    Attributes:
      q: `Blocks` of Q − mean [B, N, T, Hp], blocks along channels. The first scale of a token with a NaN or Inf is NaN.
      q_tensor: float32 [B, N, T128], powers of two.
      delta: float32 [B, N, T128, S]: ΔS, the product of the mean with K′ in units of the FP4 product.
      lse_shift: float32 [B, N, T]: what smoothing K took from the LSE.
    """

    q: Blocks
    q_tensor: jax.Array
    delta: jax.Array
    lse_shift: jax.Array


# ---------------------------------------------------------------------------------------- quantization


def quantize_kv(k, v, bounds, *, fmt, four_or_six, smooth_k, smooth_v) -> FP4KeysValues:
    """Quantizes keys and values.

    Args:
      k, v: [B, S, K, H], bf16, f16 or f32; bounds: int32 [B, 3].
      fmt: "nvfp4" | "mxfp4" | "amxfp4"; four_or_six: choose each block's maximum; smooth_k, smooth_v: subtract the mean
        over valid, finite tokens (of V in channels where it is at least 1/256 of the largest |v|).
    """
    k, v = _heads_first(k), _heads_first(v)
    valid = _valid(bounds[:, 1], k.shape[2])
    finite = jnp.all(jnp.isfinite(k) & jnp.isfinite(v), axis=-1)
    used = valid & finite
    k, k_mean = _smoothed(k, used, smooth_k)
    v, v_mean = _smoothed(v, used, smooth_v, functools.partial(qz.without_small, times=256.0))
    k, k_tensor = _tensor_scaled(k)
    v, v_tensor = _tensor_scaled(v)
    turned = jnp.swapaxes(qz.pad_axis(v, 2, TILE), -1, -2)
    return FP4KeysValues(
        _marked(fp4.quantize(k, fmt, four_or_six), valid & ~finite),
        k_tensor,
        k_mean,
        fp4.quantize(turned, fmt, four_or_six),
        v_tensor,
        v_mean,
    )


def quantize_q(q, k, k_mean, k_tensor, bounds, *, fmt, four_or_six, smooth_q, scale) -> FP4Queries:
    """Quantizes queries and computes ΔS, for which K is needed once more in its own precision.

    Args:
      q: [B, T, N, H]; k: [B, S, K, H]; k_mean [B, K, Hp], k_tensor [B, K]: of `quantize_kv`; bounds: int32 [B, 3].
      fmt, four_or_six: as in `quantize_kv`; smooth_q: subtract each 128 queries' mean; scale: the softmax scale.
    """
    q, k = _heads_first(q), _heads_first(k)
    tokens, kv_heads = q.shape[2], k.shape[1]
    valid = _valid(bounds[:, 0], tokens)
    finite = jnp.all(jnp.isfinite(q), axis=-1)
    q = jnp.where((valid & finite)[..., None], q, 0.0)
    shift = _ungroup(_dot("bkgth,bkh->bkgt", _group(q, kv_heads), k_mean)) * F32(scale)
    shift = jnp.where(valid & ~finite, jnp.nan, shift)

    blocks = _query_blocks(q)  # [B, N, T128, 128, Hp]
    blocks, mean = _smoothed(blocks, _query_blocks((valid & finite)[..., None])[..., 0], smooth_q)
    least = jnp.max(jnp.abs(mean), axis=-1) * F32(fp4.MEAN_FLOOR)  # ΔS = mean · K′ᵀ is in units of this scale too
    blocks, q_tensor = _tensor_scaled(blocks, least)
    codes = blocks.reshape(*q.shape[:2], -1, q.shape[3])[:, :, :tokens]

    used = _valid(bounds[:, 1], k.shape[2]) & jnp.all(jnp.isfinite(k), axis=-1)
    keys = jnp.where(used[..., None], k - k_mean[:, :, None], 0.0)
    keys = keys * _inverse_power(k_tensor)[..., None, None]
    mean = _group(mean * _inverse_power(q_tensor)[..., None], kv_heads)
    return FP4Queries(
        _marked(fp4.quantize(codes, fmt, four_or_six), valid & ~finite),
        q_tensor,
        _ungroup(_dot("bkguh,bksh->bkgus", mean, keys)),
        shift,
    )


def _valid(count, tokens):
    """bool [B, 1, tokens]: the first count[b] tokens of row b."""
    return (jnp.arange(tokens)[None] < count[:, None])[:, None, :]


def _query_blocks(x):
    """[B, N, T, ...] -> [B, N, T128, 128, ...], zero-padded."""
    x = qz.pad_axis(x, 2, Q_TILE)
    return x.reshape(*x.shape[:2], x.shape[2] // Q_TILE, Q_TILE, *x.shape[3:])


def _smoothed(x, used, smooth, choose=lambda mean, x: mean):
    """(x − mean, mean) over the used tokens of axis -2; unused tokens become zeros, and the mean 0 unless smooth, or where
    choose(mean, x) makes it so.
    """
    x = jnp.where(used[..., None], x, 0.0)
    if not smooth:
        return x, jnp.zeros_like(x[..., 0, :])
    count = jnp.maximum(jnp.sum(used, axis=-1, dtype=jnp.int32), 1)
    mean = choose(qz.token_mean(x, count), x)
    return jnp.where(used[..., None], x - mean[..., None, :], 0.0), mean


def _tensor_scaled(x, least=0.0):
    """(x / scale, scale) of float32 [..., tokens, Hp], scale [...] a power of two, for a magnitude of `least` or more."""
    scale, inverse = fp4.tensor_scale(jnp.maximum(jnp.max(jnp.abs(x), axis=(-2, -1), initial=0.0), least))
    return x * inverse[..., None, None], scale


def _inverse_power(scale):
    """1/scale of a power of two, 0 for 0."""
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


def _marked(blocks, bad):
    """The first scale of bad tokens [B, heads, tokens] made NaN: a matrix unit then makes all its scores NaN."""
    first = jnp.where(bad, jnp.nan, blocks.scale[..., 0].astype(F32))
    return blocks._replace(scale=blocks.scale.at[..., 0].set(first.astype(blocks.scale.dtype)))


# ------------------------------------------------------------------------------------------- attention


def attend(
    qq: FP4Queries,
    kv: FP4KeysValues,
    masks: Masks,
    *,
    fmt,
    scale,
    window_left,
    window_right,
    head_dim,
    out_dtype,
):
    """Attention over FP4 operands.

    Returns:
      out [B, T, N, H] in out_dtype, lse float32 [B, N, T] (natural logarithm, of the unsmoothed logits). A row that sees
      nothing: zeros and −inf. A row that has, or sees, a token with a NaN or Inf: NaN.
    """
    s, poisoned = _scores(qq, kv, masks, fmt, scale, window_left, window_right)
    m = jnp.max(s, axis=-1, initial=-jnp.inf)
    l = jnp.sum(exp2_below(s, m[..., None]), axis=-1)
    accumulated = _probabilities_times_values(s, m, kv, fmt)
    # rows of E/l sum to one, so the mean that V lost comes back as it is
    out = accumulated / jnp.where(l == 0, 1.0, l)[..., None] + kv.v_mean[:, :, None, None, :]
    out = jnp.where((l == 0)[..., None], 0.0, out)
    lse = jnp.where(l == 0, -jnp.inf, (m + jnp.log2(l)) * LN2 + _group(qq.lse_shift, s.shape[1]))
    out = jnp.where(poisoned[..., None], jnp.nan, out)
    lse = jnp.where(poisoned, jnp.nan, lse)
    return _tokens_first(_ungroup(out), head_dim, out_dtype), _ungroup(lse)


def _scores(qq, kv, masks, fmt, scale, window_left, window_right):
    """Scores in the log2 domain [B, K, G, T, S], −inf where not visible, and bool [B, K, G, T] `poisoned`."""
    kv_heads, tokens, keys = kv.k.codes.shape[1], qq.q.codes.shape[2], kv.k.codes.shape[2]
    bad_query, bad_key = (jnp.isnan(x.scale[..., 0].astype(F32)) for x in (qq.q, kv.k))
    queries = jnp.where(bad_query[..., None], 0.0, fp4.dequantize(qq.q, fmt))
    products = _dot(
        "bkgth,bksh->bkgts",
        _group(queries, kv_heads),
        jnp.where(bad_key[..., None], 0.0, fp4.dequantize(kv.k, fmt)),
    )
    products = products + _group(_each_query(qq.delta, tokens), kv_heads)
    row = _group(_each_query(qq.q_tensor, tokens), kv_heads) * (F32(scale) * LOG2E)
    s = products * (row * kv.k_tensor[:, :, None, None])[..., None]
    if masks.bias.size:
        s = s + _by_head(masks.bias.astype(F32), kv_heads) * LOG2E

    seen = _by_head(masking.visible(masks, tokens, keys, window_left, window_right), kv_heads)
    bad = bad_key[:, :, None, None, :]
    poisoned = jnp.any(seen & bad, axis=-1)
    poisoned |= _group(bad_query, kv_heads) & jnp.any(seen, axis=-1)
    return jnp.where(seen & ~bad, s, -jnp.inf), poisoned


def _each_query(x, tokens):
    """[B, N, T128, ...] -> [B, N, T, ...]: each block's entry repeated for its 128 queries."""
    return jnp.repeat(x, Q_TILE, axis=2)[:, :, :tokens]


def _probabilities_times_values(s, m, kv, fmt):
    """Σ_j E_ij V_j with P and V in FP4, dequantized but not divided by l: float32 [B, K, G, T, Hp].

    Two levels (SageAttention3, section 3.3): relative to the row's maximum so far, μ, probabilities are at most 1; times
    448·6 they are blocks of 16 keys whose scales use the whole range of e4m3. Each tile of 64 keys weighs 2^(μ − m).
    """
    missing = -s.shape[-1] % TILE
    s = jnp.pad(s, ((0, 0),) * 4 + ((0, missing),), constant_values=-jnp.inf)
    s = _tiles(s, 4)  # [B, K, G, T, tiles, 64]
    top = lax.cummax(jnp.max(s, axis=-1), axis=4)
    weight = exp2_below(top, m[..., None]) / P_TOP * kv.v_tensor[:, :, None, None, None]
    p = fp4.scaled(*fp4.rounded(exp2_below(s, top[..., None]) * P_TOP, fmt), fmt)
    v = jnp.swapaxes(fp4.dequantize(kv.v, fmt), -1, -2)
    return jnp.sum(_products(p, _tiles(v, 2)) * weight[..., None], axis=4)


# ------------------------------------------------------------------------------------------ operations

LAYOUTS = {  # operands, results: see _batching.py
    "quantize_kv_fp4": ("B.K. B.K. B.", "BK.. BK.. BK BK. BK.. BK.. BK BK."),
    "quantize_q_fp4": ("B.N. B.K. BK. BK B.", "BN.. BN.. BN. BN.. BN."),
    "attend_fp4": (
        "BN.. BN.. BN. BN.. BN. BK.. BK.. BK BK.. BK.. BK BK. B. B. B. bn.. bn..",
        "B.N. BN.",
    ),
}


def operation(name, settings, *operands):
    """An operation of `docs/nvfp4.md` on its operands, a tuple of its results.

    Args:
      settings: `_ffi.Settings`.
    """
    recipe = settings.recipe
    rounding = {"fmt": recipe.qk, "four_or_six": recipe.four_or_six}
    if name == "quantize_kv_fp4":
        smooth = {"smooth_k": recipe.smooth_k, "smooth_v": recipe.smooth_v}
        return tuple(jax.tree.leaves(quantize_kv(*operands, **rounding, **smooth)))
    if name == "quantize_q_fp4":
        queries = quantize_q(*operands, **rounding, smooth_q=recipe.smooth_q, scale=settings.scale)
        return tuple(jax.tree.leaves(queries))
    q4, q_scale, *queries, k4, k_scale, k_tensor, v4, v_scale, v_tensor, v_mean = operands[:-5]
    keys_values = FP4KeysValues(
        Blocks(k4, k_scale), k_tensor, None, Blocks(v4, v_scale), v_tensor, v_mean
    )
    tokens, keys = q4.shape[2], k4.shape[2]
    return attend(
        FP4Queries(Blocks(q4, q_scale), *queries),
        keys_values,
        masking.of_pairs(Masks(*operands[-5:]), settings.mask_tile, tokens, keys),
        fmt=recipe.qk,
        scale=settings.scale,
        window_left=settings.window_left,
        window_right=settings.window_right,
        head_dim=settings.head_dim,
        out_dtype=settings.dtype,
    )


def result_types(name, operands, fmt, head_dim, dtype):
    """Shapes and dtypes of an operation's results."""
    padded = padded_head_dim(head_dim)

    def blocks(*shape):
        """Codes and scales of a quantized [..., L]."""
        block, scale_dtype, scales = fp4.FORMATS[fmt]
        rows, length = shape[:-1], shape[-1]
        scale = (*rows, length // block * scales)
        return ((*rows, length // 2), jnp.uint8), (scale, scale_dtype)

    B, T, N = operands[0].shape[:3]
    if name == "quantize_kv_fp4":
        S, K = T, N
        tensor, mean = ((B, K), F32), ((B, K, padded), F32)
        keys, values = blocks(B, K, S, padded), blocks(B, K, padded, masking.tiles(S) * TILE)
        return (*keys, tensor, mean, *values, tensor, mean)
    if name == "quantize_q_fp4":
        tiles, keys = -(-T // Q_TILE), operands[1].shape[1]
        rows = ((B, N, tiles), F32), ((B, N, tiles, keys), F32), ((B, N, T), F32)
        return (*blocks(B, N, T, padded), *rows)
    B, N, T = operands[0].shape[:3]
    return ((B, T, N, head_dim), dtype), ((B, N, T), F32)
