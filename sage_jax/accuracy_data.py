"""Synthetic inputs on which the recipes are measured: the data behind the names in the tables.

Shape letters: B batch, T tokens, N heads, H head dimension. Every (batch, head) pair draws its own
outlier channels, directions and norms, so that a measurement over many heads is also one over many
draws.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

Array = jax.Array

KINDS = ("normal", "sharp", "sigma3", "sigma5", "outlier", "sink", "heavy")


def synthetic(
    kind: str,
    key: Array,
    *,
    batch: int = 1,
    tokens: int,
    heads: int = 1,
    head_dim: int,
    dtype=jnp.float32,
) -> tuple[Array, Array, Array, Array]:
    """Draws q, k, v and an output cotangent `dout`, each [batch, tokens, heads, head_dim].

    All entries are standard normal, then:

    * "normal": nothing else. "sigma<s>" (a number, such as "sigma3"): q and k are multiplied by s,
      which sharpens the softmax. "sharp" is "sigma2".
    * "outlier": a channel is an outlier with probability 0.06; there q += 6a and k += 12b, with a
      and b one standard normal for each channel. On all channels v += 0.5c, c one normal for each.
      These are the offsets, common to all tokens, that real keys carry.
    * "sink": q += 8u, k[0] = 10.5u, v[0] *= 0.05 with a random unit vector u: queries put much of
      their mass on key 0, as trained language models do. On average over 2048 tokens that is 30%
      with head dimension 128 and 81% with 64; more with fewer tokens.
    * "heavy": the norms of the tokens of q and k are spread: each token is multiplied by exp(0.7a),
      a one standard normal a token.

    Args:
      kind: one of the names above.
      key: a JAX random key.
      batch, tokens, heads, head_dim: the shape.
      dtype: dtype of the results; they are drawn in float32 and rounded once.

    Returns:
      (q, k, v, dout).

    Raises:
      ValueError: for an unknown `kind`.
    """
    sigma = _sigma(kind)
    keys = jax.random.split(key, 8)
    shape = (batch, tokens, heads, head_dim)
    q, k, v, dout = (jax.random.normal(one, shape, jnp.float32) for one in keys[:4])
    channel = (batch, 1, heads, head_dim)
    token = (batch, tokens, heads, 1)
    if sigma is not None:
        q, k = q * sigma, k * sigma
    elif kind == "outlier":
        chosen = jax.random.bernoulli(keys[4], 0.06, channel)
        q = q + 6.0 * chosen * jax.random.normal(keys[5], channel)
        k = k + 12.0 * chosen * jax.random.normal(keys[6], channel)
        v = v + 0.5 * jax.random.normal(keys[7], channel)
    elif kind == "sink":
        u = jax.random.normal(keys[4], channel)
        u = u / jnp.linalg.norm(u, axis=-1, keepdims=True)
        q = q + 8.0 * u
        k = k.at[:, :1].set(10.5 * u)
        v = v.at[:, :1].multiply(0.05)
    else:  # heavy
        q = q * jnp.exp(0.7 * jax.random.normal(keys[4], token))
        k = k * jnp.exp(0.7 * jax.random.normal(keys[5], token))
    return tuple(x.astype(dtype) for x in (q, k, v, dout))


def _sigma(kind: str) -> float | None:
    """The factor on q and k for the kinds that are only that, else None."""
    if kind == "normal":
        return 1.0
    if kind == "sharp":
        return 2.0
    if kind in ("outlier", "sink", "heavy"):
        return None
    match = re.fullmatch(r"sigma(\d+(?:\.\d+)?)", str(kind))
    if match:
        return float(match[1])
    raise ValueError(
        f"synthetic data of kind {kind!r} was asked for; the kinds are {', '.join(KINDS)}, and "
        "'sigma<number>' with any number."
    )
