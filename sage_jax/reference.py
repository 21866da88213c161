"""The executable specification: every recipe's forward and backward pass in plain jnp, one function a step.

This file defines what the native code must compute (`docs/abi.md` says the same in words): quantisers bit for bit,
attention within float32 summation order. It is also the `implementation="reference"` that runs on any JAX backend, with
O(T·S) memory. Sources: SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958), SageAttention2++ (2505.21136),
SageBwd (2505.11594, section 4; 2603.02170); `train8` is ours (docs/numerics.md).

Letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N/K, H head dimension, Hp = H padded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sage_jax import masking
from sage_jax import quantization as qz
from sage_jax.exponentials import bounded_references, exp2_below, exponentials
from sage_jax.masking import TILE
from sage_jax.quantization import QuantizedKV, QuantizedQ
from sage_jax.recipe import padded_head_dim

LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
BOUNDED_P_SCALE = np.float32(64.0)
P_SCALE = np.float32(256.0)  # E ≤ 1 and |G| ≤ 1.75 stay within e4m3's 448
INV127 = np.float32(1.0 / 127.0)
F32 = jnp.float32


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, S, K, H] of any float dtype -> float32 [B, K, S, Hp], zero-padded channels."""
    x = jnp.swapaxes(x.astype(F32), 1, 2)
    return jnp.pad(x, ((0, 0),) * 3 + ((0, padded_head_dim(x.shape[-1]) - x.shape[-1]),))


def _tokens_first(x: jax.Array, head_dim: int, dtype) -> jax.Array:
    """float32 [B, N, T, Hp] -> [B, T, N, H] in dtype."""
    return jnp.swapaxes(x[..., :head_dim], 1, 2).astype(dtype)


def _group(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, N, ...] -> [B, K, G, ...]"""
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, *x.shape[2:])


def _ungroup(x: jax.Array) -> jax.Array:
    """[B, K, G, ...] -> [B, N, ...]"""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum in float32 with float32 products."""
    return jnp.einsum(spec, a.astype(F32), b.astype(F32), precision=lax.Precision.HIGHEST)


def _int8_dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of INT8 codes. Float32 holds every sum exactly: 256 · 128² < 2^24."""
    return _dot(spec, a, b)


# ---------------------------------------------------------------------------------------------- quantization


def quantize_kv(k, v, bounds, *, pv, v_range, smooth_k, smooth_v, dp) -> QuantizedKV:
    """Quantizes keys and values (`docs/abi.md`, section 1).

    Args:
      k, v: [B, S, K, H], bf16, f16 or f32.
      bounds: int32 [B, 3].
      pv: "e4m3" | "f16" | "bf16" | "int8"; v_range: largest |code| of an e4m3 V; smooth_k: subtract K's token mean.
      smooth_v: subtract V's token mean (SageAttention2, arXiv 2411.10958) from an e4m3 `v_pv` and from `v_dp`, in channels
        where it is at least 1/8 of the largest |v|. Both means are those of a sample (`quantization.sample_tokens`).
      dp: None | "int8" | "bf16": the format in which V is kept for dO·Vᵀ.
    """
    tokens = k.shape[1]
    k, v = _heads_first(k), _heads_first(v)
    count = jnp.clip(bounds[:, 1], 0, tokens)
    valid = (jnp.arange(tokens)[None] < count[:, None])[:, None, :]
    bad = valid & ~jnp.all(jnp.isfinite(k) & jnp.isfinite(v), axis=-1)
    used = (valid & ~bad)[..., None]

    v_rows, v_counts = qz.take_sample(v, count, qz.SAMPLED_VALUES)
    zero = jnp.zeros_like(v_rows[:, :, 0])
    k_mean = qz.sample_mean(*qz.take_sample(k, count, qz.SAMPLED_KEYS)) if smooth_k else zero
    v_mean = qz.sample_mean(v_rows, v_counts) if smooth_v else zero
    v_mean = qz.without_small(v_mean, v_rows, qz.SMALL_MEAN)

    k, v = jnp.where(used, k, 0.0), jnp.where(used, v, 0.0)
    deviations = jnp.where(used, v - v_mean[..., None, :], 0.0)
    smoothed = jnp.where(used, k - k_mean[..., None, :], 0.0)
    k_scale, inverse = qz.scale_and_inverse(qz.group_amax(smoothed, 2, TILE), 127.0)
    k8 = qz.int8_codes(smoothed, qz.expand_tiles(inverse, tokens)[..., None])
    k8 = k8.at[..., 0].set(jnp.where(bad, jnp.int8(qz.BAD_CODE), k8[..., 0]))
    bad_tile = jnp.any(_tiles(bad, 2), axis=-1)
    negated = jnp.where(k_scale == 0, qz.BAD_ZERO_SCALE, -k_scale)
    k_scale = jnp.where(bad_tile, negated, k_scale)

    sample = jnp.where(v_counts[..., None], v_rows - v_mean[..., None, :], 0.0)
    for_pv, sample = (deviations, sample) if pv == "e4m3" else (v, v_rows)
    v_pv, v_scale = _values_for_pv(for_pv, qz.scaled_for(for_pv, sample, count), pv, v_range)
    v_dp, v_dp_scale = _values_for_dp(deviations, dp)
    kv = QuantizedKV(k8, k_scale, k_mean, v_pv, v_scale, v_mean, v_dp, v_dp_scale, *[jnp.zeros((0,), F32)] * 2)
    if dp is None:
        return kv
    k_max = jnp.max(jnp.abs(qz.dequantized_keys(kv)), axis=2, initial=0.0)
    return kv._replace(k_max=k_max, v_norm=qz.largest_norm(kv, dp))


def _int8_tiles(x):
    """float32 [B, K, S, Hp] -> int8 codes and float32 [B, K, S64] scales of groups of 64 tokens × all channels."""
    scale, inverse = qz.scale_and_inverse(qz.group_amax(x, 2, TILE), 127.0)
    return qz.int8_codes(x, qz.expand_tiles(inverse, x.shape[2])[..., None]), scale


def _values_for_pv(v, amax, pv, v_range):
    if pv == "bf16":
        return v.astype(jnp.bfloat16), jnp.ones_like(v[..., 0, :])
    if pv == "int8":
        codes, scale = _int8_tiles(v)
        return qz.transpose_tokens(codes), scale
    if pv == "f16":
        scale, inverse = qz.power_of_two_below(amax)
        return (v * inverse[..., None, :]).astype(jnp.float16), scale
    scale, inverse = qz.scale_and_inverse(amax, v_range)
    rounded = qz.round_e4m3(v * inverse[..., None, :])
    return qz.transpose_tokens(rounded).astype(jnp.float8_e4m3fn), scale


def _values_for_dp(v, dp):
    if dp == "int8":
        return _int8_tiles(v)
    if dp == "bf16":
        return v.astype(jnp.bfloat16), jnp.zeros((0,), F32)
    return jnp.zeros((0,), jnp.int8), jnp.zeros((0,), F32)


def quantize_q(q, k_mean, bounds, *, q_block, scale) -> QuantizedQ:
    """Quantizes queries and computes what smoothing took from the LSE (`docs/abi.md`, section 2).

    Args:
      q: [B, T, N, H]; k_mean: float32 [B, K, Hp]; bounds: int32 [B, 3].
      q_block: tokens that share a scale; scale: the softmax scale.
    """
    tokens = q.shape[1]
    q = _heads_first(q)
    valid = (jnp.arange(tokens)[None] < bounds[:, 0, None])[:, None, :]
    finite = jnp.all(jnp.isfinite(q), axis=-1)
    q = jnp.where((valid & finite)[..., None], q, 0.0)
    amax = jnp.repeat(qz.group_amax(q, 2, q_block), q_block, axis=-1)[..., :tokens]
    q_scale, inverse = qz.scale_and_inverse(amax, 127.0)
    q8 = qz.int8_codes(q, inverse[..., None])
    shift = _ungroup(_dot("bkgth,bkh->bkgt", _group(q, k_mean.shape[1]), k_mean))
    poison = jnp.where(valid & ~finite, jnp.nan, 0.0)
    q_scale = jnp.where(valid, q_scale, 0.0) + poison
    return QuantizedQ(q8, q_scale.astype(F32), shift * np.float32(scale) + poison)


# --------------------------------------------------------------------------------------------------- forward


def _scores(qq, kv, masks, scale, window_left, window_right):
    """Scores in the log2 domain and who sees whom.

    Returns float32 s [B, K, G, T, S] (−inf where not visible), and bool [B, 1|K, 1|G, T, S] `seen`, and bool [B, K, G, T]
    `poisoned`: rows that see a key with a NaN or Inf.
    """
    kv_heads, tokens, keys = kv.k8.shape[1], qq.q8.shape[2], kv.k8.shape[2]
    q8 = _group(qq.q8, kv_heads)
    products = _int8_dot("bkgth,bksh->bkgts", q8, kv.k8)
    row = _group(qq.q_scale, kv_heads) * (np.float32(scale) * LOG2E)
    column = qz.expand_tiles(jnp.abs(kv.k_scale), keys)
    s = products * (row[..., None] * column[:, :, None, None, :])
    if masks.bias.size:
        s = s + _by_head(masks.bias.astype(F32), kv_heads) * LOG2E

    seen = _by_head(masking.visible(masks, tokens, keys, window_left, window_right), kv_heads)
    bad_tile = qz.expand_tiles(kv.k_scale < 0, keys)
    bad = ((kv.k8[..., 0] == qz.BAD_CODE) & bad_tile)[:, :, None, None, :]
    poisoned = jnp.any(seen & bad, axis=-1)
    poisoned |= jnp.isnan(_group(qq.q_scale, kv_heads)) & jnp.any(seen, axis=-1)
    seen = seen & ~bad
    return jnp.where(seen, s, -jnp.inf), seen, poisoned


def _by_head(x, kv_heads):
    """[B|1, N|1, T|1, S|1] -> [B|1, K|1, G|1, T|1, S|1]"""
    return x[:, :, None] if x.shape[1] == 1 else _group(x, kv_heads)


def attend(
    qq, kv, masks, *, pv, f16_accumulate, scale, window_left, window_right, head_dim, out_dtype, key_tile=TILE,
    bounded=False, interpolated=False,
):  # fmt: skip
    """Attention over quantized operands (`docs/abi.md`, section 3).

    Args:
      key_tile: keys, a multiple of 64, after which a kernel looks for a new running maximum. Every value follows the
        contract; kernels are compared with the specification at their own.
      bounded: as in the kernel of sm_90 for e4m3, whose sums have 16 bits: probabilities take a factor of 64, not 256,
        and references rise above running maxima where they add up to much (`exponentials.bounded_references`).
      interpolated: with key_tile 128 and `bounded`, as in that kernel where it quantizes queries itself and gives `out` alone:
        exponentials of the second 64 of 128 keys are interpolated (`exponentials.interpolated_exp2`), and l is their sum.

    Returns:
      out [B, T, N, H] in out_dtype; lse, m, l: float32 [B, N, T].
    """
    kv_heads = kv.k8.shape[1]
    s, seen, poisoned = _scores(qq, kv, masks, scale, window_left, window_right)
    m = jnp.max(s, axis=-1, initial=-jnp.inf)
    accumulated, l = _probabilities_times_values(s, m, kv, pv, f16_accumulate, key_tile // TILE, bounded, interpolated)
    if not interpolated:
        l = jnp.sum(exp2_below(s, m[..., None]), axis=-1)
    out = accumulated / jnp.where(l == 0, 1.0, l)[..., None]
    if pv == "e4m3":
        out = out + jnp.where(l[..., None] == 0, 0.0, kv.v_mean[:, :, None, None, :])
    l = jnp.where(poisoned, jnp.nan, l)
    out = jnp.where(poisoned[..., None], jnp.nan, out)
    lse = jnp.where(l == 0, -jnp.inf, (m + jnp.log2(l)) * LN2 + _group(qq.lse_shift, kv_heads))
    out = _tokens_first(_ungroup(out), head_dim, out_dtype)
    return out, _ungroup(lse), _ungroup(m), _ungroup(l)


def _probabilities_times_values(s, m, kv, pv, f16_accumulate, at_once, bounded, interpolated):
    """Σ_j P_ij V_j with the recipe's formats, dequantized but not divided by l, and Σ_j E_ij: float32 [B, K, G, T, Hp] and [B, K, G, T].

    Probabilities of `at_once` tiles of 64 keys are rounded relative to the row's maximum so far (int8: to the tile's own
    maximum) and the tile's products weighed by 2^(that maximum − m), as an online softmax does.
    """
    missing = -s.shape[-1] % TILE
    s = jnp.pad(s, ((0, 0),) * 4 + ((0, missing),), constant_values=-jnp.inf)
    s = _tiles(s, 4)  # [B, K, G, T, tiles, 64]
    top = jnp.max(s, axis=-1)
    if pv != "int8":
        number = top.shape[4]
        last = np.minimum(np.arange(number) // at_once * at_once + at_once, number) - 1
        top = lax.cummax(top, axis=4)[..., last]
        top = bounded_references(s, top, at_once, interpolated) if bounded else top
    weight = exp2_below(top, m[..., None])
    second_of_two = np.arange(s.shape[4])[:, None] % 2 == 1
    e = exponentials(s, top[..., None], interpolated & second_of_two)
    l = jnp.sum(jnp.sum(e, axis=-1) * weight, axis=4)
    if pv in ("f16", "bf16"):
        p, v = e.astype(kv.v_pv.dtype), kv.v_pv
    elif pv == "int8":
        p, v = jnp.round(127.0 * e), _untransposed(kv)
        weight = weight * INV127 * kv.v_scale[:, :, None, None, :]
    else:
        p_scale = BOUNDED_P_SCALE if bounded else P_SCALE
        p, v = qz.round_e4m3(e * p_scale), _untransposed(kv)
        weight = weight / p_scale
    tiles = _half_precision_products if f16_accumulate else _products
    out = jnp.sum(tiles(p, _tiles(v, 2)) * weight[..., None], axis=4)
    return out if pv == "int8" else out * kv.v_scale[:, :, None, None, :], l


def _untransposed(kv):
    return qz.untranspose_tokens(kv.v_pv.astype(F32), kv.k8.shape[2])


def _tiles(x, axis):
    """Splits `axis` into [tiles, 64], zero-padded."""
    x = qz.pad_axis(x, axis, TILE)
    return x.reshape(*x.shape[:axis], x.shape[axis] // TILE, TILE, *x.shape[axis + 1 :])


def _products(p, v):
    """Each tile's P·V: [B, K, G, T, tiles, 64] · [B, K, tiles, 64, Hp] -> [B, K, G, T, tiles, Hp]."""
    return _dot("bkgtns,bknsh->bkgtnh", p, v)


def _half_precision_products(p, v):
    """The same with half-precision accumulators: f16(f16(first 32 keys) + second 32 keys)."""
    half = lambda x: lax.reduce_precision(x, 5, 10)  # noqa: E731
    first = half(_products(p[..., :32], v[..., :32, :]))
    return half(first + _products(p[..., 32:], v[..., 32:, :]))


# -------------------------------------------------------------------------------------------------- backward


def attend_backward(
    qq, kv, m, l, out, dout, dlse, masks, *, backward, dp, exact_delta, scale, window_left, window_right, dtypes,
    with_dlogits=False,
):  # fmt: skip
    """Gradients of `attend` (`docs/abi.md`, section 4).

    Args:
      qq, kv: of the forward pass; v_pv, v_scale and lse_shift are not used.
      m, l, dlse: float32 [B, N, T]; out, dout: [B, T, N, H].
      backward: "train8" | "sagebwd"; dp: "int8" | "bf16"; dtypes: of (dq, dk, dv).

    Returns:
      dq [B, T, N, H], dk and dv [B, S, K, H], dlogits float32 [B, N, T, S], or [0, 0, 0, 0] unless with_dlogits.
    """
    head_dim, kv_heads = out.shape[-1], kv.k8.shape[1]
    group = lambda x: _group(x, kv_heads)  # noqa: E731
    m, l, dlse = group(m), group(l), group(dlse)
    out, dout = group(_heads_first(out)), group(_heads_first(dout))
    live = l != 0
    sound = jnp.isfinite(l + dlse) & jnp.all(jnp.isfinite(dout) & jnp.isfinite(out), axis=-1)
    poisoned = live & ~sound
    live &= sound
    inverse_l = jnp.where(live, 1.0 / jnp.where(live, l, 1.0), 0.0)
    dout, out = (jnp.where(live[..., None], x, 0.0) for x in (dout, out))
    dlse = jnp.where(live, dlse, 0.0)

    s, seen, _ = _scores(qq, kv, masks, scale, window_left, window_right)
    s = jnp.where(live[..., None], s, -jnp.inf)
    e = exp2_below(s, m[..., None])
    d_p = _dout_times_values(dout, kv, dp)
    if exact_delta:
        delta = jnp.sum(e * d_p, axis=-1) * inverse_l - dlse
    else:
        delta = jnp.sum(dout * (out - kv.v_mean[:, :, None, None, :]), axis=-1) - dlse

    if backward == "train8":
        dq, dk, dv = _train8(qq, kv, e, d_p, delta, dout, dlse, inverse_l, scale)
    else:
        dq, dk, dv = _sagebwd(qq, kv, e, d_p, delta, dout, inverse_l, scale)
    dq = dq + np.float32(scale) * dlse[..., None] * kv.k_mean[:, :, None, None, :]
    spoiled = poisoned[..., None] & seen
    dq = jnp.where(poisoned[..., None], jnp.nan, dq)
    dk, dv = (jnp.where(jnp.any(spoiled, axis=(2, 3))[..., None], jnp.nan, x) for x in (dk, dv))

    dlogits = jnp.zeros((0, 0, 0, 0), F32)
    if with_dlogits:
        dlogits = e * (d_p - delta[..., None]) * inverse_l[..., None]
        dlogits = _ungroup(jnp.where(spoiled, jnp.nan, dlogits))
    gradients = zip((_ungroup(dq), dk, dv), dtypes, strict=True)
    return *(_tokens_first(x, head_dim, dtype) for x, dtype in gradients), dlogits


def _token_codes(x):
    """INT8 codes and scale per token of float32 [..., T, Hp]."""
    scale, inverse = qz.scale_and_inverse(jnp.max(jnp.abs(x), axis=-1), 127.0)
    return qz.int8_codes(x, inverse[..., None]), scale


def _dout_times_values(dout, kv, dp):
    """dP [B, K, G, T, S] = dO·Vᵀ, with INT8 operands (dO per token, V per 64 tokens) or bf16 ones."""
    if dp == "bf16":
        return _dot("bkgth,bksh->bkgts", dout.astype(jnp.bfloat16), kv.v_dp)
    codes, scale = _token_codes(dout)
    products = _int8_dot("bkgth,bksh->bkgts", codes, kv.v_dp)
    column = qz.expand_tiles(kv.v_dp_scale, products.shape[-1])
    return products * (scale[..., None] * column[:, :, None, None, :])


def _e4m3_channels(x, axes):
    """e4m3 values (as float32) and scale per channel, the maximum running over `axes`."""
    amax = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    scale, inverse = qz.scale_and_inverse(amax, qz.E4M3_MAX)
    return qz.round_e4m3(x * inverse), scale


def _train8(qq, kv, e, d_p, delta, dout, dlse, inverse_l, scale):
    """All products in 8 bits, every scale known before the loop (docs/numerics.md)."""
    kv_heads = kv.k8.shape[1]
    v_norm = kv.v_norm[:, :, None, None]
    r = np.float32(8.0 / 7.0) * qz.row_norm(dout) * v_norm + jnp.abs(dlse)
    nothing = r < np.float32(2.0**-100)  # 1/r could overflow: such rows carry no gradient
    inverse_r = jnp.where(nothing, 0.0, 1.0 / jnp.where(nothing, 1.0, r))

    q_scale = jnp.where(jnp.isnan(qq.q_scale), 0.0, qq.q_scale)
    queries = _group(qq.q8.astype(F32) * q_scale[..., None], kv_heads)
    x, x_scale = _e4m3_channels(dout * inverse_l[..., None], (2, 3))
    y, y_scale = _e4m3_channels(queries * (r * inverse_l)[..., None], (2, 3))
    z_scale, inverse = qz.scale_and_inverse(kv.k_max[:, :, None], qz.E4M3_MAX)
    z = qz.round_e4m3(qz.dequantized_keys(kv) * inverse)

    p = qz.round_e4m3(e * P_SCALE)
    g = qz.round_e4m3(e * (d_p - delta[..., None]) * (P_SCALE * inverse_r)[..., None])
    dv = _dot("bkgts,bkgth->bksh", p, x) / P_SCALE * x_scale[:, :, 0]
    dk = _dot("bkgts,bkgth->bksh", g, y) * (np.float32(scale) / P_SCALE) * y_scale[:, :, 0]
    rows = np.float32(scale) / P_SCALE * r * inverse_l
    dq = _dot("bkgts,bksh->bkgth", g, z) * rows[..., None] * z_scale[:, :, None]
    return dq, dk, dv


def _int8_squares(x):
    """INT8 codes (as float32) and scale [..., T/64, S/64] of tiles of 64 × 64 over the last two axes; both zero-padded."""
    x = qz.pad_axis(qz.pad_axis(x, x.ndim - 2, TILE), x.ndim - 1, TILE)
    x = x.reshape(*x.shape[:-2], x.shape[-2] // TILE, TILE, x.shape[-1] // TILE, TILE)
    scale, inverse = qz.scale_and_inverse(jnp.max(jnp.abs(x), axis=(-3, -1)), 127.0)
    return qz.int8_codes(x, inverse[..., :, None, :, None]).astype(F32), scale


def _sagebwd(qq, kv, e, d_p, delta, dout, inverse_l, scale):
    """The papers' backward pass: P and dS in INT8 per 64 × 64 tile, dO per 64 tokens, dO·Vᵀ in 16 bits."""
    kv_heads, queries, keys = kv.k8.shape[1], dout.shape[3], kv.k8.shape[2]
    probabilities = e * inverse_l[..., None]
    d_s = probabilities * (d_p - delta[..., None])
    p8, p_scale = _int8_squares(probabilities)
    s8, s_scale = _int8_squares(d_s)
    do_scale, inverse = qz.scale_and_inverse(qz.group_amax(dout, 3, TILE), 127.0)
    do8 = qz.int8_codes(dout, qz.expand_tiles(inverse, queries)[..., None])
    q8 = _group(qq.q8, kv_heads)
    k8 = jnp.where((kv.k8[..., 0] == qz.BAD_CODE)[..., None], 0, kv.k8)
    q_scale = jnp.where(jnp.isnan(qq.q_scale), 0.0, qq.q_scale)
    q_scale = jnp.max(_tiles(_group(q_scale, kv_heads), 3), axis=-1)  # one value a tile

    tiles = lambda x, axis: _tiles(x.astype(F32), axis)  # noqa: E731
    dv = jnp.einsum("bkguivj,bkguih,bkguv->bkvjh", p8, tiles(do8, 3), p_scale * do_scale[..., None])
    dk = jnp.einsum("bkguivj,bkguih,bkguv->bkvjh", s8, tiles(q8, 3), s_scale * q_scale[..., None])
    weight = s_scale * jnp.abs(kv.k_scale)[:, :, None, None, :]
    dq = jnp.einsum("bkguivj,bkvjh,bkguv->bkguih", s8, tiles(k8, 2), weight)
    merge = lambda x, axis, n: lax.slice_in_dim(  # noqa: E731
        x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), 0, n, axis=axis
    )
    c = np.float32(scale)
    return c * merge(dq, 3, queries), c * merge(dk, 2, keys), merge(dv, 2, keys)


# ----------------------------------------------------------------------------------------------------- exact


@jax.custom_jvp
def _nan_derivative(x, where):
    """x, with the derivative NaN where bool `where`, broadcastable to x, is True, and 1 elsewhere."""
    return x


@_nan_derivative.defjvp
def _(primals, tangents):
    x, where = primals
    return x, tangents[0] * jnp.where(where, jnp.nan, 1.0)


def exact_attention(q, k, v, masks, *, scale, window_left, window_right):
    """Attention in float32 under the same masks, differentiable by JAX: what the recipes are measured against.

    A NaN or Inf makes NaN of its query's row, or of the rows that see its key or value, and of the derivatives by what
    such a row sees, and of nothing else. The derivatives by the bad key and its value themselves are 0.

    Returns:
      out float32 [B, T, N, H], lse float32 [B, N, T] (natural logarithm; −inf for rows that see nothing).
    """
    kv_heads = k.shape[2]
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    q, k, v = (x.astype(F32) for x in (q, k, v))
    seen = _by_head(masking.visible(masks, q.shape[1], k.shape[1], window_left, window_right), kv_heads)

    bad_q = ~jnp.all(jnp.isfinite(q), axis=-1)
    bad = ~jnp.all(jnp.isfinite(k) & jnp.isfinite(v), axis=-1)
    poisoned = jnp.any(seen & heads_first(bad)[:, :, None, None], axis=-1)
    poisoned |= _group(heads_first(bad_q), kv_heads) & jnp.any(seen, axis=-1)
    spoiled = jnp.any(seen & poisoned[..., None], axis=(2, 3))
    k, v = (jnp.where(bad[..., None], 0.0, x) for x in (k, v))
    q = jnp.where(bad_q[..., None], 0.0, _nan_derivative(q, heads_first(_ungroup(poisoned))[..., None]))
    v = _nan_derivative(v, heads_first(spoiled)[..., None])

    q, k, v = map(heads_first, (q, k, v))
    logits = _dot("bkgth,bksh->bkgts", _group(q, kv_heads), k) * scale
    if masks.bias.size:
        logits = logits + _by_head(masks.bias.astype(F32), kv_heads)
    logits = jnp.where(seen, logits, -jnp.inf)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    logits = _nan_derivative(jnp.where(seen, logits, 0.0), poisoned[..., None])
    e = jnp.where(seen, jnp.exp(logits - top[..., None]), 0.0)
    l = jnp.sum(e, axis=-1)
    nothing = l == 0
    safe = jnp.where(nothing, 1.0, l)
    out = _dot("bkgts,bksh->bkgth", e, v) / safe[..., None]
    out = jnp.where(poisoned[..., None], jnp.nan, jnp.where(nothing[..., None], 0.0, out))
    lse = jnp.where(poisoned, jnp.nan, jnp.where(nothing, -jnp.inf, jnp.log(safe) + top))
    return heads_first(_ungroup(out)), _ungroup(lse)
