"""Scratch memory of the CUDA handlers, sized from shapes alone.

A CUDA handler may not allocate (its calls are captured in CUDA graphs), so scratch memory is one more result, `workspace`
u8 [bytes], after the documented ones; XLA plans its memory. The launchers in `cuda/` carve the same buffer into the same
rows; each is rounded up to 256 bytes here, though not all of them begin at a multiple there: change both together
(`tests/test_cuda_sim_*.py` compare them).

Letters: B batch, T query length, S key length, N query heads, K key/value heads, Hp padded head dimension; Tp, Sp: T and S
rounded up to multiples of 64.
"""

from __future__ import annotations

import math

from sage_jax.masking import TILE, tiles

ALIGNMENT = 256
_BYTES = {"s8": 1, "u8": 1, "e4m3": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}


def _total(rows) -> int:
    """Bytes of a workspace made of (name, format, shape) rows."""
    sizes = (math.prod(shape) * _BYTES[kind] for _, kind, shape in rows)
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def blocks_of_plane(B: int, S: int, K: int, Hp: int) -> int:
    """Blocks that share the tiles of a key head. The rule is that of `cuda/quantize/partial.cuh`."""
    return max(1, min(tiles(S), 256 * 128 // max(B * K * Hp, 1)))


def quantize_kv_rows(B: int, S: int, K: int, Hp: int):
    """Rows of the workspace of `sage_jax_quantize_kv`: what each block has seen."""
    G = blocks_of_plane(B, S, K, Hp)
    return (
        ("value_max", "f32", (B, K, G, Hp)),  # largest values, where `exceeded`
        ("key_max", "f32", (B, K, G, Hp)),
        ("norm", "f32", (B, K, G)),
        ("exceeded", "s32", (B, K, G)),  # whether a value may be larger than what its channel's scale is for
    )


def mask_rows(B: int, T: int, S: int, mask_shape, segments: bool, mask_tile: int = 1):
    """Rows that summarise segment ids and a dense mask per tile, so that kernels skip tiles without reading them.

    Args:
      mask_shape: shape of the mask, [0, 0, 0, 0] without one; its axes of size 1 stay 1 here.
      segments: whether there are segment ids.
      mask_tile: 64 for a block mask, which needs no summary.
    """
    summary = mask_shape if mask_tile == 1 else (0, 0, 0, 0)
    q, kv = (tiles(T), tiles(S)) if segments else (0, 0)
    return (
        ("q_seg_range", "s32", (B, q, 2)),  # smallest and largest id of each tile of 64 queries
        ("kv_seg_range", "s32", (B, kv, 2)),
        # 0 where a tile of 64 × 64 entries is all False, 2 where all are True, else 1
        ("mask_tiles", "u8", (*summary[:2], *(tiles(n) for n in summary[2:]))),
    )


def decode_rows(B: int, T: int, S: int, N: int, K: int, Hp: int):
    """Rows that hold the parts of an attention whose keys are split among blocks: few queries, many keys, no dense mask,
    no segments, values in e4m3 (float32 sums), f16 or bf16. The rule is that of `cuda/common/decode.h`.
    """
    count = tiles(S)
    if not (0 < T <= 16 and count >= 16 and Hp <= 128 and B > 0 and K > 0):
        return ()
    blocks = B * K * -(-(N // K * T) // 16)
    splits = min(max(256 // blocks, 1), count // 4)
    if splits == 1:
        return ()
    return (
        ("partial_out", "f32", (B, N, T, splits, Hp)),
        ("partial_m", "f32", (B, N, T, splits)),
        ("partial_l", "f32", (B, N, T, splits)),
    )


def attend_backward_rows(
    B: int, T: int, S: int, N: int, K: int, Hp: int, *, backward: int, dp: int
):
    """Rows of the workspace of `sage_jax_attend_backward` (codes as in `docs/abi.md`), before those of `mask_rows`.

    `x`, `y`, `z` are the transposed 8-bit operands of dV, dK and dQ: e4m3 for train8, INT8 codes for sagebwd.
    """
    Tp, Sp = tiles(T) * TILE, tiles(S) * TILE
    gradient = "e4m3" if backward == 0 else "s8"
    return (
        ("terms", "f32", (B, N, Tp, 4)),  # per query: score factor, m, dP factor, delta
        ("row_factor", "f32", (B, N, Tp)),  # train8: c·r/(256·l); sagebwd: c
        ("d_out", "s8" if dp == 1 else "bf16", (B, N, Tp, Hp)),  # dO for the product with V
        ("scales", "f32", (B, N, Tp // TILE, 2)),  # sagebwd: of the INT8 groups of dO and Q
        ("x", gradient, (B, N, Hp, Tp)),
        ("y", gradient, (B, N, Hp, Tp)),
        ("z", gradient, (B, K, Hp, Sp)),
        # cleared at the start: largest magnitudes of the channels of x and y; how many blocks of keys, of queries, and of
        # queries for D are taken; how often each head's dQ has been cleared and added to
        ("maxima", "u32", (2 * B * K * Hp + 2 * B * K + 3,)),
    )


def quantize_kv_fp4_rows(B: int, S: int, K: int, Hp: int):
    """Rows of the workspace of `sage_jax_quantize_kv_fp4`: partial reductions over tiles of 64 keys, of K and then of V."""
    return (
        ("sums", "f32", (2, B, K, tiles(S), Hp)),
        ("max", "f32", (2, B, K, tiles(S), Hp)),
        ("min", "f32", (2, B, K, tiles(S), Hp)),
        ("amax", "f32", (2, B, K, Hp)),  # of what is left without the mean, over the sequence
        ("used", "s32", (B, K, tiles(S))),  # tokens counted per tile
    )


def quantize_q_fp4_rows(B: int, T: int, N: int, Hp: int):
    """Rows of the workspace of `sage_jax_quantize_q_fp4`."""
    return (("means", "f32", (B, N, -(-T // 128), Hp)),)  # of 128 queries, divided by their scale


def quantize_kv_bytes(B: int, S: int, K: int, Hp: int) -> int:
    """Length of the `workspace` result of `sage_jax_quantize_kv` on CUDA."""
    return _total(quantize_kv_rows(B, S, K, Hp))


def fp4_bytes(name: str, B: int, T: int, S: int, N: int, K: int, Hp: int, masking: dict) -> int:
    """Length of the `workspace` result of the FP4 operation `name` on CUDA; `masking` as `mask_rows` takes it."""
    rows = {
        "quantize_kv_fp4": lambda: quantize_kv_fp4_rows(B, S, K, Hp),
        "quantize_q_fp4": lambda: quantize_q_fp4_rows(B, T, N, Hp),
        "attend_fp4": lambda: mask_rows(B, T, S, **masking),
    }
    return _total(rows[name]())


def attend_bytes(
    B: int,
    T: int,
    S: int,
    N: int,
    K: int,
    Hp: int,
    *,
    pv: int,
    f16_accumulate: bool,
    mask_shape,
    segments: bool,
    mask_tile: int = 1,
) -> int:
    """Length of the `workspace` result of `sage_jax_attend` on CUDA (codes as in `docs/abi.md`)."""
    rows = mask_rows(B, T, S, mask_shape, segments, mask_tile)
    if pv != 3 and not f16_accumulate and not segments and math.prod(mask_shape) == 0:
        rows += decode_rows(B, T, S, N, K, Hp)
    return _total(rows)


def attend_queries_bytes(B: int, T: int, S: int, N: int, K: int, Hp: int, **settings) -> int:
    """Length of the `workspace` result of `sage_jax_attend_queries` on CUDA; `settings` as `attend_bytes` takes them.

    The kernels that take queries as they are need no more than those that take codes; for the others there is room for what
    `sage_jax_quantize_q` and `sage_jax_attend` would give.
    """
    rows = ("lse_shift", "q_scale", "lse", "m", "l")
    room = (*((name, "f32", (B, N, T)) for name in rows), ("q8", "s8", (B, N, T, Hp)))
    return attend_bytes(B, T, S, N, K, Hp, **settings) + _total(room)


def attend_backward_bytes(
    B: int,
    T: int,
    S: int,
    N: int,
    K: int,
    Hp: int,
    *,
    backward: int,
    dp: int,
    mask_shape,
    segments: bool,
    mask_tile: int = 1,
) -> int:
    """Length of the `workspace` result of `sage_jax_attend_backward` on CUDA."""
    rows = attend_backward_rows(B, T, S, N, K, Hp, backward=backward, dp=dp)
    return _total(rows) + _total(mask_rows(B, T, S, mask_shape, segments, mask_tile))
