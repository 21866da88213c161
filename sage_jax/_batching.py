"""`vmap`: the mapped axis becomes part of the batch axis, so that one kernel call serves all of it.

Batch rows never influence each other, so folding V mapped copies of a batch of B into one of V·B is
exact.

A *layout* is a string with one letter an axis, for operands and results alike, read here and in
`_sharding.py`: `B` batch, `N` query heads, `K` key/value heads, small letters where the axis may
also have size 1 and broadcast, `.` any other axis. Arrays whose axes all have size 0 stand for
operands that were not given.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def absent(x) -> bool:
    """Whether x stands for an operand that was not given."""
    return not any(x.shape)


def foldable(fun, layouts: str):
    """fun with a `vmap` rule: any mapped axis, nested, any operands unmapped.

    Args:
      fun: maps arrays to a tuple of arrays; batch is axis 0 of each.
      layouts: of its operands, separated by spaces; the first one is never absent.
    """
    wrapped = jax.custom_batching.custom_vmap(fun)
    may_broadcast = [layout[0].islower() for layout in layouts.split()]

    def fold(x, mapped, keeps_one_row, copies, batch):
        """[V, B, ...] (mapped) or [B, ...] -> [V·B, ...]; one row that serves all stays one."""
        if absent(x[0] if mapped else x):
            return x[0] if mapped else x
        if not mapped:
            if keeps_one_row and x.shape[0] == 1:
                return x
            x = jnp.broadcast_to(x, (copies, *x.shape))
        if x.shape[1] != batch:
            x = jnp.broadcast_to(x, (copies, batch, *x.shape[2:]))
        return x.reshape(copies * batch, *x.shape[2:])

    def unfold(x, copies, batch):
        if absent(x):
            return jnp.broadcast_to(x, (copies, *x.shape))
        return x.reshape(copies, batch, *x.shape[1:])

    @wrapped.def_vmap
    def _(copies, mapped, *operands):
        batch = operands[0].shape[1 if mapped[0] else 0]
        columns = zip(operands, mapped, may_broadcast, strict=True)
        results = wrapped(*(fold(*column, copies, batch) for column in columns))
        return tuple(unfold(x, copies, batch) for x in results), (True,) * len(results)

    return wrapped
