"""The repository's programs as modules, and what compiled programs call."""

import collections
import importlib.util
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def load(path: str):
    """The program at `path` of the repository as a module, which others find by its name too."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def native_calls(text: str) -> dict[str, int]:
    """How often a program, in XLA's text of it, calls each native operation (docs/abi.md), by its name."""
    called = re.findall(r'custom_call_target="sage_jax_(\w+)"', text)
    return dict(sorted(collections.Counter(called).items()))
