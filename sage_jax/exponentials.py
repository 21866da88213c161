"""Powers of two as kernels compute them: what a row's probabilities are relative to, and exponentials by interpolation.

Both are the kernel's of sm_90 for values in e4m3 (docs/kernels/sm90_forward.md), for the specification to be compared with it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sage_jax.masking import TILE

F32 = jnp.float32
_LEAST_F16 = np.float32(2.0**-14)  # that is normal


def exp2_below(s, top):
    """2^(s − top), 0 where s is −inf (also for rows that see nothing)."""
    return jnp.where(s == -jnp.inf, 0.0, jnp.exp2(s - jnp.where(top == -jnp.inf, 0.0, top)))


def interpolated_exp2(x: jax.Array) -> jax.Array:
    """2^x without an exponential: right at multiples of 1/2, between .5% less and 1.1% more elsewhere, 0 below 2^-14.

    The f16 whose bits are 1024 (x + 15) lies on the straight lines between powers of two (Schraudolph, "A fast, compact
    approximation of the exponential function", 1999). The sum of that for x, and that for x + 1/2 over √2, has corners twice as
    close.

    Args:
      x: float32 of any shape, at most 15; -inf gives 0.

    Returns:
      float32 of x's shape, representable in f16.
    """
    flushed = lambda f16: jnp.where(f16 < _LEAST_F16, 0.0, f16.astype(F32))  # noqa: E731
    line = lambda bits: flushed(lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16))  # noqa: E731
    bias = np.float32(15.0 - 1.0505)  # f16's, and the logarithm of what makes it right there
    v = jnp.clip(1.0 - (x + bias) / 64.0, 0.0, 1.0)
    bits = 32768 - jnp.floor((2.0 * v - 1.0) * 32768).astype(jnp.int32)
    return flushed((line(bits) + np.float32(0.70703125) * line(bits + 512)).astype(jnp.float16))


def exponentials(s, top, interpolated):
    """2^(s - top), of which those where `interpolated` (bool, broadcast against s) are interpolated, with 2^6 as their largest."""
    exact = exp2_below(s, top)
    if not np.any(interpolated):
        return exact
    return jnp.where(interpolated, interpolated_exp2(jnp.where(exact == 0.0, -jnp.inf, s - top + 6.0)) / 64.0, exact)


def bounded_references(s, top, at_once, interpolated):
    """What probabilities are relative to, [B, K, G, T, tiles], where 16-bit sums must not overflow.

    The maximum so far, `top`; but 2 more than before where the probabilities that one of a row's four threads has seen (it
    holds two of each eight keys) add up to more than 32. All starts again after 2048 keys, whose sums go to float32 ones
    (`kMostProbability` and `kLongKeys` in cuda/sm90/forward_values.cuh; tiles that no row sees do not count there).

    Args:
      s: scores in the log2 domain, float32 [B, K, G, T, tiles, 64]; top: the maximum so far, [B, K, G, T, tiles].
      at_once: tiles after which a kernel looks for a maximum; interpolated: whether exponentials of the second of two are
        interpolated.
    """
    tiles = s.shape[4]
    s = jnp.pad(s, ((0, 0),) * 4 + ((0, -tiles % at_once), (0, 0)), constant_values=-jnp.inf)
    s = s.reshape(*s.shape[:4], -1, at_once * TILE // 8, 4, 2)
    top_of_step = top[..., ::at_once]
    before = jnp.pad(top_of_step[..., :-1], ((0, 0),) * 4 + ((1, 0),), constant_values=-jnp.inf)
    second_of_two = (np.arange(at_once * TILE // 8) * 8 // TILE % 2 == 1)[:, None, None]
    starts = np.arange(s.shape[4]) % (2048 // (at_once * TILE)) == 0

    def step(state, tile):
        reference, sums = state
        scores, highest, highest_before, starts = tile
        reference = jnp.where(starts, highest_before, reference)
        sums = jnp.where(starts, 0.0, sums)
        floor = jnp.where(jnp.max(sums, axis=-1) > 32.0, reference + 2.0, reference)
        now = jnp.maximum(floor, highest)
        sums = sums * exp2_below(reference, now)[..., None]
        e = exponentials(scores, now[..., None, None, None], interpolated & second_of_two)
        sums = sums + jnp.sum(e, axis=(-3, -1))
        return (now, sums), now

    start = jnp.full(top.shape[:4], -jnp.inf, F32), jnp.zeros((*top.shape[:4], 4), F32)
    steps = *(jnp.moveaxis(x, 4, 0) for x in (s, top_of_step, before)), starts
    _, references = lax.scan(step, start, steps)
    return jnp.repeat(jnp.moveaxis(references, 0, 4), at_once, axis=4)[..., :tiles]
