"""A byte-level GPT in Flax NNX: pre-norm blocks, RoPE, QK-norm if wished, no biases.

The attention function is an argument of the call, not of the model, so one set of parameters can
run under exact and under 8-bit attention.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

VOCABULARY = 256  # bytes

# (query [B,T,N,H], key [B,S,N,H], value [B,S,N,H]) -> [B,T,N,H]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model. Width is heads * head_dim."""

    layers: int
    heads: int
    head_dim: int
    context: int
    dtype: jnp.dtype = jnp.float32  # of the activations; parameters are always float32
    qk_norm: bool = True  # queries and keys of each head normalised

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class Attention(nnx.Module):
    """Multi-head self-attention around an attention function that the caller chooses."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        self.shape = shape
        width = shape.width
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, use_bias=False, dtype=shape.dtype, rngs=rngs) for _ in range(4)
        )
        if shape.qk_norm:
            self.query_norm = nnx.RMSNorm(shape.head_dim, dtype=shape.dtype, rngs=rngs)
            self.key_norm = nnx.RMSNorm(shape.head_dim, dtype=shape.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """x [B,T,width], positions int32 [T] -> [B,T,width]."""
        split = (*x.shape[:2], self.shape.heads, self.shape.head_dim)
        query, key, value = (layer(x).reshape(split) for layer in (self.query, self.key, self.value))
        if self.shape.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, positions), rotate(key, positions)
        return self.out(attend(query, key, value).reshape(x.shape))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        width, dtype = shape.width, shape.dtype
        self.attention_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attention = Attention(shape, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions, attend)
        hidden = jnp.square(jax.nn.relu(self.widen(self.mlp_norm(x))))  # Primer, arXiv 2109.08668
        return x + self.narrow(hidden)


class GPT(nnx.Module):
    """Bytes in, logits of the next byte out; the embedding is also the output matrix."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        self.shape = shape
        self.embed = nnx.Embed(VOCABULARY, shape.width, dtype=shape.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(shape, rngs=rngs) for _ in range(shape.layers)])
        self.norm = nnx.RMSNorm(shape.width, dtype=shape.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, attends: list[Attend], start: int | jax.Array = 0):
        """tokens int32 [B,T] at positions start.. ; one attention function a layer.

        Returns logits, float32 [B,T,VOCABULARY].
        """
        positions = start + jnp.arange(tokens.shape[1])
        # A product, not a look-up: the gradient of that adds rows up one after the other where a byte
        # is frequent, which took 22 of the 53 ms of a training step on an H200.
        table = self.embed.embedding[...].astype(self.shape.dtype)
        rows = jax.nn.one_hot(tokens, VOCABULARY, dtype=table.dtype)
        x = jnp.matmul(rows, table, precision="highest")  # exact: one product of each sum is not zero
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, positions, attend)
        return self.embed.attend(self.norm(x)).astype(jnp.float32)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (RoFormer, arXiv 2104.09864). x [B,T,N,H], positions [T]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None, None].astype(jnp.float32) * frequencies  # [T,1,half]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
