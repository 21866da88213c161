"""A trained model in one .npz file: its parameters by name, and what it takes to build it."""

import dataclasses
import json
import pathlib
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt.model import GPT, Shape

_ABOUT = "about"  # the entry that is no parameter


class Checkpoint(NamedTuple):
    """A model, and the folder whose text it was trained on (None: the standard library)."""

    model: GPT
    text: pathlib.Path | None


def save(path: pathlib.Path, shape: Shape, parameters: nnx.State, text: pathlib.Path | None):
    """Writes the parameters of a `GPT` of that shape."""
    sizes = dataclasses.asdict(shape) | {"dtype": jnp.dtype(shape.dtype).name}
    about = json.dumps({"shape": sizes, "text": text and str(text.resolve())})
    np.savez(path, **{_ABOUT: about}, **by_name(parameters))


def load(path: pathlib.Path) -> Checkpoint:
    """Reads what `save` wrote.

    Raises:
      ValueError: the file is not one of those, in one sentence.
      OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop(_ABOUT)))
        shape = Shape(**about["shape"] | {"dtype": jnp.dtype(about["shape"]["dtype"])})
        text = about["text"] and pathlib.Path(about["text"])
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
    ) as reason:
        raise ValueError(
            f"{path} is not a model of examples/train_gpt.py, which writes model.npz."
        ) from reason
    graph, state = nnx.split(nnx.eval_shape(lambda: GPT(shape, rngs=nnx.Rngs(0))))
    wanted = {name: leaf.shape for name, leaf in by_name(state, lambda leaf: leaf).items()}
    if {name: array.shape for name, array in arrays.items()} != wanted:
        raise ValueError(
            f"{path} holds other parameters than the model that it describes; make it again with "
            "examples/train_gpt.py."
        )
    leaves = [jnp.asarray(arrays[name]) for name in wanted]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return Checkpoint(nnx.merge(graph, state), text)


def by_name(state: nnx.State, convert=lambda leaf: np.asarray(leaf, np.float32)) -> dict:
    """Name of each parameter, such as blocks.0.attention.query.kernel -> its converted array."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return {
        ".".join(str(getattr(part, "key", part)) for part in path): convert(leaf)
        for path, leaf in leaves
    }
