"""Which tiles of attention matter, after SpargeAttention (arXiv 2502.18137): a block mask for `dot_product_attention`.

    mask = sage_jax.sparge.block_mask(q, k, is_causal=True)
    out = sage_jax.dot_product_attention(q, k, v, is_causal=True, block_mask=mask)

Tiles of 64 queries and of 64 keys whose tokens are alike are represented by their means; the softmax of the means' scores
says where each block of queries looks. Blocks of little mass are not computed at all, in the forward pass and, in training,
in the backward pass. Softmax runs over those that stay: what is lost is the share of probability that the others hold.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sage_jax import masking, support

F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Selection:
    """How blocks are chosen; static and hashable.

    Attributes:
      cdf_threshold: a block of queries keeps the fewest blocks of keys that together hold at least this share of its mass.
        Not used where `top_k` is given.
      top_k: instead, this share of the blocks of keys that it sees (above 0, at most 1), rounded up.
      similarity_threshold: the mean of a tile whose tokens' mean cosine similarity is not above it does not stand for them: the
        tile's block sees, or is seen by, everything. −1 trusts every mean.
      attention_sink: the first block of keys always stays.
      blocks: (queries, keys) of a block, multiples of 64. None: 192 × 128, what a thread block on sm_90 computes at once (values
        in e4m3), where a tile that some of its queries see costs as much as one that all see; for head dimensions above 128,
        which have no such kernel, 128 × 128.
    """

    cdf_threshold: float = 0.98
    top_k: float | None = None
    similarity_threshold: float = 0.6
    attention_sink: bool = False
    blocks: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("cdf_threshold", "top_k"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value!r} is not supported; it is a share, above 0 and at most 1.")
        if not -1 <= self.similarity_threshold <= 1:
            raise ValueError(
                f"similarity_threshold={self.similarity_threshold!r} is not supported; it is a cosine, from -1 to 1."
            )
        if self.blocks is not None:
            sizes = tuple(self.blocks) if isinstance(self.blocks, (tuple, list)) else ()
            if len(sizes) != 2 or any(type(n) is not int or n < 1 or n % masking.TILE for n in sizes):
                raise ValueError(f"blocks={self.blocks!r} is not supported; give (queries, keys), multiples of 64.")
            object.__setattr__(self, "blocks", sizes)

    def sizes(self, head_dim: int) -> tuple[int, int]:
        """(queries, keys) of a block."""
        return self.blocks or (128 if head_dim > 128 else 192, 128)


def check_selection(selection) -> None:
    """Raises TypeError for what is neither a Selection nor None."""
    if not isinstance(selection, (Selection, type(None))):
        raise TypeError(
            f"sparge should be a sage_jax.sparge.Selection or None, but got {type(selection).__name__}."
        )


def block_mask(
    query: jax.Array,
    key: jax.Array,
    selection: Selection = Selection(),
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
) -> jax.Array:
    """The tiles that `selection` keeps, for `dot_product_attention(..., block_mask=)`.

    In plain JAX, O(T·S / block²) memory; means, softmax and sums of mass in float32. Gradients do not flow through it.

    Args:
      query: [B, T, N, H]. key: [B, S, K, H], N a multiple of K. bfloat16, float16 or float32.
      selection: thresholds and sizes of blocks.
      scale: of the logits; 1/√H by default.
      is_causal, causal_alignment: as in `dot_product_attention`, to which they have to be given as well: blocks that no
        query sees are left out here, and their mass does not count. Other masks may be used there too.

    Returns:
      bool [B, N, ceil(T/64), ceil(S/64)].

    Raises:
      ValueError, TypeError: what `dot_product_attention` would raise for these arguments.

    Where this differs from the paper's code: mass is estimated for tiles of 64 × 64, whatever the blocks, and summed in float32;
    the kept blocks hold at least `cdf_threshold` (there at most, so that one block that matters may be left out);
    `top_k` counts blocks that are seen; the mean Gram matrix of unit tokens is found as the squared norm of their mean;
    a last tile is judged by the tokens that it has; tiles with a NaN or Inf stay; grouped heads are supported. Its second
    stage, which leaves out P·V of tiles that turn out to be small, is not built.
    """
    planned = support.plan(
        query, key, key, scale=scale, is_causal=is_causal, causal_alignment=causal_alignment, implementation="reference"
    )
    if len(query.shape) != 4:
        raise ValueError(f"query has shape {query.shape}; block_mask supports [B, T, N, H]: add a batch axis.")
    query, key = jax.lax.stop_gradient((jnp.asarray(query), jnp.asarray(key)))
    (B, T, N, H), (_, S, K, _) = query.shape, key.shape
    # A vector added to all keys changes no softmax, but makes them look alike.
    finite = jnp.isfinite(jnp.sum(key, axis=-1, keepdims=True, dtype=F32))
    key = key.astype(F32) - jnp.mean(key, axis=1, keepdims=True, dtype=F32, where=finite)
    q_mean, q_alike = _tiles(query, selection.similarity_threshold)
    k_mean, k_alike = _tiles(key, selection.similarity_threshold)
    k_alike = jnp.repeat(k_alike, N // K, axis=1)

    # ------------------------------------------------------------------------------- mass of tiles
    rows, columns = q_mean.shape[2], k_mean.shape[2]
    grouped = q_mean.reshape(B, K, N // K, rows, H)
    scores = jnp.einsum("bkgih,bkjh->bkgij", grouped, k_mean, precision="highest").reshape(B, N, rows, columns)
    scores *= F32(scale if planned.fold_scale else planned.settings.scale)
    seen = jnp.ones((rows, columns), bool)
    if is_causal:
        last = jnp.minimum((jnp.arange(rows) + 1) * masking.TILE, T) - 1 + (S - T) * (causal_alignment == "bottom_right")
        seen = jnp.arange(columns) * masking.TILE <= last[:, None]
    scores = jnp.where(seen & k_alike[:, :, None], scores, -jnp.inf)
    mass = jnp.where(jnp.isneginf(scores), 0, jax.nn.softmax(scores, axis=-1))

    # ------------------------------------------------------------------------------- blocks
    sizes = selection.sizes(H)
    seen = _blocks(seen, sizes, jnp.any)
    kept = _most(_blocks(mass, sizes, jnp.sum), seen, selection)
    kept |= ~_blocks(q_alike[..., None], (sizes[0], masking.TILE), jnp.all)
    kept |= ~_blocks(k_alike[:, :, None], (masking.TILE, sizes[1]), jnp.all)
    if selection.attention_sink:
        kept = kept.at[..., 0].set(True)
    kept &= seen
    for axis, size, tiles in ((2, sizes[0], rows), (3, sizes[1], columns)):
        kept = jnp.repeat(kept, size // masking.TILE, axis=axis)
        kept = jax.lax.slice_in_dim(kept, 0, tiles, axis=axis)
    return kept


def _tiles(x, threshold):
    """Means [B, heads, tiles, H] of tiles of x [B, tokens, heads, H], and whether they stand for the tokens, bool
    [B, heads, tiles].
    """
    tokens, count = x.shape[1], masking.tiles(x.shape[1])
    x = jnp.pad(x.astype(F32), ((0, 0), (0, count * masking.TILE - tokens), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], count, masking.TILE, *x.shape[2:])
    there = jnp.minimum(tokens - jnp.arange(count) * masking.TILE, masking.TILE).astype(F32)[:, None, None]
    mean = jnp.sum(x, axis=2) / there
    length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    unit = jnp.sum(x / jnp.where(length > 0, length, 1), axis=2) / there  # of padding: zeros
    similarity = jnp.sum(unit * unit, axis=-1)
    alike = ((similarity > threshold) | (threshold == -1)) & jnp.isfinite(jnp.sum(mean, axis=-1))
    mean = jnp.where(alike[..., None], mean, 0)
    return jnp.swapaxes(mean, 1, 2), jnp.swapaxes(alike, 1, 2)


def _blocks(x, sizes, combine):
    """x [..., i, j] of tiles, combined over blocks of `sizes` tokens."""
    for axis, size in ((-2, sizes[0]), (-1, sizes[1])):
        per_block = size // masking.TILE
        axis += x.ndim
        count = -(-x.shape[axis] // per_block)
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * per_block - x.shape[axis])
        x = jnp.pad(x, pad, constant_values=combine is jnp.all)
        x = combine(x.reshape(*x.shape[:axis], count, per_block, *x.shape[axis + 1 :]), axis=axis + 1)
    return x


def _most(mass, seen, selection):
    """Of each row of blocks [..., i, j] those of the most mass, as `selection` says."""
    order = jnp.flip(jnp.sort(mass, axis=-1), axis=-1)
    if selection.top_k is None:
        sums = jnp.cumsum(order, axis=-1)
        count = 1 + jnp.sum(sums < selection.cdf_threshold * sums[..., -1:], axis=-1, keepdims=True)
    else:
        share = jnp.ceil(jnp.sum(seen, axis=-1, keepdims=True) * selection.top_k).astype(jnp.int32)
        count = jnp.broadcast_to(share, (*mass.shape[:-1], 1))
    least = jnp.take_along_axis(order, jnp.clip(count, 1, mass.shape[-1]) - 1, axis=-1)
    return (mass >= least) & (mass > 0)
