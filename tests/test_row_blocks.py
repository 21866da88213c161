"""The order in which persistent forward blocks take row blocks (cuda/common/row_blocks.cuh), on the host."""

import ctypes

import numpy as np
import pytest
from cuda_sim import library as sim

OPEN = 1 << 30
H200 = 132  # multiprocessors


def plan(batch, queries, heads, kv_heads, *, causal, blocks=H200, rows=128, keys=None, head_dim=128):
    """(heads of a group, [turns, blocks, 3] batch row, head and first query, -1 where there is nothing)."""
    keys = keys or queries
    shape = sim.Shape(batch, queries, keys, heads, kv_heads, head_dim, head_dim)
    turns = -(-batch * heads * -(-queries // rows) // blocks)
    taken, group = np.zeros((turns, blocks, 3), np.int32), ctypes.c_int()
    plan_row_blocks = sim.library().sim_row_blocks
    plan_row_blocks.restype = ctypes.c_char_p
    error = plan_row_blocks(
        ctypes.byref(shape), 0 if causal else OPEN, rows, ctypes.c_int64(2 * keys * head_dim), blocks,
        ctypes.byref(group), taken.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    assert error is None
    return group.value, taken


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (2, 300, 6, 2), (1, 16384, 16, 16), (3, 1000, 7, 7), (2, 4096, 32, 8), (1, 129, 40, 1)]
)
def test_every_row_block_is_taken_once(sizes, causal):
    batch, queries, heads, _ = sizes
    group, taken = plan(*sizes, causal=causal)
    assert group >= 1
    found = [tuple(x) for x in taken.reshape(-1, 3).tolist() if x[0] >= 0]
    wanted = [(b, n, row) for b in range(batch) for n in range(heads) for row in range(0, queries, 128)]
    assert sorted(found) == wanted


def busy(taken, queries):
    """Share of the time that blocks work under a causal mask, before the last is done."""
    work = np.where(taken[..., 0] >= 0, taken[..., 2] / 128 + 1 + 1.5, 0).sum(axis=0)
    return work.mean() / work.max()


@pytest.mark.parametrize(
    "sizes, share",
    [((1, 16384, 16, 16), 0.99), ((4, 4096, 16, 16), 0.97), ((16, 1024, 16, 16), 0.96), ((1, 8192, 32, 8), 0.97),
     ((1, 65536, 16, 16), 0.99), ((1, 16384, 32, 32), 0.98)],
)  # fmt: skip
def test_blocks_are_equally_busy_under_a_causal_mask(sizes, share):
    """16 groups of heads of 4 MiB, five at a time, leave an eighth of an H200 idle: the number is chosen."""
    group, taken = plan(*sizes, causal=True)
    assert busy(taken, sizes[1]) >= share
    assert group % (sizes[2] // sizes[3]) == 0  # heads that share keys stay together
    assert plan(*sizes, causal=True)[0] == group


def test_without_a_mask_a_group_fits_the_cache():
    group, _ = plan(1, 16384, 16, 16, causal=False)
    assert group * 2 * 16384 * 128 <= 24 << 20
