"""Recipes of a model's layers in a JSON file: measured once, loaded wherever the model runs.

    {"sage_jax_recipes": 1,
     "recipes": {"layer0": {"name": "mine", "pv": "bf16"}, "layer1": "sage2", "layer2": "exact"},
     "about": ...}

A layer has the fields of a `Recipe` (those left out have their defaults), the name of a preset, with
changes behind it if there are any ("train8:delta=exact"), or "exact". What "about" holds is for the
reader and is not looked at.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from sage_jax.recipe import EXACT, FIELD_TYPES, PRESETS, Recipe, resolve

_FORMAT = "sage_jax_recipes"
_VERSION = 1


def save_recipes(
    path: str | os.PathLike, recipes: Mapping[str, str | Recipe], *, about: Any = None
) -> None:
    """Writes a recipe for each layer, for `load_recipes`.

    Args:
      path: of the file, JSON; one that exists is replaced.
      recipes: name of a layer -> a `Recipe`, the name of a preset, with changes or without, or
        "exact".
      about: anything that JSON can hold, such as what the choice was made from.

    Raises:
      ValueError: no layers, a preset that does not exist, or NaN or infinity in `about`.
      TypeError: no mapping, the name of a layer is no string, an entry is None or of another type, or `about`
        holds what JSON cannot.
      OSError: the file cannot be written.
    """
    if not isinstance(recipes, Mapping):
        raise TypeError(
            f"recipes should map names of layers to recipes, but got {type(recipes).__name__}."
        )
    if not recipes:
        raise ValueError("recipes is empty; give a recipe for at least one layer.")
    for layer, recipe in recipes.items():
        if not isinstance(layer, str):
            raise TypeError(
                f"recipes should map names of layers to recipes, but {layer!r} is no string."
            )
        if recipe is None:
            raise TypeError(
                f"the recipe of {layer!r} is None, which means another one with gradients than "
                f"without; name one, or '{EXACT}'."
            )
    entries = {
        layer: recipe if _is_exact(recipe) else dataclasses.asdict(resolve(recipe))
        for layer, recipe in recipes.items()
    }
    for layer, entry in entries.items():
        _recipe(entry, repr(layer))  # what could not be loaded is not saved
    content = {_FORMAT: _VERSION, "recipes": entries}
    content |= {} if about is None else {"about": about}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    pathlib.Path(path).write_text(text, encoding="utf-8")


def load_recipes(path: str | os.PathLike) -> dict[str, Recipe | str]:
    """The recipe of each layer, from a file of `save_recipes` or one written by hand.

    Every value is a `recipe` for `sage_jax.flax.nnx.SageAttention`, its Linen twin and
    `sage_jax.flax.attention_fn`: a `Recipe`, or "exact" for a layer that keeps float32 attention.

    Raises:
      ValueError: the file is not JSON, not of this format or version, has no layers, or a layer's
        entry is no recipe: one sentence with the path and the layer.
      OSError: the file cannot be read.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"{path} is not a JSON file: {reason}.") from reason
    if not isinstance(content, dict) or _FORMAT not in content:
        raise ValueError(
            f"{path} is not a file of recipes: it has no {_FORMAT!r}; write one with "
            "sage_jax.save_recipes."
        )
    version, entries = content[_FORMAT], content.get("recipes")
    if type(version) is not int or version != _VERSION:
        raise ValueError(
            f"{path} has version {version!r} of this format, but this sage_jax reads version "
            f"{_VERSION} only."
        )
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"{path}: 'recipes' should map the name of each layer to its recipe, but is "
            f"{entries!r}."
        )
    return {layer: _recipe(entry, f"{path}, {layer!r}") for layer, entry in entries.items()}


def _once(pairs):
    """The object of JSON's name and value pairs."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return content


def _is_exact(recipe) -> bool:
    return isinstance(recipe, str) and recipe == EXACT


def _recipe(entry, place: str) -> Recipe | str:
    if isinstance(entry, str):
        if entry == EXACT:
            return entry
        if entry.partition(":")[0] not in PRESETS:
            raise ValueError(
                f"{place}: {entry!r} is no recipe; choose one of {', '.join(PRESETS)} or {EXACT}."
            )
        return _placed(place, resolve, entry)
    if not isinstance(entry, dict) or "name" not in entry:
        raise ValueError(
            f"{place}: a recipe is a name or an object with a 'name', but this is {entry!r}."
        )
    for field, value in entry.items():
        if field not in FIELD_TYPES:
            raise ValueError(
                f"{place}: a recipe has no field {field!r}; the fields are {', '.join(FIELD_TYPES)}."
            )
        if type(value) not in FIELD_TYPES[field]:
            types = " or ".join(t.__name__ for t in FIELD_TYPES[field])
            raise ValueError(f"{place}: {field} should be of type {types}, but is {value!r}.")
    return _placed(place, Recipe, **entry)


def _placed(place: str, make, *args, **kwargs) -> Recipe:
    """make(...); its ValueError says where in the file."""
    try:
        return make(*args, **kwargs)
    except ValueError as reason:
        raise ValueError(f"{place}: {reason}") from reason
