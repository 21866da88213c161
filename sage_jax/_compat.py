"""Every difference between the JAX versions that the package supports, and nothing else."""

from __future__ import annotations

import pathlib
import re

import jax
from jax import shard_map
from jax.sharding import AxisType

__all__ = ["explicit_mesh", "ffi_api_minor", "result_type", "shard_map", "vary_over", "varying"]


def varying(x) -> frozenset:
    """Manual mesh axes over which x differs between devices (inside `shard_map`); empty
    elsewhere.
    """
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # since 0.10
    return frozenset(manual.varying if manual is not None else getattr(kind, "vma", ()))


def vary_over(x, axes: frozenset):
    """x, typed as differing over `axes` too. The transpose of the cast sums gradients over the
    added axes.
    """
    missing = tuple(sorted(axes - varying(x)))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return jax.lax.pvary(x, missing)  # before 0.9


def result_type(like, shape, dtype):
    """A type with this shape and dtype that keeps the manual axes of `like`."""
    return jax.typeof(like).update(shape=tuple(shape), dtype=dtype)


def explicit_mesh(x):
    """The abstract mesh of x if x is typed with axes that are explicit there, otherwise None."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def ffi_api_minor() -> int:
    """Minor version of the FFI interface that the installed jaxlib offers to native code."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    found = re.search(r"define\s+XLA_FFI_API_MINOR\s+(\d+)", header.read_text())
    if not found:
        raise ImportError(f"{header} does not state XLA_FFI_API_MINOR; reinstall jaxlib.")
    return int(found.group(1))
