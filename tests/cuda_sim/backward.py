"""Builds the backward kernels for the host simulator and calls them with NumPy arrays; see `library.py`."""

from __future__ import annotations

import ctypes
import functools
import hashlib

import numpy as np

from cuda_sim import library as base
from cuda_sim.library import CUDA, HERE, MaskParams, Shape, _bool, _fields, _float, _int, _pointer, _struct

SOURCES = (
    "attend_backward.cu",
    "common/mask_summary.cu",
    "sm80/backward_prepass.cu",
    "sm80/backward_sagebwd.cu",
    "sm80/backward_train8.cu",
    "sm89/backward_train8.cu",
    "sm90/backward_train8_mma.cu",
    "sm90/backward_absent.cc",  # wgmma has no twin on the host
)
BACKWARD = {"train8": 0, "sagebwd": 1}

BackwardParams = _struct(
    "BackwardParams",
    ("shape", Shape),
    ("masks", MaskParams),
    *_fields(_int, "backward dp"),
    ("exact_delta", _bool),
    ("scale", _float),
    *_fields(_bool, "deterministic portable"),
    *_fields(_pointer, "q8 q_scale k8 k_scale k_mean v_dp v_dp_scale k_max v_norm v_mean m l"),
    ("out_dtype", _int),
    *_fields(_pointer, "out dout dlse"),
    *_fields(_int, "dq_dtype dk_dtype dv_dtype"),
    *_fields(_pointer, "dq dk dv workspace"),
)


@functools.cache
def library():
    """The simulator's shared library with the backward pass, compiled on first use."""
    headers = sorted(p for d in (CUDA, HERE) for p in d.rglob("*") if p.suffix in (".h", ".cuh"))
    sources = [CUDA / s for s in SOURCES] + [HERE / "sim.cc", HERE / "backward_exports.cc"]
    digest = hashlib.sha256(b"backward" + " ".join(base.FLAGS).encode())
    for path in (*headers, *sources):
        digest.update(path.read_bytes())
    target = base.BUILD / f"{digest.hexdigest()[:16]}.so"
    if not target.exists():
        base._compile(sources, target)
    lib = ctypes.CDLL(str(target))
    lib.sim_attend_backward.restype = ctypes.c_char_p
    lib.sim_backward_workspace_bytes.restype = ctypes.c_size_t
    size = lib.sim_sizeof_backward_params()
    assert size == ctypes.sizeof(BackwardParams), "BackwardParams differs from common/params.h"
    return lib


def settings(*, architecture=80, schedule=0):
    """The architecture the kernels believe they run on, and the order of threads (see sim.h)."""
    library().sim_set_architecture(architecture)
    library().sim_set_schedule(schedule)


def attend_backward(
    qq, kv, m, l, out, dout, dlse, masks, *, backward, dp, exact_delta, scale, window_left,
    window_right, dtypes, mask_tile=1,
):  # fmt: skip
    """As `sage_jax.reference.attend_backward`, on the simulator: (dq, dk, dv) and the workspace's length."""
    batch, heads, queries, padded = qq.q8.shape
    kv_heads, keys = kv.k8.shape[1:3]
    out = np.asarray(out)
    head_dim = out.shape[-1]
    a = base.Arrays()
    shapes = [(batch, queries, heads, head_dim)] + [(batch, keys, kv_heads, head_dim)] * 2
    results = [a.output(s, t) for s, t in zip(shapes, dtypes)]
    inputs = (qq.q8, qq.q_scale, kv.k8, kv.k_scale, kv.k_mean, kv.v_dp, kv.v_dp_scale,
              kv.k_max, kv.v_norm, kv.v_mean, m, l)
    params = BackwardParams(
        Shape(batch, queries, keys, heads, kv_heads, head_dim, padded),
        base.mask_params(a, masks, window_left, window_right, mask_tile),
        BACKWARD[backward], base.DP[dp], exact_delta, scale, False, False,
        *(a.input(x) for x in inputs), base.DTYPES[out.dtype.name], a.input(out), a.input(dout),
        a.input(dlse), *(base.DTYPES[np.dtype(t).name] for t in dtypes),
        *(address for address, _ in results), None,
    )  # fmt: skip
    size = library().sim_backward_workspace_bytes(ctypes.byref(params))
    params.workspace = a.output((size,), np.uint8)[0]
    error = library().sim_attend_backward(ctypes.byref(params))
    if error:
        raise RuntimeError(error.decode())
    a.check()
    return tuple(array for _, array in results), size
