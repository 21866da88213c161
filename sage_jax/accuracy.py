"""Measures what every recipe costs in accuracy on the user's own tensors.

`compare` runs each recipe, forward and backward, next to exact float32 attention on the same inputs
and reports relative L2 errors and cosines, per head and overall. It works through one key/value
head of one batch row at a time, and the exact side through a chunk of queries at a time, so memory
stays small at any number of heads and any length.

Shape letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K,
H head dimension.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import attention, masking, reference, support
from sage_jax.accuracy_data import synthetic
from sage_jax.accuracy_report import Error, Report
from sage_jax.recipe import PRESETS, Recipe, resolve

__all__ = ["Error", "Report", "compare", "error", "exact", "synthetic"]

Array = jax.Array

# Scores that the exact side holds at once: 64 MiB in each of the few arrays of that size.
EXACT_SCORES = 2**24


def compare(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    recipes: Iterable[str | Recipe] | Mapping[str, str | Recipe] | None = None,
    dout: Array | None = None,
    gradients: bool = True,
    per_head: bool = True,
    implementation: str | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_segment_ids: Array | None = None,
    key_value_segment_ids: Array | None = None,
    causal_alignment: str = "top_left",
) -> Report:
    """Errors of every recipe against exact float32 attention on these tensors.

    The arguments without a description below mean what they mean in
    `sage_jax.dot_product_attention`. Inputs are taken as they are: the exact side reads the same
    (say, bfloat16) values, widened to float32. Call it outside `jit`.

    Args:
      query: [B, T, N, H] or [T, N, H]. key, value: [B, S, K, H] or [S, K, H]. Arrays or lists.
      recipes: names or `Recipe`s, or a mapping from a label to one; all presets by default. A
        preset that cannot run is then left out, and the report says why; one named here raises.
      dout: cotangent of the output, shaped like `query` and cast to its dtype; standard normal
        entries by default.
      gradients: also measure dQ, dK and dV, of the recipes that have a backward pass.
      per_head: keep the errors of each head in the report.

    Returns:
      A `Report`: print it, or use `to_dict()`, `best()`, `plot()`.

    Raises:
      ValueError, TypeError, ImportError: what `sage_jax.dot_product_attention` would raise.
      ValueError: `dout` of another shape than `query`, no recipes, or two of one name.
      TypeError: a recipe that is neither a name nor a `Recipe`.
    """
    arrays = {
        "bias": bias,
        "mask": mask,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "query_segment_ids": query_segment_ids,
        "key_value_segment_ids": key_value_segment_ids,
    }
    options = {
        "scale": scale,
        "is_causal": is_causal,
        "local_window_size": local_window_size,
        "causal_alignment": causal_alignment,
    }
    call = {**options, "implementation": implementation}
    support.plan(query, key, value, **call, **arrays)  # raises what a bad call raises
    query, key, value = map(jnp.asarray, (query, key, value))
    if dout is None:
        dout = jax.random.normal(jax.random.key(0), query.shape)
    dout = _cotangent(dout, query).astype(query.dtype)
    labelled, skipped = _labelled(recipes), {}
    if recipes is None:
        answers = {
            label: support.supports(query, key, value, recipe=recipe, **call, **arrays)
            for label, recipe in labelled.items()
        }
        skipped = {label: reason for label, reason in answers.items() if reason}
    runs = {
        label: _runner(recipe, gradients and recipe.backward is not None, call)
        for label, recipe in labelled.items()
        if label not in skipped
    }
    sums: dict[str, dict[str, dict[tuple[int, int], np.ndarray]]] = {label: {} for label in runs}
    for place, operands, own_arrays in _parts((query, key, value, dout), arrays):
        truth = _exact_part(operands, own_arrays, options, gradients)
        for label in list(sums):
            try:
                results = jax.block_until_ready(runs[label](*operands, own_arrays))
            except jax.errors.JaxRuntimeError as reason:  # such as: no such kernel for this GPU
                if recipes is not None or len(sums) == 1:
                    raise
                skipped[label] = str(reason)
                del sums[label]
                continue
            for tensor, measured in results.items():
                part = _sums(measured, truth[tensor])
                sums[label].setdefault(tensor, {})[place] = part
    errors = {
        label: {t: Error.from_sums(_assemble(parts), per_head) for t, parts in tensors.items()}
        for label, tensors in sums.items()
    }
    shapes = f"q {list(query.shape)}, k and v {list(key.shape)}, {query.dtype}"
    given = [name for name, x in arrays.items() if x is not None]
    given += [f"{name}={x}" for name, x in call.items() if x not in (None, False, "top_left")]
    return Report(", ".join([shapes, *given]), errors, skipped)


def exact(
    query: Array, key: Array, value: Array, dout: Array | None = None, **masks_and_scale
) -> dict[str, np.ndarray]:
    """Attention and its gradients in float32, in little memory at any length.

    Args:
      query: [B, T, N, H] or [T, N, H]. key, value: [B, S, K, H] or [S, K, H]. Arrays or lists.
      dout: shaped like query, of any real dtype, or None for no gradients.
      **masks_and_scale: bias, mask, scale, is_causal, local_window_size, causal_alignment, lengths
        and segment ids, as in `sage_jax.dot_product_attention`.

    Returns:
      {"o": like query, "lse": [B, T, N] or [T, N], "dq": like query, "dk" and "dv": like key}, in
      float32.

    Raises:
      ValueError, TypeError: what `sage_jax.dot_product_attention` would raise.
      ValueError: `dout` of another shape than `query`. TypeError: another keyword.
    """
    unknown = [name for name in masks_and_scale if name not in (*_ARRAYS, *_OPTIONS)]
    if unknown:
        raise TypeError(
            f"accuracy.exact got the keyword {unknown[0]!r}, but takes masks and a scale only; "
            f"choose from {', '.join((*_ARRAYS, *_OPTIONS))}."
        )
    support.plan(query, key, value, implementation="reference", **masks_and_scale)
    arrays = {name: masks_and_scale.pop(name, None) for name in _ARRAYS}
    query, key, value = map(jnp.asarray, (query, key, value))
    gradients = dout is not None
    dout = _cotangent(dout, query) if gradients else jnp.zeros_like(query)
    shapes = {"o": query.shape, "lse": query.shape[:-1]}
    if gradients:
        shapes |= {"dq": query.shape, "dk": key.shape, "dv": value.shape}
    results = {tensor: np.empty(shape, np.float32) for tensor, shape in shapes.items()}
    for (row, head), own, own_arrays in _parts((query, key, value, dout), arrays):
        part = _exact_part(own, own_arrays, masks_and_scale, gradients)
        for tensor, x in part.items():
            whole = results[tensor]
            whole = whole if whole.ndim == x.ndim else whole[None]
            n = x.shape[2]
            whole[row, :, head * n : (head + 1) * n] = x[0]
    return results


def error(measured: Array, truth: Array) -> Error:
    """Relative L2 error and cosine of `measured` against `truth`, both [B, T, heads, ...]."""
    return Error.from_sums(_sums(measured, truth), per_head=True)


# ----------------------------------------------------------------------------- one head at a time

_ARRAYS = (
    "bias",
    "mask",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "query_segment_ids",
    "key_value_segment_ids",
)
_OPTIONS = ("scale", "is_causal", "local_window_size", "causal_alignment")


def _cotangent(dout, query: Array) -> Array:
    """dout as an array; ValueError if it is not shaped like the output."""
    dout = jnp.asarray(dout)
    if dout.shape != query.shape:
        raise ValueError(
            f"dout has the shape {dout.shape}, but the output has that of query, {query.shape}; "
            "pass a cotangent of that shape, or None for a random one."
        )
    return dout


def _parts(operands, arrays) -> Iterator[tuple[tuple[int, int], tuple[Array, ...], dict]]:
    """((b, k), operands, arrays) of each batch row b and key/value head k with its query heads."""
    operands = [_leading_axes(x, 4) for x in operands]
    batch, _, heads, _ = operands[0].shape
    kv_heads = operands[1].shape[2]
    group = heads // kv_heads
    tokens = {
        "query_seq_lengths": operands[0].shape[1],
        "key_value_seq_lengths": operands[1].shape[1],
    }

    def array(name, x):
        if name in tokens:
            return _lengths(x, tokens[name])
        if name in ("bias", "mask"):
            return _leading_axes(jnp.asarray(x), 4)
        return _leading_axes(jnp.asarray(x), 2).astype(jnp.int32)

    arrays = {name: x if x is None else array(name, x) for name, x in arrays.items()}
    for row, head in itertools.product(range(batch), range(kv_heads)):

        def own(x, count, row=row, head=head):
            """Axis 0 is the batch, axis 2 (of masks: 1) holds `count` heads for each part."""
            return x[row : row + 1, :, head * count : (head + 1) * count]

        def own_array(x, row=row, head=head):
            if x is None:
                return None
            x = x[row : row + 1] if x.shape[0] > 1 else x
            several = x.ndim == 4 and x.shape[1] > 1
            return x[:, head * group : (head + 1) * group] if several else x

        counts = (group, 1, 1, group)
        yield (
            (row, head),
            tuple(own(x, count) for x, count in zip(operands, counts, strict=True)),
            {name: own_array(x) for name, x in arrays.items()},
        )


def _lengths(lengths, tokens: int) -> Array:
    """int32 [B] within 0 ... tokens, of integers of any type: int8 does not hold every number of
    tokens, int32 not every length.
    """
    return jnp.array([min(max(int(n), 0), tokens) for n in np.asarray(lengths)], jnp.int32)


def _leading_axes(x: Array, ndim: int) -> Array:
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


def _runner(recipe: Recipe, backward: bool, call):
    """A compiled function (q, k, v, dout, arrays) -> {tensor: array} that runs one recipe."""

    @jax.jit
    def run(q, k, v, dout, arrays):
        def attend(q, k, v):
            return attention.dot_product_attention(
                q, k, v, recipe=recipe, return_residual=True, **call, **arrays
            )

        if not backward:
            return dict(zip(("o", "lse"), attend(q, k, v), strict=True))
        (out, lse), pull = jax.vjp(attend, q, k, v)
        gradients = pull((dout, jnp.zeros_like(lse)))
        return {"o": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    return run


def _exact_part(operands, arrays, options, gradients: bool) -> dict[str, Array]:
    """`exact` of one part of `_parts`, a chunk of queries at a time."""
    q, k, v, dout = (x.astype(jnp.float32) for x in operands)
    planned = support.plan(*operands[:3], **arrays, **options, implementation="reference")
    settings = planned.settings
    static = (
        float(options["scale"]) if planned.fold_scale else settings.scale,
        settings.window_left,
        settings.window_right,
        gradients,
    )
    masks = _masks(q, k, arrays, options.get("causal_alignment", "top_left"))
    queries, chunk = q.shape[1], max(1, EXACT_SCORES // max(1, q.shape[2] * k.shape[1]))
    pieces, dk, dv = [], 0.0, 0.0
    for start in range(0, max(queries, 1), chunk):
        rows = slice(start, min(start + chunk, queries))
        piece = _exact_chunk(q[:, rows], k, v, dout[:, rows], _rows(masks, rows), *static)
        if gradients:
            dk, dv = dk + piece.pop("dk"), dv + piece.pop("dv")
        pieces.append(piece)
    whole = {t: jnp.concatenate([piece[t] for piece in pieces], axis=1) for t in pieces[0]}
    return whole | ({"dk": dk, "dv": dv} if gradients else {})


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _exact_chunk(q, k, v, dout, masks, scale, window_left, window_right, gradients):
    def attend(q, k, v):
        return reference.exact_attention(
            q, k, v, masks, scale=scale, window_left=window_left, window_right=window_right
        )

    if not gradients:
        out, lse = attend(q, k, v)
        return {"o": out, "lse": jnp.swapaxes(lse, 1, 2)}
    (out, lse), pull = jax.vjp(attend, q, k, v)
    dq, dk, dv = pull((dout, jnp.zeros_like(lse)))
    return {"o": out, "lse": jnp.swapaxes(lse, 1, 2), "dq": dq, "dk": dk, "dv": dv}


def _masks(q, k, arrays, causal_alignment: str) -> masking.Masks:
    """The masks of a part. Built here again, so that the exact side shares no code with a call."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]

    def valid(lengths, tokens):
        return _lengths([tokens] * batch if lengths is None else lengths, tokens)

    q_len = valid(arrays["query_seq_lengths"], queries)
    kv_len = valid(arrays["key_value_seq_lengths"], keys)
    offset = kv_len - q_len if causal_alignment == "bottom_right" else 0 * q_len
    given = {
        "q_seg": arrays["query_segment_ids"],
        "kv_seg": arrays["key_value_segment_ids"],
        "mask": arrays["mask"],
        "bias": arrays["bias"],
    }
    return masking.no_masks(batch, queries, keys)._replace(
        bounds=jnp.stack([q_len, kv_len, offset], axis=1),
        **{name: x for name, x in given.items() if x is not None},
    )


def _rows(masks: masking.Masks, rows: slice) -> masking.Masks:
    """The masks of some of the queries: the diagonal starts that much further to the right."""

    def dense(x):
        return x[:, :, rows] if x.shape[2] > 1 else x

    return masks._replace(
        bounds=masks.bounds + jnp.array([-rows.start, 0, rows.start], jnp.int32),
        q_seg=masks.q_seg[:, rows],
        mask=dense(masks.mask),
        bias=dense(masks.bias),
    )


def _sums(measured, truth) -> np.ndarray:
    """float64 [B, heads, 4] that `Error.from_sums` takes, of two [B, T, heads, ...] arrays.

    Entries that are the same infinity (the LSE of rows that see nothing) count as agreeing.
    """
    x, y = (np.swapaxes(np.asarray(z).astype(np.float64), 1, 2) for z in (measured, truth))
    x, y = (z.reshape(*z.shape[:2], -1) for z in (x, y))
    same = np.isinf(y) & (x == y)
    x, y = np.where(same, 0.0, x), np.where(same, 0.0, y)
    with np.errstate(invalid="ignore"):
        return np.stack(
            [((x - y) ** 2).sum(-1), (x * y).sum(-1), (x**2).sum(-1), (y**2).sum(-1)], -1
        )


def _assemble(parts: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """[B, heads, 4] from the sums [1, n, 4] of the parts (b, k)."""
    batch, kv_heads = (1 + max(place[i] for place in parts) for i in range(2))
    return np.concatenate(
        [
            np.concatenate([parts[row, head] for head in range(kv_heads)], axis=1)
            for row in range(batch)
        ]
    )


def _labelled(recipes) -> dict[str, Recipe]:
    if recipes is None:
        return dict(PRESETS)
    if isinstance(recipes, (str, Recipe)):
        recipes = [recipes]
    if not isinstance(recipes, Iterable):
        raise TypeError(
            f"recipes should be names or Recipes, but got {type(recipes).__name__}; pass a list of "
            'them such as ["sage2"], or None for all presets.'
        )
    if isinstance(recipes, Mapping):
        labelled = {str(label): _named(recipe) for label, recipe in recipes.items()}
    else:
        resolved = [_named(recipe) for recipe in recipes]
        labelled = {recipe.name: recipe for recipe in resolved}
        if len(labelled) < len(resolved):
            raise ValueError(
                f"two of the recipes {', '.join(r.name for r in resolved)} share a name; pass a "
                "mapping from a label of your own to each recipe."
            )
    if not labelled:
        raise ValueError("recipes is empty; pass names, Recipes, or None for all presets.")
    return labelled


def _named(recipe) -> Recipe:
    if recipe is None:
        raise TypeError(
            "recipes holds None, but each of them should be a name or a sage_jax.Recipe; name the "
            "ones to compare, such as 'sage2' and 'train8', which None stands for in a call."
        )
    return resolve(recipe)
