"""Every difference between the JAX versions that the package supports, and nothing else."""

from __future__ import annotations

import pathlib
import re

import jax
from jax import shard_map
from jax.sharding import AxisType, PartitionSpec

__all__ = [
    "SPLITS_MAPPED_AXES",
    "ffi_api_minor",
    "result_type",
    "shard_map",
    "typed_mesh",
    "vary_over",
    "varying",
]

# Whether `vmap` lets its rules use the explicit mesh axes over which the mapped axis is split.
SPLITS_MAPPED_AXES = jax.__version_info__ >= (0, 9, 1)


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
    """A type with this shape and dtype, whole on explicit axes, with the manual axes of `like`."""
    kind = jax.typeof(like)
    sharding = kind.sharding.update(spec=PartitionSpec(*(None,) * len(shape)))
    return kind.update(shape=tuple(shape), dtype=dtype, sharding=sharding)


def typed_mesh(*arrays):
    """The mesh with Explicit or Manual axes that the arrays' types name, or None."""
    for x in arrays:
        mesh = jax.typeof(x).sharding.mesh
        if set(mesh.axis_types) - {AxisType.Auto}:
            return mesh
    return None


def ffi_api_minor() -> int:
    """Minor version of the FFI interface that the installed jaxlib offers to native code."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    found = re.search(r"define\s+XLA_FFI_API_MINOR\s+(\d+)", header.read_text())
    if not found:
        raise ImportError(f"{header} does not state XLA_FFI_API_MINOR; reinstall jaxlib.")
    return int(found.group(1))
