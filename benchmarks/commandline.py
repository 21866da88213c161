"""Command-line options of the benchmarks: numbers, recipes, folders; errors of one line."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from sage_jax.recipe import Recipe, resolve


class Parser(argparse.ArgumentParser):
    """Without abbreviations; a wrong option gives one line instead of argparse's usage."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; see --help\n")


def positive(kind: type):
    """A converter to a number of this type, int or float, above 0 and finite."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive {name}")
        return value

    return convert


def recipe(text: str) -> Recipe:
    """A preset, or a variant of it such as train8:dp=bf16:delta=exact."""
    try:
        return resolve(text)
    except ValueError as reason:
        raise argparse.ArgumentTypeError(str(reason)) from reason


def folder(text: str) -> pathlib.Path:
    """A folder to write to; it need not exist."""
    path = pathlib.Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name the folder to write to")
    return path


def add_folder(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Adds --out, the folder for results."""
    parser.add_argument("--out", type=folder, metavar="FOLDER", help=purpose)


def check_trainable(parser: argparse.ArgumentParser, recipes: list[Recipe]) -> None:
    """Refuses recipes without a backward pass."""
    for recipe in recipes:
        if recipe.backward is None:
            parser.error(f"--recipes {recipe.name} has no backward pass; choose train8 or sagebwd")


def check_gpt(parser: argparse.ArgumentParser, head_dim: int, otherwise: str = "") -> None:
    """Refuses what the GPT of the examples cannot be built with; `otherwise` ends the sentence."""
    if head_dim % 2:
        parser.error(
            f"--head-dim {head_dim} is odd; the GPT's rotary positions need an even number{otherwise}"
        )
    missing = [name for name in ("flax", "optax", "tqdm") if not importlib.util.find_spec(name)]
    if missing:
        parser.error(f"the GPT needs {' and '.join(missing)}: install what is missing{otherwise}")


def complete(options: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """Fills in the options that were not given."""
    for name, value in values.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
