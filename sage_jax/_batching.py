"""`vmap`: mapped axes become part of the batch axis, so that one kernel call serves all of them.

Batch rows never influence each other, so folding V mapped copies of a batch of B into one of V·B is
exact. Each device folds its own part: until an operation is split over devices a mapped axis stays
an axis of its own, because V·B can't be split where only B is.

A *layout* is a string with one letter an axis, for operands and results alike, read here and in
`_sharding.py`: `B` batch, `N` query heads, `K` key/value heads, small letters where the axis may
also have size 1 and broadcast, `.` any other axis. Mapped axes come first, as digits.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp


def foldable(fun, split, operand_layouts: tuple[str, ...], result_layouts: tuple[str, ...]):
    """split(fun, operand_layouts, result_layouts) with a `vmap` rule: any mapped axis, nested, any
    operands unmapped.

    Args:
      fun: maps arrays to a tuple of arrays; batch is axis 0 of each.
      split: splits a function of arrays with these layouts over devices (`_sharding.split`).
      operand_layouts, result_layouts: of fun; the first operand's batch never broadcasts.
    """

    @functools.cache
    def mapped_by(ins, outs):
        depth = outs[0].index("B")
        axis = chr(ord("0") + depth)
        wrapped = jax.custom_batching.custom_vmap(split(_folding(fun, ins, depth), ins, outs))

        @wrapped.def_vmap
        def _(copies, mapped, *operands):
            del copies
            deeper = mapped_by(
                tuple(axis * m + layout for m, layout in zip(mapped, ins, strict=True)),
                tuple(axis + layout for layout in outs),
            )
            return deeper(*operands), (True,) * len(outs)

        return wrapped

    return mapped_by(operand_layouts, result_layouts)


def _folding(fun, layouts, depth):
    """fun on operands with `depth` mapped axes, outermost first, that some of them lack."""
    if depth == 0:
        return fun
    axes = [chr(ord("0") + n) for n in reversed(range(depth))]

    def run(*operands):
        sizes = {}
        for layout, x in zip(layouts, operands, strict=True):
            sizes.update(zip(layout, x.shape, strict=True))
        copies = tuple(sizes[axis] for axis in axes)
        batch = operands[0].shape[layouts[0].index("B")]

        def fold(layout, x):
            """[V, B, ...] or [B, ...] -> [V·B, ...]; one row that serves all stays one."""
            own = x.shape[sum(axis in layout for axis in axes) :]
            if layout[0] == "b" and own[0] == 1:
                return x
            x = x.reshape(*(sizes[axis] if axis in layout else 1 for axis in axes), *own)
            x = jnp.broadcast_to(x, (*copies, batch, *own[1:]))
            return x.reshape(math.prod(copies) * batch, *own[1:])

        results = fun(*map(fold, layouts, operands))
        return tuple(x.reshape(*copies, batch, *x.shape[1:]) for x in results)

    return run
