"""The FP4 operations on the simulator: NumPy arrays in, tuples of NumPy arrays out, as `sage_jax.nvfp4` orders them."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

from cuda_sim import library as sim
from cuda_sim.library import DTYPES, F32, Arrays, MaskParams, Shape, _bool, _fields, _float, _int, _pointer, _struct
from sage_jax.recipe import padded_head_dim

E4M3, U8 = ml_dtypes.float8_e4m3fn, np.uint8

KvParams = _struct(
    "QuantizeKvFp4Params",
    ("shape", Shape),
    *_fields(_int, "k_dtype v_dtype"),
    *_fields(_pointer, "k v bounds"),
    *_fields(_bool, "four_or_six smooth_k smooth_v"),
    *_fields(_pointer, "k4 k_scale k_tensor k_mean v4 v_scale v_tensor v_mean workspace"),
)
QParams = _struct(
    "QuantizeQFp4Params",
    ("shape", Shape),
    *_fields(_int, "q_dtype k_dtype"),
    *_fields(_pointer, "q k k_mean k_tensor bounds"),
    *_fields(_bool, "four_or_six smooth_q"),
    ("scale", _float),
    *_fields(_pointer, "q4 q_scale q_tensor delta lse_shift workspace"),
)
AttendParams = _struct(
    "AttendFp4Params",
    ("shape", Shape),
    ("masks", MaskParams),
    ("scale", _float),
    *_fields(_pointer, "q4 q_scale q_tensor delta lse_shift k4 k_scale k_tensor v4 v_scale v_tensor v_mean"),
    ("out_dtype", _int),
    *_fields(_pointer, "out lse workspace"),
)


def library():
    lib = sim.library()
    for name in ("fp4_product", "quantize_kv_fp4", "quantize_q_fp4", "attend_fp4"):
        getattr(lib, f"sim_{name}").restype = ctypes.c_char_p
    for name in ("quantize_kv_fp4", "quantize_q_fp4", "mask"):
        getattr(lib, f"sim_{name}_workspace_bytes").restype = ctypes.c_size_t
    for struct, name in ((KvParams, "quantize_kv"), (QParams, "quantize_q"), (AttendParams, "attend")):
        size = getattr(lib, f"sim_sizeof_{name}_fp4_params")()
        assert size == ctypes.sizeof(struct), f"{struct.__name__} differs from common/params_fp4.h"
    return lib


def product(scale_lane, a, b, scale_a, scale_b, c):
    """D of one warp's fragments: a [32, 4], b [32, 2], scale_a [32], scale_b [32] uint32, c [32, 4] float32."""
    arrays = Arrays()
    address, d = arrays.output((32, 4), F32)
    given = (ctypes.c_void_p * 6)(
        *(arrays.input(x) for x in (a, b, scale_a, scale_b, c)), address
    )  # fmt: skip
    error = library().sim_fp4_product(scale_lane, ctypes.byref(given))
    assert not error, error
    arrays.check()
    return d


def quantize_kv(k, v, bounds, *, four_or_six, smooth_k, smooth_v):
    k, v = np.asarray(k), np.asarray(v)
    batch, keys, heads, head_dim = k.shape
    padded, length = padded_head_dim(head_dim), -(-keys // 64) * 64
    shape, a = Shape(batch, 0, keys, 0, heads, head_dim, padded), Arrays()
    heads = (batch, heads)
    results = [
        a.output((*heads, keys, padded // 2), U8), a.output((*heads, keys, padded // 16), E4M3),
        a.output(heads, F32), a.output((*heads, padded), F32),
        a.output((*heads, padded, length // 2), U8), a.output((*heads, padded, length // 16), E4M3),
        a.output(heads, F32), a.output((*heads, padded), F32),
    ]  # fmt: skip
    size = library().sim_quantize_kv_fp4_workspace_bytes(ctypes.byref(shape))
    params = KvParams(
        shape, DTYPES[k.dtype.name], DTYPES[v.dtype.name], a.input(k), a.input(v), a.input(bounds),
        four_or_six, smooth_k, smooth_v, *(address for address, _ in results),
        a.output((size,), U8)[0],
    )  # fmt: skip
    sim.run("quantize_kv_fp4", params, a)
    return tuple(array for _, array in results)


def quantize_q(q, k, k_mean, k_tensor, bounds, *, four_or_six, smooth_q, scale):
    q, k, k_mean = np.asarray(q), np.asarray(k), np.asarray(k_mean)
    batch, tokens, heads, head_dim = q.shape
    keys, padded = k.shape[1], k_mean.shape[2]
    shape = Shape(batch, tokens, keys, heads, k_mean.shape[1], head_dim, padded)
    rows, blocks, a = (batch, heads, tokens), (batch, heads, -(-tokens // 128)), Arrays()
    results = [
        a.output((*rows, padded // 2), U8), a.output((*rows, padded // 16), E4M3),
        a.output(blocks, F32), a.output((*blocks, keys), F32), a.output(rows, F32),
    ]  # fmt: skip
    size = library().sim_quantize_q_fp4_workspace_bytes(ctypes.byref(shape))
    params = QParams(
        shape, DTYPES[q.dtype.name], DTYPES[k.dtype.name],
        *(a.input(x) for x in (q, k, k_mean, k_tensor, bounds)), four_or_six, smooth_q, scale,
        *(address for address, _ in results), a.output((size,), U8)[0],
    )  # fmt: skip
    sim.run("quantize_q_fp4", params, a)
    return tuple(array for _, array in results)


def attend(qq, kv, masks, *, scale, window_left, window_right, head_dim, out_dtype, mask_tile=1):
    """`qq`, `kv`: results of the quantisers."""
    batch, heads, queries, half = qq[0].shape
    kv_heads, keys = kv[0].shape[1:3]
    shape = Shape(batch, queries, keys, heads, kv_heads, head_dim, 2 * half)
    a = Arrays()
    results = [a.output((batch, queries, heads, head_dim), out_dtype), a.output((batch, heads, queries), F32)]
    given = sim.mask_params(a, masks, window_left, window_right, mask_tile)
    size = library().sim_mask_workspace_bytes(ctypes.byref(shape), ctypes.byref(given))
    params = AttendParams(
        shape, given, scale, *(a.input(x) for x in (*qq, *kv[:3], *kv[4:])),
        DTYPES[np.dtype(out_dtype).name], *(address for address, _ in results), a.output((size,), U8)[0],
    )  # fmt: skip
    sim.run("attend_fp4", params, a)
    return tuple(array for _, array in results)
