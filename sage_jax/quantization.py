"""Number formats and scale rules, in plain jnp, bit for bit: the specification of every quantiser.

All functions work in float32 and use only operations that round once and cannot be fused or reassociated, so that CPU
and CUDA kernels reproduce codes and scales exactly (`docs/abi.md`, "Rounding").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sage_jax.masking import TILE

SMALL_MEAN = 8.0  # of a sample, as `without_small` takes it
SAMPLED_KEYS, SAMPLED_VALUES = 128, 256  # tokens that stand for a sequence
HEADROOM = np.float32(3.0)  # of channel scales of V over the sample
LEAST_LIMIT = np.float32(2.0**-100)  # of these, where the sample is zero
TINY = np.float32(2.0**-110)  # groups whose largest magnitude is below this are zero
PI = np.array([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15], np.int32)
PI_INVERSE = np.argsort(PI).astype(np.int32)  # int32 with and without jax_enable_x64
E4M3_MAX = 448.0
BAD_CODE = -128  # first code of a key with a NaN or Inf
BAD_ZERO_SCALE = np.float32(-(2.0**-126))  # scale of a tile that is zero and holds a bad key


class QuantizedKV(NamedTuple):
    """Keys and values, quantized; shapes in `docs/abi.md`, section 1."""

    k8: jax.Array
    k_scale: jax.Array
    k_mean: jax.Array
    v_pv: jax.Array
    v_scale: jax.Array
    v_mean: jax.Array
    v_dp: jax.Array
    v_dp_scale: jax.Array
    k_max: jax.Array
    v_norm: jax.Array


class QuantizedQ(NamedTuple):
    """Queries, quantized; shapes in `docs/abi.md`, section 2."""

    q8: jax.Array
    q_scale: jax.Array
    lse_shift: jax.Array


def scale_and_inverse(amax: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    """(scale, inverse) such that |x · inverse| ≤ limit for |x| ≤ amax; both 0 for an all-zero group."""
    limit = np.float32(limit)
    zero = amax < TINY
    scale = jnp.where(zero, 0.0, amax * np.float32(1.0 / limit))
    inverse = jnp.where(zero, 0.0, limit / jnp.where(zero, 1.0, amax))
    return scale.astype(jnp.float32), inverse.astype(jnp.float32)


def int8_codes(x: jax.Array, inverse: jax.Array) -> jax.Array:
    """x · inverse rounded to nearest even and clamped to ±127, as int8."""
    return jnp.clip(jnp.round(x * inverse), -127, 127).astype(jnp.int8)


def round_e4m3(x: jax.Array) -> jax.Array:
    """float32 rounded to the nearest e4m3 value (ties to even, saturating at ±448), still as float32. NaN stays NaN."""
    x = x.astype(jnp.float32)
    magnitude = jnp.minimum(jnp.abs(x), np.float32(E4M3_MAX))
    exponent = (lax.bitcast_convert_type(magnitude, jnp.int32) >> 23) - 127
    exponent = jnp.maximum(exponent, -6)  # below 2^-6 the grid is that of the subnormals, 2^-9
    power = lambda e: lax.bitcast_convert_type((e + 127) << 23, jnp.float32)  # noqa: E731
    rounded = jnp.round(magnitude * power(3 - exponent)) * power(exponent - 3)
    return jnp.where(jnp.isnan(x), jnp.nan, jnp.copysign(rounded, x))


def e4m3_codes(x: jax.Array, inverse: jax.Array) -> jax.Array:
    """x · inverse rounded to e4m3, as float8_e4m3fn."""
    return round_e4m3(x * inverse).astype(jnp.float8_e4m3fn)


def power_of_two_below(amax: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(2^e, 2^-e) with e = floor(log2 amax); both 0 for an all-zero group."""
    zero = amax < TINY
    bits = lax.bitcast_convert_type(jnp.where(zero, 1.0, amax).astype(jnp.float32), jnp.int32)
    exponent = (bits >> 23) - 127
    power = lambda e: lax.bitcast_convert_type((e + 127) << 23, jnp.float32)  # noqa: E731
    return jnp.where(zero, 0.0, power(exponent)), jnp.where(zero, 0.0, power(-exponent))


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros appended until the axis is a multiple of `multiple`."""
    pad = -x.shape[axis] % multiple
    if not pad:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, pad)
    return jnp.pad(x, widths)


def group_amax(x: jax.Array, axis: int, group: int) -> jax.Array:
    """Largest magnitude over `group` consecutive entries of `axis` and over the last axis: [..., groups]."""
    x = pad_axis(jnp.abs(x), axis, group)
    shape = x.shape[:axis] + (x.shape[axis] // group, group) + x.shape[axis + 1 :]
    return jnp.max(x.reshape(shape), axis=(axis + 1, -1))


def halving_sum(x: jax.Array) -> jax.Array:
    """Sum over axis -2 (a power of two long) by adding its halves again and again: an order that kernels can reproduce."""
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    return x[..., 0, :]


def token_mean(x: jax.Array, count: jax.Array) -> jax.Array:
    """Mean over axis -2 of float32 [B, K, S, H] divided by count [B, K], rounded to bf16 values (as float32) [B, K, H]."""
    x = pad_axis(x, -2 + x.ndim, TILE)
    tiles = x.shape[-2] // TILE
    if tiles == 0:
        return jnp.zeros_like(x, shape=(*x.shape[:-2], x.shape[-1]))
    sums = halving_sum(x.reshape(*x.shape[:-2], tiles, TILE, x.shape[-1]))
    sums = pad_axis(sums, sums.ndim - 2, 1 << max(tiles - 1, 0).bit_length())
    return _bf16_mean(halving_sum(sums), count)


def _bf16_mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """float32 sums [..., H] of count [...] rows, divided and rounded to bf16 values."""
    reciprocal = np.float32(1.0) / count.astype(jnp.float32)
    return lax.reduce_precision(total * reciprocal[..., None], 8, 7)


def sample_tokens(valid: jax.Array, size: int) -> jax.Array:
    """int32 [B, size]: the tokens that stand for the first `valid` [B] of a sequence (`docs/abi.md`, section 1).

    All, where they are at most `size` (then tokens that do not exist); otherwise one of each of `size` equal parts of the
    sequence, at another place of each.
    """
    i = np.arange(size, dtype=np.uint32)[None]
    place, square = np.uint32(size) * i + np.uint32(79) * i % np.uint32(size), np.uint32(size**2)
    valid = valid[:, None].astype(jnp.uint32)
    spread = place * (valid // square) + place * (valid % square) // square  # place · valid may pass 2^32
    return jnp.where(valid <= size, i, spread).astype(jnp.int32)


def take_sample(x: jax.Array, valid: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """`size` tokens of float32 [B, K, S, H]: [B, K, size, H], zeros for tokens that do not count, and bool [B, K, size]:
    which do, because they exist and are finite."""
    if x.shape[2] == 0:
        return jnp.zeros_like(x, shape=(*x.shape[:2], size, x.shape[3])), jnp.zeros((*x.shape[:2], size), bool)
    tokens = sample_tokens(valid, size)
    rows = jnp.take_along_axis(x, jnp.minimum(tokens, x.shape[2] - 1)[:, None, :, None], axis=2)
    counts = (tokens < valid[:, None])[:, None] & jnp.all(jnp.isfinite(rows), axis=-1)
    return jnp.where(counts[..., None], rows, 0.0), counts


def sample_mean(rows: jax.Array, counts: jax.Array) -> jax.Array:
    """Mean of `take_sample`'s rows, rounded to bf16 values: float32 [B, K, H].

    Rows i, i + 16, ... are added one after the other, and then the sixteen sums by halving.
    """
    parts = rows.reshape(*rows.shape[:2], -1, 16, rows.shape[3])
    total = parts[:, :, 0]
    for i in range(1, parts.shape[2]):
        total = total + parts[:, :, i]
    return _bf16_mean(halving_sum(total), jnp.maximum(jnp.sum(counts, axis=-1, dtype=jnp.int32), 1))


def scaled_for(x: jax.Array, sample: jax.Array, valid: jax.Array) -> jax.Array:
    """What the scale of each channel of V is for, [B, K, H]: three times the largest |sample|, or the largest |x| where that
    is larger; the largest |sample| where that is of all tokens. x, sample: [B, K, tokens, H], zeros where none counts."""
    largest = lambda y: jnp.max(jnp.abs(y), axis=2, initial=0.0)  # noqa: E731
    limit = jnp.clip(HEADROOM * largest(sample), LEAST_LIMIT, np.finfo(np.float32).max)
    few = (valid <= SAMPLED_VALUES)[:, None, None]
    return jnp.where(few, largest(sample), jnp.maximum(limit, largest(x)))


def without_small(mean: jax.Array, v: jax.Array, times: float) -> jax.Array:
    """`mean` [..., H] of V [..., S, H], 0 in channels where `times` · |mean| is below the largest |v|.

    A mean below the spacing of 16-bit values moves few of their 8-bit codes: it would stay in the codes, and be added
    to the output once more; over 65536 tokens of normal data that made half of the error of O. And the mean of a sample is
    off by a sixteenth of what values spread, which is more than O where it is a mean of many values around zero: what is
    subtracted should be more than that.
    """
    largest = jnp.max(jnp.abs(v), axis=-2, initial=0.0)
    return jnp.where(np.float32(times) * jnp.abs(mean) < largest, 0.0, mean)


def transpose_tokens(x: jax.Array) -> jax.Array:
    """[..., S, H] -> [..., H, Sp] with tokens innermost, padded to a multiple of 64 and permuted by `PI` in groups of 16."""
    x = jnp.swapaxes(pad_axis(x, x.ndim - 2, TILE), -1, -2)
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    return groups[..., PI].reshape(x.shape)


def untranspose_tokens(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `transpose_tokens`: [..., H, Sp] -> [..., S, H]."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    x = groups[..., PI_INVERSE].reshape(x.shape)
    return jnp.swapaxes(x, -1, -2)[..., :tokens, :]


def expand_tiles(scale: jax.Array, tokens: int) -> jax.Array:
    """[..., tiles] -> [..., tokens]: each tile's scale repeated for its 64 tokens."""
    return jnp.repeat(scale, TILE, axis=-1)[..., :tokens]


def dequantized_keys(kv: QuantizedKV) -> jax.Array:
    """K̂ = k8 · |k_scale|, float32 [B, K, S, Hp]; zero for keys that hold a NaN or Inf."""
    keys = kv.k8.shape[2]
    bad = (kv.k8[..., 0] == BAD_CODE)[..., None]
    scale = expand_tiles(jnp.abs(kv.k_scale), keys)
    return jnp.where(bad, 0.0, kv.k8.astype(jnp.float32)) * scale[..., None]


def row_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm over channels; squares are taken of x relative to its largest entry, so that none underflows."""
    top = jnp.max(jnp.abs(x), axis=-1)
    scaled = jnp.where((top < TINY)[..., None], 0.0, x / jnp.maximum(top, TINY)[..., None])
    return top * jnp.sqrt(jnp.sum(scaled**2, axis=-1))


def largest_norm(kv: QuantizedKV, dp: str) -> jax.Array:
    """The largest ‖v_dp_j‖ over the keys [B, K]; of INT8 codes the squares add up exactly. Rows in which bf16 has an infinity
    in place of a float32 value do not count."""
    if dp == "bf16":
        return jnp.nanmax(row_norm(kv.v_dp.astype(jnp.float32)), axis=-1, initial=0.0)
    squares = jnp.sum(kv.v_dp.astype(jnp.int32) ** 2, axis=-1)
    norms = jnp.sqrt(squares.astype(jnp.float32)) * expand_tiles(kv.v_dp_scale, squares.shape[-1])
    return jnp.max(norms, axis=-1, initial=0.0)
