"""q, k and v of each layer: those of a model on some text, or the user's own from an .npz file."""

import pathlib
import re
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt.model import GPT
from sage_jax.flax import attention_fn

_NAME = re.compile(r"([qkv])(0|[1-9]\d*)?")


class Tensors(NamedTuple):
    """query [B,T,N,H]; key and value [B,S,K,H]."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def of_model(model: GPT, tokens: np.ndarray) -> dict[str, Tensors]:
    """What every layer attends with, exact attention in all of them. tokens: int32 [B,T]."""
    graph, state = nnx.split(model)
    exact = attention_fn("exact", is_causal=True)

    @jax.jit
    def captured(state, tokens):
        seen = []

        def attend(query, key, value):
            seen.append(Tensors(query, key, value))
            return exact(query, key, value)

        module = nnx.merge(graph, state)
        module(tokens, [attend] * len(module.blocks))
        return seen

    return {f"layer{i}": layer for i, layer in enumerate(captured(state, tokens))}


def of_file(path: pathlib.Path) -> dict[str, Tensors]:
    """The arrays q, k, v, or q0, k0, v0, q1, ..., of an .npz file; float64 is narrowed to float32.

    Raises:
      ValueError: it is no .npz file, or its arrays are not those; one sentence.
      OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as reason:
        raise ValueError(
            f"{path} is not an .npz file of numbers; write one with "
            "numpy.savez(path, q=q, k=k, v=v)."
        ) from reason
    numbers: dict[int | None, set[str]] = {}
    for name in arrays:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{path} holds an array named {name!r}; the names are q, k and v, or q0, k0, v0, "
                "q1 and so on, one number a layer."
            )
        numbers.setdefault(match[2] and int(match[2]), set()).add(match[1])
    if not arrays or (None in numbers and len(numbers) > 1):
        raise ValueError(
            f"{path} holds {', '.join(arrays) or 'no array'}; give q, k and v of one layer, or "
            "q0, k0, v0, q1 and so on of several."
        )
    layers = {}
    for number in sorted(numbers, key=lambda n: n or 0):
        suffix = "" if number is None else str(number)
        missing = [f"{letter}{suffix}" for letter in "qkv" if letter not in numbers[number]]
        if missing:
            raise ValueError(f"{path} has no {missing[0]}; a layer needs q, k and v.")
        layer = [_array(path, f"{letter}{suffix}", arrays) for letter in "qkv"]
        layers[f"layer{number or 0}"] = Tensors(*layer)
    return layers


def _array(path: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> jax.Array:
    x = arrays[name]
    if x.ndim != 4 or not x.size:
        raise ValueError(
            f"{path}: {name} has the shape {list(x.shape)}, but should have four axes, none "
            "empty: batch, tokens, heads, channels."
        )
    if x.dtype.kind != "f":
        raise ValueError(
            f"{path}: {name} has the type {x.dtype}, but should be float32 or float16 (numpy keeps "
            "no bfloat16 in a file: widen it to float32)."
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: {name} holds NaN or infinity, which no error can be taken of.")
    return jnp.asarray(x.astype(np.float32) if x.dtype.itemsize > 4 else x)
