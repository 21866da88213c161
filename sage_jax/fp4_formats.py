"""Four-bit block formats, in plain jnp, bit for bit: e2m1 elements, a scale for each block of neighbours.

- "nvfp4": blocks of 16, scale ue4m3 (an e4m3 that is never negative).
- "mxfp4": blocks of 32, scale e8m0, a power of two (OCP Microscaling Formats 1.0, section 6.3).
- "amxfp4": blocks of 32, one ue4m3 scale for the positive and one for the negative elements, after the idea of AMXFP4
  (asymmetric scales inside a block). No matrix unit has two scales; it exists for accuracy reports.

Blocks run along the last axis. The data of a tensor is first divided by one power of two, `tensor_scale`, so that
tiny and huge tensors meet the scales' narrow range (2^-9 to 448) in the same place. As in `quantization.py`, all
functions work in float32 and no operation can be fused with another to another result.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sage_jax.quantization import TINY, round_e4m3

E2M1_MAX = 6.0
TENSOR_TOP = (
    9  # scaled tensors peak in [2^9, 2^10): a block's maximum over 4 stays below e4m3's 448
)
MEAN_FLOOR = 2.0**-12  # a block of queries counts as this fraction of their mean, whose product has the same unit
SIXTH, QUARTER = np.float32(1.0 / 6.0), np.float32(1.0 / 4.0)


class BlockFormat(NamedTuple):
    """A format: elements in a block, the dtype of its scales, scales a block."""

    block: int
    scale_dtype: jnp.dtype
    scales: int = 1


FORMATS = {
    "nvfp4": BlockFormat(16, jnp.float8_e4m3fn),
    "mxfp4": BlockFormat(32, jnp.float8_e8m0fnu),
    "amxfp4": BlockFormat(32, jnp.float8_e4m3fn, scales=2),
}


class Blocks(NamedTuple):
    """A quantized array [..., L].

    Attributes:
      codes: uint8 [..., L/2], two elements a byte, the even one in the low four bits.
      scale: [..., L/block · scales] in the format's dtype. With two, that of the positive elements comes first.
    """

    codes: jax.Array
    scale: jax.Array


# -------------------------------------------------------------------------------------------- elements


def round_e2m1(x: jax.Array) -> jax.Array:
    """float32 rounded to the nearest of 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives, ties to the even code, saturating."""
    magnitude = jnp.minimum(jnp.abs(x), np.float32(E2M1_MAX))
    exponent = jnp.maximum((lax.bitcast_convert_type(magnitude, jnp.int32) >> 23) - 127, 0)
    rounded = jnp.round(magnitude * _power_of_two(1 - exponent)) * _power_of_two(exponent - 1)
    return jnp.copysign(rounded, x)


def pack(values: jax.Array) -> jax.Array:
    """e2m1 values (as float32) [..., L] -> codes uint8 [..., L/2]: sign, two exponent bits, one mantissa bit each."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    normal = (magnitude >> 22) - np.uint32(2 * 127 - 2)  # 1, 1½, 2, 3, 4, 6 -> 2 … 7
    code = jnp.where(magnitude >= np.uint32(0x3F800000), normal, (magnitude >= np.uint32(0x3F000000)).astype(jnp.uint32))
    code = (code | (bits >> 31 << 3)).astype(jnp.uint8)
    return code[..., ::2] | (code[..., 1::2] << 4)


def unpack(codes: jax.Array) -> jax.Array:
    """uint8 [..., L/2] -> e2m1 values as float32 [..., L]"""
    pairs = jnp.stack([codes & np.uint8(15), codes >> 4], axis=-1)
    code = pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1]).astype(jnp.int32)
    magnitude, sign = code & 7, code >> 3
    normal = (2 + (magnitude & 1)).astype(jnp.float32) * _power_of_two((magnitude >> 1) - 2)
    value = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * np.float32(0.5), normal)
    return jnp.where(sign == 1, -value, value)


def _power_of_two(exponent):
    """2^exponent for int32 exponents from −126 to 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


# -------------------------------------------------------------------------------------------- scales


def tensor_scale(amax: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(2^e, 2^−e) such that amax · 2^−e lies in [512, 1024); both 0 where amax is below 2^-110."""
    zero = amax < TINY
    bits = lax.bitcast_convert_type(jnp.where(zero, 1.0, amax).astype(jnp.float32), jnp.int32)
    exponent = (bits >> 23) - 127 - TENSOR_TOP
    powers = _power_of_two(exponent), _power_of_two(-exponent)
    return tuple(jnp.where(zero, 0.0, power) for power in powers)


def _reciprocal(scale):
    """f32(1)/scale, 0 for a scale of 0."""
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


# -------------------------------------------------------------------------------------------- blocks


def quantize(x: jax.Array, fmt: str, four_or_six: bool = False) -> Blocks:
    """float32 [..., L], already divided by its tensor's scale, L a multiple of the block.

    Args:
      fmt: a key of `FORMATS`.
      four_or_six: nvfp4: scale each block so that its largest magnitude becomes 6 or 4, whichever gives the lesser
        squared error over the block; e2m1 has no 5, so for some blocks the coarser scale is the better one.
    """
    values, scale = rounded(x, fmt, four_or_six)
    return Blocks(pack(values), scale.astype(FORMATS[fmt].scale_dtype))


def rounded(x: jax.Array, fmt: str, four_or_six: bool = False) -> tuple[jax.Array, jax.Array]:
    """`quantize`, with the elements as float32 e2m1 values [..., L] and the scales as float32."""
    size = FORMATS[fmt].block
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    if fmt == "mxfp4":
        values, scale = _power_of_two_scaled(blocks)
    elif fmt == "amxfp4":
        values, scale = _two_sided(blocks)
    else:
        values, scale = _to_top(blocks, SIXTH)
        if four_or_six:
            values, scale = _lesser_error(blocks, (values, scale), _to_top(blocks, QUARTER))
    return values.reshape(x.shape), scale.reshape(*x.shape[:-1], -1)


def dequantize(blocks: Blocks, fmt: str) -> jax.Array:
    """Elements times scales, float32 [..., L], exact."""
    return scaled(unpack(blocks.codes), blocks.scale.astype(jnp.float32), fmt)


def scaled(values: jax.Array, scale: jax.Array, fmt: str) -> jax.Array:
    """e2m1 values [..., L] times their blocks' scales (as float32), exact."""
    size, _, sides = FORMATS[fmt]
    blocks = values.reshape(*values.shape[:-1], values.shape[-1] // size, size)
    scale = scale.reshape(*blocks.shape[:-1], sides)
    each = scale if sides == 1 else jnp.where(blocks < 0, scale[..., 1:], scale[..., :1])
    return (blocks * each).reshape(values.shape)


def _to_top(blocks, fraction):
    """(values [..., size], scale [..., 1]): scale = e4m3(max|x| · fraction), elements divided by the *rounded* scale."""
    scale = round_e4m3(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) * fraction)
    return round_e2m1(blocks * _reciprocal(scale)), scale


def _lesser_error(blocks, first, second):
    """Of two (values, scale), block by block, the one nearer to the data; the first one on a tie."""
    better = _squared_error(blocks, *second) < _squared_error(blocks, *first)
    return tuple(jnp.where(better, y, x) for x, y in zip(first, second, strict=True))


def _squared_error(blocks, values, scale):
    """Σ (values · scale − x)² [..., 1]. Differences are kept to 12 bits, so that their squares are exact and a fused
    multiply-add gives the same sum; halves of the block are added, then halves of the result.
    """
    difference = lax.reduce_precision(values * scale - blocks, 8, 11)
    squares = difference * difference
    while squares.shape[-1] > 1:
        half = squares.shape[-1] // 2
        squares = squares[..., :half] + squares[..., half:]
    return squares


def _power_of_two_scaled(blocks):
    """scale = 2^(floor(log2 max|x|) − 2), so that the largest element lies in [4, 8) and saturates at 6."""
    amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    exponent = (lax.bitcast_convert_type(amax, jnp.int32) >> 23) - 127 - 2
    exponent = jnp.clip(exponent, -100, 100)
    return round_e2m1(blocks * _power_of_two(-exponent)), _power_of_two(exponent)


def _two_sided(blocks):
    """One ue4m3 scale for the positive elements and one for the negative ones: scale [..., 2]."""
    tops = [jnp.max(jnp.maximum(x, 0.0), axis=-1, keepdims=True) for x in (blocks, -blocks)]
    scale = round_e4m3(jnp.concatenate(tops, axis=-1) * SIXTH)
    inverse = _reciprocal(scale)
    return round_e2m1(blocks * jnp.where(blocks < 0, inverse[..., 1:], inverse[..., :1])), scale
