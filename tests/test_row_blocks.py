"""The order in which persistent forward blocks take row blocks (cuda/common/row_blocks.cuh), on the host."""

import ctypes

import numpy as np
import pytest
from cuda_sim import library as sim

OPEN = 1 << 30
H200 = 132  # multiprocessors


def plan(batch, queries, heads, kv_heads, *, causal, blocks=H200, rows=128, parts=1, lists=False, keys=None, head_dim=128):
    """(heads of a group, [turns, blocks, 4] batch row, head, first query and queries, -1 where there is nothing)."""
    keys = keys or queries
    shape = sim.Shape(batch, queries, keys, heads, kv_heads, head_dim, head_dim)
    most_turns = -(-batch * heads * -(-queries // rows) * parts // blocks)
    most_turns = 4 * most_turns + 2  # lists of short row blocks are longer
    taken, group, turns = np.zeros((most_turns, blocks, 4), np.int32), ctypes.c_int(), ctypes.c_int()
    plan_row_blocks = sim.library().sim_row_blocks
    plan_row_blocks.restype = ctypes.c_char_p
    error = plan_row_blocks(
        ctypes.byref(shape), 0 if causal else OPEN, rows, parts, ctypes.c_int64(2 * keys * head_dim), blocks, lists,
        most_turns, ctypes.byref(group), ctypes.byref(turns), taken.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    assert error is None
    return group.value, taken[: turns.value]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows, parts, lists", [(128, 1, False), (128, 2, True), (192, 3, True), (192, 3, False)])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (2, 300, 6, 2), (1, 16384, 16, 16), (3, 1000, 7, 7), (2, 4096, 32, 8), (1, 129, 40, 1), (16, 1024, 16, 16),
     (1, 200, 3000, 3000)],
)  # fmt: skip
def test_every_query_is_taken_once(sizes, rows, parts, lists, causal):
    batch, queries, heads, _ = sizes
    group, taken = plan(*sizes, causal=causal, rows=rows, parts=parts, lists=lists)
    assert group >= 1
    times = np.zeros((batch, heads, queries + rows), int)
    for b, n, row, count in taken.reshape(-1, 4).tolist():
        if b < 0:
            continue
        assert 0 < count <= rows and row < queries
        assert row % 64 == 0 and (count % 64 == 0 or row + count >= queries)
        times[b, n, row : row + count] += 1
    assert (times[..., :queries] == 1).all()


@pytest.mark.parametrize(
    "sizes, turns",
    [((1, 16384, 16, 16), 10 + 128 / 192), ((4, 4096, 16, 16), 10 + 128 / 192), ((1, 1024, 8, 8), 64 / 192),
     ((1, 192 * 132, 1, 1), 1)],
)  # fmt: skip
def test_last_turn_is_shared_by_more_blocks(sizes, turns):
    """1360 row blocks of 192 queries and 16 of 64 are ten turns of an H200 and two thirds of one, not eleven."""
    _, taken = plan(*sizes, causal=False, rows=192, parts=3)
    assert taken[..., 3].sum(axis=0).max() <= turns * 192


def busy(taken, rows):
    """Share of the time that blocks work under a causal mask, before the last is done.

    A row block costs four tiles of its own, and 64 queries of 192 take three sevenths of the time of all: measured.
    """
    tiles, units = (taken[..., 2] + taken[..., 3]) / 128, -(-taken[..., 3] // 64)
    work = np.where(taken[..., 0] >= 0, (tiles + 4) * (units + 0.5) / (rows // 64 + 0.5), 0).sum(axis=0)
    return work.mean() / work.max()


@pytest.mark.parametrize("rows, parts, lists", [(128, 1, False), (128, 2, True), (192, 3, True)])
@pytest.mark.parametrize(
    "sizes, share",
    [((1, 16384, 16, 16), 0.99), ((4, 4096, 16, 16), 0.97), ((16, 1024, 16, 16), 0.96), ((1, 8192, 32, 8), 0.97),
     ((1, 65536, 16, 16), 0.99), ((1, 16384, 32, 32), 0.98)],
)  # fmt: skip
def test_blocks_are_equally_busy_under_a_causal_mask(sizes, share, rows, parts, lists):
    """16 groups of heads of 4 MiB, five at a time, leave an eighth of an H200 idle: the number is chosen.

    Lists may leave a hundredth more, for heads that are shared by equally many blocks.
    """
    share -= 0.01 if lists else 0
    group, taken = plan(*sizes, causal=True, rows=rows, parts=parts, lists=lists)
    assert busy(taken, rows) >= share
    assert group % (sizes[2] // sizes[3]) == 0  # heads that share keys stay together
    assert plan(*sizes, causal=True, rows=rows, parts=parts, lists=lists)[0] == group


def test_without_a_mask_a_group_fits_the_cache():
    group, _ = plan(1, 16384, 16, 16, causal=False)
    assert group * 2 * 16384 * 128 <= 24 << 20
