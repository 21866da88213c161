"""Several devices: attention splits over batch and heads without communication.

Three worlds, told apart by the axis types of the operands' mesh:

- *Auto* axes (the compiler places data): every operation is a `custom_partitioning` with a Shardy
  rule. Query heads are the compound factor (K G), so that whole groups of query heads stay with
  their key/value head.
- *Explicit* axes (types carry the sharding): `shard_map` around the whole differentiable function,
  `split_explicitly`.
- *Manual* axes (inside `shard_map` or `pmap`), or no mesh: plain calls.

Layouts are the strings of `_batching.py`.
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
from jax.sharding import NamedSharding, PartitionSpec

from sage_jax import _compat
from sage_jax._batching import absent


def _names(entry) -> tuple[str, ...]:
    """An entry of a PartitionSpec as a tuple of mesh axes."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _entry(names):
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def _letters(layout, x):
    """(letter, size) of each axis of x; axes that are absent or broadcast count as `.`."""
    if absent(x):
        return [(".", size) for size in x.shape]
    known = (c.upper() if not (c.islower() and n == 1) else "." for c, n in zip(layout, x.shape))
    return list(zip(known, x.shape, strict=True))


def _sizes(layouts, arrays):
    """Batch size and number of key/value heads, from whichever arrays have those axes."""
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
    """Mesh axes over which to split {B: batch, N: query heads, K: key/value heads}.

    They are those of the first array that is split there, as far as whole groups of heads allow. A
    single key/value head (multi-query attention) stays whole while its query heads are split.
    """
    sizes = _sizes(layouts, arrays)

    def first(letters):
        for layout, x, spec in zip(layouts, arrays, specs, strict=True):
            for (letter, _), entry in zip(_letters(layout, x), _padded(spec, x), strict=True):
                if letter in letters and _names(entry):
                    return _names(entry)
        return ()

    batch = _dividing(first("B"), sizes["B"], mesh_shape)
    if sizes["K"] == 1:
        return {
            "B": batch,
            "N": _dividing(first("N"), sizes.get("N", 1), mesh_shape, batch),
            "K": (),
        }
    heads = _dividing(first("NK"), sizes["K"], mesh_shape, batch)
    return {"B": batch, "N": heads, "K": heads}


def _padded(spec, x):
    entries = tuple(spec or ())
    return entries + (None,) * (len(x.shape) - len(entries))


def _spec(layout, x, chosen):
    """PartitionSpec of x when batch and heads are split over the chosen axes and nothing else is
    split.
    """
    return PartitionSpec(*(_entry(chosen.get(letter)) for letter, _ in _letters(layout, x)))


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
    whole_groups = kv_heads % math.prod(mesh.shape.values()) == 0
    counter = itertools.count()

    def mapping(layout, x):
        def factor(letter):
            if letter == "B":
                return "b"
            if letter == "K" or (letter == "N" and heads == kv_heads):
                return "k"
            if letter == "N":
                return CompoundFactor("k", "g") if whole_groups else "n"
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
    shared = () if chosen["N"] == chosen["K"] else chosen["N"]

    def body(*xs):
        """Gradients of a single key/value head are summed over the devices that share it."""
        partial = fun(*xs)
        if not shared:
            return partial
        pairs = zip(result_layouts, partial, strict=True)
        return tuple(
            x if "N" in c.upper() or "K" not in c else lax.psum(x, shared) for c, x in pairs
        )

    return mesh, body, outs, ins


def partitioned(fun, operand_layouts: str, result_layouts: str):
    """fun(*arrays) -> tuple of arrays, split over batch and heads where a mesh with Auto axes says
    so.
    """
    ins, outs = tuple(operand_layouts.split()), tuple(result_layouts.split())
    wrapped = custom_partitioning(fun)
    wrapped.def_partition(
        partition=functools.partial(_partition, fun, ins, outs),
        sharding_rule=functools.partial(_rule, ins, outs),
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


def split_explicitly(fun, operand_layouts: str, operands, key):
    """fun(*operands), inside `shard_map` if the operands are typed with explicit mesh axes.

    Args:
      fun: gives out [B, T, N, H] and lse [B, N, T].
      operands: query, key and value first, None where absent.
      key: hashable; calls with equal keys have equal `fun`s, so that their compiled code is shared.

    Raises:
      ValueError: an operand is split over an axis other than batch and heads.
    """
    given = tuple(i for i, x in enumerate(operands) if x is not None)
    arrays = [operands[i] for i in given]
    mesh = next((m for m in map(_compat.explicit_mesh, arrays) if m is not None), None)
    if mesh is None:
        return fun(*operands)
    layouts = [operand_layouts.split()[i] for i in given]
    specs = [_padded(jax.typeof(x).sharding.spec, x) for x in arrays]
    for name, layout, x, spec in zip(
        ("query", "key", "value"), layouts, arrays, specs, strict=False
    ):
        for axis, entry in enumerate(spec):
            if layout[axis] == "." and _names(entry):
                raise ValueError(
                    f"{name} {x.shape} is sharded over mesh axis {entry!r} along array axis "
                    f"{axis}, but attention splits "
                    "over batch and heads only; use jax.sharding.reshard(...) first, or ring "
                    "attention."
                )
    chosen = _choose(layouts, arrays, specs, dict(mesh.shape))
    wanted = tuple(_spec(c, x, chosen) for c, x in zip(layouts, arrays, strict=True))
    run = _explicit_call(_Keyed(fun, key), mesh, given, len(operands), wanted, specs[0])
    return run(*arrays)


class _Keyed:
    """A function that equals another one if their keys do."""

    def __init__(self, fun, key):
        self.fun, self.key = fun, key

    def __eq__(self, other):
        return isinstance(other, _Keyed) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


@functools.lru_cache(maxsize=256)
def _explicit_call(keyed, mesh, given, count, in_specs, query_spec):
    """The compiled split call; its results are typed as the query is."""
    batch, _, heads, _ = in_specs[0]

    def local(*arrays):
        present = dict(zip(given, arrays, strict=True))
        return keyed.fun(*map(present.get, range(count)))

    out_specs = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, heads, None)
    split = _compat.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    def place(x, spec):
        if _padded(jax.typeof(x).sharding.spec, x) == tuple(spec):
            return x
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))

    @jax.jit
    def run(*arrays):
        out, lse = split(*map(place, arrays, in_specs))
        return place(out, query_spec), place(lse, (query_spec[0], query_spec[2], None))

    return run
