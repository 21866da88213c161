"""Flax: an `attention_fn` for the layers of Flax itself, and layers of our own.

`sage_jax.flax.attention_fn(...)` needs no Flax; `sage_jax.flax.nnx` and `sage_jax.flax.linen` are
imported when they are first used, so one can use either without loading the other.
"""

import importlib

from sage_jax.flax.attention_fn import attention_fn

__all__ = ["attention_fn", "linen", "nnx"]


def __getattr__(name: str):
    if name in ("linen", "nnx"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
