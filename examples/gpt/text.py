"""Real text that is always at hand: the source files of the Python standard library, as bytes.

Training and held-out text never share a file. A file's side is decided by a checksum of its
path relative to the folder, so the split is the same on every machine with the same Python.
"""

import os
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Left out: what others installed, tests, and folders that are tables rather than code.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
_HELD_OUT_ONE_IN = 10


class Corpus(NamedTuple):
    """Two byte strings as uint8 arrays, and where they came from."""

    train: np.ndarray
    held_out: np.ndarray
    folder: pathlib.Path
    files: int


def load(folder: pathlib.Path | None, context: int) -> Corpus:
    """Reads every `*.py` below `folder` (None: the standard library) into a `Corpus`.

    Raises:
      ValueError: the folder is missing, or either side is shorter than 8 contexts.
    """
    folder = folder or pathlib.Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise ValueError(f"--text {folder} is not a folder; give one that holds *.py files.")
    train, held_out = [], []
    for name in sorted(_sources(folder)):
        checksum = zlib.crc32(name.as_posix().encode())
        side = train if checksum % _HELD_OUT_ONE_IN else held_out
        side.append((folder / name).read_bytes())
    corpus = Corpus(_join(train), _join(held_out), folder, len(train) + len(held_out))
    shortest = min(corpus.train.size, corpus.held_out.size)
    if shortest < 8 * context:
        raise ValueError(
            f"{folder} holds {corpus.train.size} bytes of *.py files to train on and "
            f"{corpus.held_out.size} held out, but a context of {context} needs {8 * context} of "
            "each; give a folder with more text by --text, or a smaller --context."
        )
    return corpus


def _sources(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Paths of the files, relative to `folder`. Skipped folders are not entered: one may hold 100,000 files."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py"):
                yield (pathlib.Path(parent) / file).relative_to(folder)


def batches(text: np.ndarray, *, batch: int, context: int, seed: int) -> Iterator[np.ndarray]:
    """Yields endless random windows, int32 [batch, context + 1]: inputs and, one later, targets."""
    rng = np.random.default_rng(seed)
    offsets = np.arange(context + 1)
    while True:
        starts = rng.integers(0, text.size - context, size=(batch, 1))
        yield text[starts + offsets].astype(np.int32)


def _join(files: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n".join(files), dtype=np.uint8)
