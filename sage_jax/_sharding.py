"""Several devices: attention splits over batch and heads without communication.

Three worlds, told apart by the axis types of the operands' mesh:

- *Auto* axes (the compiler places data): every operation is a `custom_partitioning` with a Shardy
  rule. Query heads are the compound factor (K G), so that whole groups of query heads stay with
  their key/value head.
- *Explicit* axes (types carry the sharding): a `shard_map` around every operation, inside the
  differentiable function, so that neither derivatives nor their residuals cross its edge.
- *Manual* axes (inside `shard_map` or `pmap`), or no mesh: plain calls.

On a mesh with axes of several types attention is split over the Explicit and Manual ones only. Layouts are the strings of `_batching.py`.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
from jax import lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sage_jax import _compat


def _names(entry) -> tuple[str, ...]:
    """An entry of a PartitionSpec as a tuple of mesh axes."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _entry(names):
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def _letters(layout, x):
    """(letter, size) of each axis of x; axes that broadcast count as `.`."""
    known = (c.upper() if not (c.islower() and n == 1) else "." for c, n in zip(layout, x.shape))
    return list(zip(known, x.shape, strict=True))


def _sizes(layouts, arrays):
    """The size that each letter stands for, from the first array that has it."""
    found = {}
    for layout, x in zip(layouts, arrays, strict=True):
        for letter, size in _letters(layout, x):
            found.setdefault(letter, size)
    return found


def _dividing(names, size, mesh_shape, used=()):
    """The longest prefix of mesh axes, none of them used, whose product of sizes divides `size`."""
    kept, product = [], 1
    for name in names:
        product *= mesh_shape[name]
        if name in used or size % product:
            break
        kept.append(name)
    return tuple(kept)


def _choose(layouts, arrays, specs, mesh_shape):
    """Mesh axes over which to split batch, mapped axes, query heads and key/value heads, by letter.

    They are those of the first array that is split there, as far as whole groups of heads allow. A
    single key/value head (multi-query attention) stays whole while its query heads are split.
    """
    sizes = _sizes(layouts, arrays)
    chosen, used = {}, ()

    def first(letters):
        for layout, x, spec in zip(layouts, arrays, specs, strict=True):
            for (letter, _), entry in zip(_letters(layout, x), _padded(spec, x), strict=True):
                if letter in letters and _names(entry):
                    return _names(entry)
        return ()

    for letter in ("B", *sorted(set(sizes) - set("BNK."))):
        chosen[letter] = _dividing(first(letter), sizes[letter], mesh_shape, used)
        used += chosen[letter]
    if sizes["K"] == 1:
        return chosen | {"N": _dividing(first("N"), sizes.get("N", 1), mesh_shape, used), "K": ()}
    heads = _dividing(first("NK"), sizes["K"], mesh_shape, used)
    return chosen | {"N": heads, "K": heads}


def _padded(spec, x):
    entries = tuple(spec or ())
    return entries + (None,) * (len(x.shape) - len(entries))


def _spec(layout, x, chosen):
    """PartitionSpec of x when it is split over the chosen axes and nothing else is split."""
    return PartitionSpec(*(_entry(chosen.get(letter)) for letter, _ in _letters(layout, x)))


def _summed(fun, result_layouts, chosen):
    """fun on one device's part. Gradients of a single key/value head are summed over the devices
    that share it.
    """
    shared = () if chosen["N"] == chosen["K"] else chosen["N"]

    def body(*operands):
        results = fun(*operands)
        if not shared:
            return results
        pairs = zip(result_layouts, results, strict=True)
        return tuple(x if "N" in c or "K" not in c else lax.psum(x, shared) for c, x in pairs)

    return body


# ---------------------------------------------------------------------------------------- Auto axes


def _rule(operand_layouts, result_layouts, mesh, operand_types, result_types):
    """Shardy's view: which axes of operands and results are the same. Unnamed axes get a factor of
    their own.

    Query heads are the compound factor (k g), so that Shardy keeps groups whole, unless it could
    then cut a mesh axis into parts, which JAX's shardings cannot express; in that case queries and
    keys take the shardings they were given.
    """
    operands = [_Shaped(t) for t in operand_types]
    results = [_Shaped(t) for t in result_types]
    sizes = _sizes(operand_layouts, operands)
    kv_heads, heads = sizes["K"], sizes.get("N", sizes["K"])
    whole_groups = kv_heads > 1 and kv_heads % math.prod(mesh.shape.values()) == 0
    counter = itertools.count()

    def mapping(layout, x):
        def factor(letter):
            if letter == "B":
                return "b"
            if letter == "K" or (letter == "N" and heads == kv_heads):
                return "k"
            if letter == "N":
                return CompoundFactor("k", "g") if whole_groups else "n"
            if letter != ".":
                return f"v{letter}"
            return f"u{next(counter)}"

        return ArrayMapping(*(factor(letter) for letter, _ in _letters(layout, x)))

    ins = tuple(map(mapping, operand_layouts, operands))
    outs = tuple(map(mapping, result_layouts, results))
    factors = [f for m in ins + outs for f in m]
    compound = any(isinstance(f, CompoundFactor) for f in factors)
    extra = {"g": heads // kv_heads} if compound else {}
    if compound and "k" not in factors:
        extra["k"] = kv_heads
    summed = ("n",) if "n" in factors and not any("n" in m for m in outs) else ()
    return SdyShardingRule(ins, outs, reduction_factors=summed, **extra)


class _Shaped:
    """The shape of an MLIR tensor type."""

    def __init__(self, mlir_type):
        self.shape = tuple(mlir_type.shape)


def _partition(fun, operand_layouts, result_layouts, mesh, operands, results):
    """Body and shardings of one device's part. Axes that Shardy split but the kernels cannot are
    dropped here.
    """
    results = tuple(results)
    layouts, arrays = operand_layouts + result_layouts, tuple(operands) + results
    specs = [x.sharding.spec for x in arrays]
    chosen = _choose(layouts, arrays, specs, mesh.shape)
    place = lambda layout, x: NamedSharding(mesh, _spec(layout, x, chosen))  # noqa: E731
    ins = tuple(map(place, operand_layouts, operands))
    outs = tuple(map(place, result_layouts, results))
    return mesh, _summed(fun, result_layouts, chosen), outs, ins


def _partitioned(fun, operand_layouts, result_layouts):
    """fun, split where a mesh with Auto axes says so."""
    wrapped = custom_partitioning(fun)
    wrapped.def_partition(
        partition=functools.partial(_partition, fun, operand_layouts, result_layouts),
        sharding_rule=functools.partial(_rule, operand_layouts, result_layouts),
    )
    return wrapped


# ------------------------------------------------------------------------- Explicit and manual axes


def align(*arrays):
    """The arrays, all typed as differing over the manual axes that any of them differs over; None
    stays None.

    Inside `shard_map` the kernels' results differ wherever one operand does. Casting the operands
    beforehand makes JAX sum the gradient of a replicated operand (keys and values shared by split
    query heads) over the devices that share it.
    """
    axes = frozenset().union(*(_compat.varying(x) for x in arrays if x is not None))
    return tuple(x if x is None else _compat.vary_over(x, axes) for x in arrays)


def split(fun, operand_layouts: tuple[str, ...], result_layouts: tuple[str, ...]):
    """fun(*arrays) -> tuple of arrays, split over batch, mapped axes and heads where a mesh with
    Auto or Explicit axes says so.
    """
    partitioned = _partitioned(fun, operand_layouts, result_layouts)

    def run(*operands):
        mesh = _compat.typed_mesh(*operands)
        if mesh is None:
            return partitioned(*operands)
        specs = _typed_specs(operands)
        chosen = _choose(operand_layouts, operands, specs, dict(mesh.shape))
        if not _compat.SPLITS_MAPPED_AXES and any(chosen[c] for c in set(chosen) - set("BNK")):
            raise ValueError(
                f"JAX {jax.__version__} can't map attention over an axis that is split over an "
                "explicit mesh axis; upgrade to 0.9.1, or make the mapped axis whole with "
                "jax.sharding.reshard(...)."
            )
        axis_names = _made_manual(mesh, frozenset(itertools.chain(*chosen.values())))
        if axis_names is None:
            return fun(*operands)
        in_specs = tuple(_spec(c, x, chosen) for c, x in zip(operand_layouts, operands))
        out_specs = tuple(
            PartitionSpec(*(_entry(chosen.get(letter)) for letter in layout))
            for layout in result_layouts
        )
        body = _summed(lambda *xs: fun(*align(*xs)), result_layouts, chosen)
        local = _compat.shard_map(
            body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axis_names
        )
        return local(*_placing(mesh, in_specs)(*operands))

    return run


def _made_manual(mesh, used):
    """Argument `axis_names` of the `shard_map` around an operation that is split over the explicit
    axes `used`, or None where there is nothing to make manual.

    Inside another `shard_map` Auto axes become manual too: there `custom_partitioning` is not told
    how its operands are split.
    """
    if AxisType.Manual not in mesh.axis_types:
        return frozenset()  # all axes, but for those that an outer `vmap` maps over
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return used | {name for name, kind in kinds if kind == AxisType.Auto} or None


def _typed_specs(arrays):
    return [_padded(jax.typeof(x).sharding.spec, x) for x in arrays]


@functools.lru_cache(maxsize=256)
def _placing(mesh, specs):
    """A function that gives arrays these specs in their types."""

    def place(x, spec):
        if _padded(jax.typeof(x).sharding.spec, x) == tuple(spec):
            return x
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.jit(lambda *arrays: tuple(map(place, arrays, specs)))


def alike(*arrays):
    """The arrays [B], all split over explicit mesh axes as the first that is split there."""
    mesh = _compat.typed_mesh(*arrays)
    if mesh is None:
        return arrays
    specs = _typed_specs(arrays)
    spec = PartitionSpec(*next((spec for spec in specs if any(map(_names, spec))), specs[0]))
    return _placing(mesh, (spec,) * len(arrays))(*arrays)


def settle(operand_layouts: str, operands):
    """The operands as they can be split over explicit mesh axes, and a function that gives
    attention's results, out [B, T, N, H] and lse [B, N, T], the query's own sharding.

    Args:
      operands: query, key and value first, None where absent.

    Raises:
      ValueError: an operand is split over an axis other than batch and heads.
    """
    given = [x for x in operands if x is not None]
    mesh = _compat.typed_mesh(*given)
    if mesh is None:
        return operands, lambda *results: results
    layouts = [c for c, x in zip(operand_layouts.split(), operands, strict=True) if x is not None]
    specs = _typed_specs(given)
    for name, layout, x, spec in zip(
        ("query", "key", "value"), layouts, given, specs, strict=False
    ):
        for axis, entry in enumerate(spec):
            if layout[axis] == "." and _names(entry):
                raise ValueError(
                    f"{name} {x.shape} is sharded over mesh axis {entry!r} along array axis "
                    f"{axis}, but attention splits "
                    "over batch and heads only; make that axis whole with "
                    "jax.sharding.reshard(...) first."
                )
    chosen = _choose(layouts, given, specs, dict(mesh.shape))
    wanted = tuple(_spec(c, x, chosen) for c, x in zip(layouts, given, strict=True))
    settled = iter(_placing(mesh, wanted)(*given))
    batch, _, heads, _ = specs[0]
    query_specs = PartitionSpec(*specs[0]), PartitionSpec(batch, heads, None)
    return tuple(x if x is None else next(settled) for x in operands), _placing(mesh, query_specs)
