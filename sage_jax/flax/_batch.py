"""Flax arrays carry any number of batch axes, sage_jax functions carry one: the way there and back.

Letters: ... batch axes, B their product, T query length, S key length, N query heads, K key/value
heads, H head dimension.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

import sage_jax
from sage_jax import attention, masking, reference, support
from sage_jax.recipe import EXACT, Recipe, resolve
from sage_jax.sparge import block_mask as choose_tiles


def layer_recipe(recipe: str | Recipe | None) -> Recipe | str | None:
    """What `attend_folded` takes as recipe: "exact" stays, everything else as `recipe.resolve`."""
    return EXACT if isinstance(recipe, str) and recipe == EXACT else resolve(recipe)


def attend_folded(query, key, value, bias=None, mask=None, *, sparge=None, **kwargs) -> jax.Array:
    """`sage_jax.dot_product_attention` under any number of batch axes.

    Args:
      query: [..., T, N, H]; key, value: [..., S, K, H].
      bias, mask: broadcastable to [..., N, T, S], or None.
      sparge: a `sparge.Selection` of the tiles to compute, or None for all.
      **kwargs: handed on as they are; per-batch arrays among them as [B] or [B, length]. The recipe
        may be "exact" too: float32 attention in plain JAX, O(T·S) memory, with the same meaning.

    Returns:
      [..., T, N, H] in the query's type.
    """
    for name, x in (("key", key), ("value", value)):
        if x.ndim != query.ndim or x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name} should have the batch axes of query, {list(query.shape[:-3])}, but query "
                f"has shape {list(query.shape)} and {name} {list(x.shape)}."
            )
    batch = query.shape[:-3]
    exact = kwargs.get("recipe") == EXACT
    attend = _exact_attention if exact else sage_jax.dot_product_attention
    folded = tuple(fold_batch(x, batch) for x in (query, key, value))
    if sparge is not None:
        shape = {n: kwargs[n] for n in ("scale", "is_causal", "causal_alignment") if n in kwargs}
        kwargs["block_mask"] = choose_tiles(*folded[:2], sparge, **shape)
    out = attend(
        *folded,
        bias=fold_logits_shape(bias, batch, "bias"),
        mask=fold_logits_shape(mask, batch, "mask"),
        **kwargs,
    )
    return out.reshape(query.shape)


def _exact_attention(
    query,
    key,
    value,
    *,
    bias,
    mask,
    recipe,
    implementation=None,
    scale=None,
    block_mask=None,
    **kwargs,
) -> jax.Array:
    """`sage_jax.dot_product_attention` in float32."""
    if implementation not in (None, "reference"):
        raise ValueError(
            f"recipe={recipe!r} is float32 attention in plain JAX, but implementation="
            f"{implementation!r} was asked for; leave it out for this layer, or name a recipe."
        )
    planned = support.plan(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        implementation="reference",
        block_mask=block_mask,
        **kwargs,
    )
    given = {
        "bounds": attention.bounds(
            query,
            key,
            kwargs.get("query_seq_lengths"),
            kwargs.get("key_value_seq_lengths"),
            kwargs.get("causal_alignment", "top_left"),
        ),
        "q_seg": kwargs.get("query_segment_ids"),
        "kv_seg": kwargs.get("key_value_segment_ids"),
        "mask": mask if block_mask is None else block_mask,
        "bias": bias,
    }
    masks = masking.no_masks(query.shape[0], query.shape[1], key.shape[1])
    masks = masks._replace(**{name: x for name, x in given.items() if x is not None})
    masks = masking.of_pairs(masks, planned.settings.mask_tile, query.shape[1], key.shape[1])
    out, _ = reference.exact_attention(
        query,
        key,
        value,
        masks,
        scale=scale if planned.fold_scale else planned.settings.scale,
        window_left=planned.settings.window_left,
        window_right=planned.settings.window_right,
    )
    return out.astype(query.dtype)


def fold_batch(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """[*batch, ...] -> [B, ...]."""
    if len(batch) == 1:
        return x
    return x.reshape(math.prod(batch), *x.shape[len(batch) :])


def fold_extents(x: jax.typing.ArrayLike | list | None, batch: tuple[int, ...], name: str) -> jax.Array | np.ndarray | None:
    """Lengths [*batch] as [B], segment ids [*batch, length] as [B, length], also those in lists; None stays None."""
    if x is None:
        return None
    given = type(x).__name__
    try:
        x = masking.as_array(x)
        given = f"shape {list(x.shape)}"
    except ValueError:  # lists of several lengths
        x = None
    if x is None or x.shape[: len(batch)] != batch:
        raise ValueError(f"{name} should have the batch axes of query, {list(batch)}, but got {given}.")
    return fold_batch(x, batch)


def fold_logits_shape(x: jax.Array | None, batch: tuple[int, ...], name: str) -> jax.Array | None:
    """x, broadcastable to [*batch, N, T, S], as [B|1, N|1, T|1, S|1]; None stays None."""
    if x is None:
        return None
    if x.ndim > len(batch) + 3:
        raise ValueError(
            f"{name} should be broadcastable to [batch..., heads, queries, keys] with batch axes "
            f"{list(batch)}, but got shape {list(x.shape)}."
        )
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    lead, rest = x.shape[: len(batch)], x.shape[len(batch) :]
    if math.prod(lead) == 1:
        return x.reshape(1, *rest)
    return fold_batch(jnp.broadcast_to(x, batch + rest), batch)
