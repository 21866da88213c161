"""Builds the CUDA kernels for the host simulator (sim.h) and calls them with NumPy arrays.

The very same `.cu` files that nvcc compiles are compiled by the C++ compiler against the shims in this folder. One
shared library per content hash lands in `build/cuda_sim`.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

import ml_dtypes
import numpy as np

HERE = pathlib.Path(__file__).parent
CUDA = HERE.parent.parent / "cuda"
BUILD = HERE.parent.parent / "build" / "cuda_sim"
SOURCES = (
    "attend.cu",
    "attend_fp4.cu",
    "common/mask_summary.cu",
    "common/row_blocks.cu",
    "quantize/quantize_kv.cu",
    "quantize/quantize_kv_fp4.cu",
    "quantize/quantize_q.cu",
    "quantize/quantize_q_fp4.cu",
    "sm80/attention_decode.cu",
    "sm80/attention_fwd.cu",
    "sm80/attention_fwd_e4m3.cu",
    "sm89/attention_fwd.cu",
    "sm90/attention_fwd_mma.cu",
    "sm120/attention_fwd_fp4.cu",
    "sm120/attention_fwd_fp4_emulated.cu",
    "sm90/absent.cc",  # wgmma has no twin on the host
    "sm90/decode_absent.cc",
)
FLAGS = "-std=c++17 -O1 -fPIC -ffp-contract=off -Wall -Wno-unknown-pragmas -x c++".split()
GUARD, GUARD_BYTE = 256, 0xA5  # bytes on both sides of every array that a kernel writes

DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}
PV = {"e4m3": 0, "f16": 1, "bf16": 2, "int8": 3}
DP = {None: 0, "int8": 1, "bf16": 2}
F32, S8, BF16 = np.float32, np.int8, ml_dtypes.bfloat16
PV_TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "f16": np.float16, "bf16": BF16, "int8": S8}

_pointer, _int, _float, _bool = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_bool


def _struct(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


Shape = _struct("Shape", *_fields(_int, "batch queries keys heads kv_heads head_dim padded_dim"))
MaskParams = _struct(
    "MaskParams",
    *_fields(_pointer, "bounds q_seg kv_seg mask"),
    ("mask_strides", ctypes.c_int64 * 4),
    ("mask_sizes", _int * 4),
    *_fields(_int, "window_left window_right mask_tile"),
)
QuantizeKvParams = _struct(
    "QuantizeKvParams",
    ("shape", Shape),
    *_fields(_int, "k_dtype v_dtype"),
    *_fields(_pointer, "k v bounds"),
    *_fields(_int, "pv dp"),
    ("v_range", _float),
    *_fields(_bool, "smooth_k smooth_v"),
    *_fields(_pointer, "k8 k_scale k_mean v_pv v_scale v_mean v_dp v_dp_scale k_max v_norm workspace"),
)
QuantizeQParams = _struct(
    "QuantizeQParams",
    ("shape", Shape),
    ("q_dtype", _int),
    *_fields(_pointer, "q k_mean bounds"),
    ("q_block", _int),
    ("scale", _float),
    *_fields(_pointer, "q8 q_scale lse_shift"),
)
AttendParams = _struct(
    "AttendParams",
    ("shape", Shape),
    ("masks", MaskParams),
    ("pv", _int),
    ("f16_accumulate", _bool),
    ("scale", _float),
    ("portable", _bool),
    ("q", _pointer),
    ("q_dtype", _int),
    *_fields(_pointer, "q8 q_scale lse_shift k8 k_scale v_pv v_scale v_mean"),
    ("out_dtype", _int),
    *_fields(_pointer, "out lse m l workspace"),
)


def compiler():
    """The C++ compiler's path, or None."""
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def library():
    """The simulator's shared library, compiled on first use."""
    headers = sorted(p for d in (CUDA, HERE) for p in d.rglob("*") if p.suffix in (".h", ".cuh"))
    sources = [CUDA / s for s in SOURCES]
    sources += [HERE / name for name in ("sim.cc", "exports.cc", "selftest.cu", "fp4_exports.cu")]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in (*headers, *sources):
        digest.update(path.read_bytes())
    target = BUILD / f"{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _compile(sources, target)
    lib = ctypes.CDLL(str(target))
    for name in ("sim_quantize_kv", "sim_quantize_q", "sim_attend"):
        getattr(lib, name).restype = ctypes.c_char_p
    for name in ("sim_quantize_kv_workspace_bytes", "sim_attend_workspace_bytes"):
        getattr(lib, name).restype = ctypes.c_size_t
    for struct, name in (
        (AttendParams, "attend"), (QuantizeKvParams, "quantize_kv"), (QuantizeQParams, "quantize_q")
    ):  # fmt: skip
        size = getattr(lib, f"sim_sizeof_{name}_params")()
        assert size == ctypes.sizeof(struct), f"{struct.__name__} differs from common/params.h"
    return lib


def _compile(sources, target):
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:

        def compile_one(path):
            to = pathlib.Path(scratch) / f"{path.parent.name}_{path.stem}.o"
            command = [compiler(), *FLAGS, f"-I{HERE}", f"-I{CUDA}", "-c", str(path), "-o", str(to)]
            subprocess.run(command, check=True)
            return str(to)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = pathlib.Path(scratch) / "library.so"
        subprocess.run([compiler(), "-shared", "-o", str(linked), *objects], check=True)
        os.replace(linked, target)  # atomic: other processes may build the same file


def settings(*, architecture=80, schedule=0):
    """The architecture the kernels believe they run on, and the order of threads (see sim.h)."""
    library().sim_set_architecture(architecture)
    library().sim_set_schedule(schedule)


class Arrays:
    """Aligned copies of inputs, and outputs that start as NaN garbage between guards that must survive."""

    def __init__(self):
        self._kept, self._guarded = [], []

    def _buffer(self, size, fill):
        raw = np.full(size + 512, fill, np.uint8)
        self._kept.append(raw)
        start = -raw.ctypes.data % 256
        return raw[start : start + size]

    def input(self, x):
        """Address of an aligned copy of x; None where x is empty."""
        x = np.ascontiguousarray(x)
        if x.size == 0:
            return None
        buffer = self._buffer(x.nbytes, 0xFF)
        buffer[:] = x.reshape(-1).view(np.uint8)
        return buffer.ctypes.data

    def output(self, shape, dtype):
        """(address, array) of a poisoned result."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        raw = self._buffer(size + 2 * GUARD, 0xFF)
        raw[:GUARD] = raw[GUARD + size :] = GUARD_BYTE
        self._guarded.append(raw)
        array = raw[GUARD : GUARD + size].view(dtype).reshape(shape)
        return array.ctypes.data if size else raw.ctypes.data, array

    def check(self):
        for raw in self._guarded:
            assert (raw[:GUARD] == GUARD_BYTE).all(), "a kernel wrote in front of an array"
            assert (raw[-GUARD:] == GUARD_BYTE).all(), "a kernel wrote past the end of an array"


def run(name, params, arrays):
    """Calls an entry point; raises its error text as RuntimeError."""
    error = getattr(library(), f"sim_{name}")(ctypes.byref(params))
    if error:
        raise RuntimeError(error.decode())
    arrays.check()


def mask_params(arrays, masks, window_left, window_right, mask_tile=1):
    """`MaskParams` of a sage_jax.masking.Masks."""
    mask = np.asarray(masks.mask)
    strides = [0, 0, 0, 0]
    if mask.size:
        strides = [s if n > 1 else 0 for s, n in zip(mask.strides, mask.shape)]
    return MaskParams(
        arrays.input(masks.bounds), arrays.input(masks.q_seg), arrays.input(masks.kv_seg),
        arrays.input(mask.astype(np.uint8)), (ctypes.c_int64 * 4)(*strides),
        (_int * 4)(*mask.shape), window_left, window_right, mask_tile,
    )  # fmt: skip


def quantize_kv(k, v, bounds, *, pv, v_range, smooth_k, smooth_v, dp):
    """As `sage_jax.reference.quantize_kv`, on the simulator; a tuple of NumPy arrays."""
    from sage_jax.recipe import padded_head_dim

    k, v = np.asarray(k), np.asarray(v)
    batch, keys, heads, head_dim = k.shape
    padded, tiles = padded_head_dim(head_dim), -(-keys // 64)
    shape = Shape(batch, 0, keys, 0, heads, head_dim, padded)
    dense, turned = (batch, heads, keys, padded), (batch, heads, padded, 64 * tiles)
    scales, channels = (batch, heads, tiles), (batch, heads, padded)
    a = Arrays()
    results = [
        a.output(dense, S8),
        a.output(scales, F32),
        a.output(channels, F32),
        a.output(turned if pv in ("e4m3", "int8") else dense, PV_TYPES[pv]),
        a.output(scales if pv == "int8" else channels, F32),
        a.output(channels, F32),
        a.output(dense if dp else (0,), BF16 if dp == "bf16" else S8),
        a.output(scales if dp == "int8" else (0,), F32),
        a.output(channels if dp else (0,), F32),
        a.output(channels[:2] if dp else (0,), F32),
    ]
    workspace = library().sim_quantize_kv_workspace_bytes(ctypes.byref(shape))
    params = QuantizeKvParams(
        shape, DTYPES[k.dtype.name], DTYPES[v.dtype.name], a.input(k), a.input(v), a.input(bounds),
        PV[pv], DP[dp], v_range, smooth_k, smooth_v, *(address for address, _ in results),
        a.output((workspace,), np.uint8)[0],
    )  # fmt: skip
    run("quantize_kv", params, a)
    return tuple(array for _, array in results)


def quantize_q(q, k_mean, bounds, *, q_block, scale):
    """As `sage_jax.reference.quantize_q`, on the simulator."""
    q, k_mean = np.asarray(q), np.asarray(k_mean)
    batch, tokens, heads, head_dim = q.shape
    shape = Shape(batch, tokens, 0, heads, k_mean.shape[1], head_dim, k_mean.shape[2])
    rows, a = (batch, heads, tokens), Arrays()
    results = [a.output((*rows, k_mean.shape[2]), S8), a.output(rows, F32), a.output(rows, F32)]
    params = QuantizeQParams(
        shape, DTYPES[q.dtype.name], a.input(q), a.input(k_mean), a.input(bounds), q_block, scale,
        *(address for address, _ in results),
    )  # fmt: skip
    run("quantize_q", params, a)
    return tuple(array for _, array in results)


def _attention(
    qq, kv, masks, *, pv, f16_accumulate, scale, window_left, window_right, head_dim, out_dtype,
    mask_tile=1,
):  # fmt: skip
    """The parameters of an attention on the simulator, what keeps their arrays, and its results."""
    raw = hasattr(qq, "ndim")
    batch, heads, queries = (qq.shape[0], qq.shape[2], qq.shape[1]) if raw else qq.q8.shape[:3]
    padded = kv.k8.shape[3]
    kv_heads, keys = kv.k8.shape[1:3]
    shape = Shape(batch, queries, keys, heads, kv_heads, head_dim, padded)
    a = Arrays()
    rows = (batch, heads, queries)
    results = [a.output((batch, queries, heads, head_dim), out_dtype)]
    results += [] if raw else [a.output(rows, F32) for _ in range(3)]
    given = mask_params(a, masks, window_left, window_right, mask_tile)
    params = AttendParams(
        shape, given, PV[pv], f16_accumulate, scale, False,
        *((a.input(qq), DTYPES[np.asarray(qq).dtype.name], None, None, None) if raw
          else (None, 0, *(a.input(x) for x in qq))),
        *(a.input(x) for x in (kv.k8, kv.k_scale, kv.v_pv, kv.v_scale, kv.v_mean)),
        DTYPES[np.dtype(out_dtype).name], *(address for address, _ in results), *[None] * 3 * raw, None,
    )  # fmt: skip
    return params, a, tuple(array for _, array in results)


def workspace_bytes(*args, **kwargs) -> int:
    """Length of the workspace of `attend` with these arguments."""
    params, _, _ = _attention(*args, **kwargs)
    return library().sim_attend_workspace_bytes(ctypes.byref(params))


def attend(*args, **kwargs):
    """As `sage_jax.reference.attend`, on the simulator. With queries as they are [B, T, N, H] for qq (out,) alone."""
    params, a, results = _attention(*args, **kwargs)
    size = library().sim_attend_workspace_bytes(ctypes.byref(params))
    params.workspace = a.output((size,), np.uint8)[0]
    run("attend", params, a)
    return results


def interpolate(scores, multiplier: float, shift: float) -> np.ndarray:
    """2^(score · multiplier + shift) of an even number of float32 scores, float16, as sm90/forward_interpolation.cuh has it."""
    scores = np.ascontiguousarray(scores[: len(scores) // 2 * 2], np.float32)
    pairs = np.zeros(len(scores), np.float16)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (scores, pairs)]
    library().sim_interpolate(pointers[0], _float(multiplier), _float(shift), _int(len(scores) // 2), pointers[1])
    return pairs
