"""8-bit attention for JAX, forward and backward. Importing it touches no GPU."""

from __future__ import annotations

import importlib

from sage_jax._vjp import RESIDUALS
from sage_jax.attention import dot_product_attention
from sage_jax.recipe import PRESETS as recipes
from sage_jax.recipe import Recipe
from sage_jax.recipe_file import load_recipes, save_recipes
from sage_jax.support import explain, supports

__version__ = "0.1.0"
__all__ = [
    "RESIDUALS",
    "Recipe",
    "accuracy",
    "decode",
    "dot_product_attention",
    "explain",
    "flax",
    "load_recipes",
    "recipes",
    "save_recipes",
    "sparge",
    "supports",
]
_SUBMODULES = ("accuracy", "decode", "flax", "sparge")  # loaded when first used: they need more than JAX


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_SUBMODULES})
