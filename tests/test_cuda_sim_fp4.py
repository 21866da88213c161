"""The FP4 kernels, run by the host simulator: the product against the ISA's layout, codes against the specification in
every bit, attention within rounding.
"""

import ctypes
import functools

import ml_dtypes
import numpy as np
import pytest
from cases import CASES
from cuda_sim import fp4 as fp4_sim
from cuda_sim import library as sim
from metrics import assert_same_bits, relative_l2
from test_cpu_fp4 import BARE, SAGE3, compare, expected, problem

from sage_jax import _workspace

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
by_name = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def fp4_library():
    fp4_sim.library()
    yield
    sim.settings()


def packed(numbers, bits):
    """[..., n] integers of so many bits as uint32 words, the first lowest."""
    per_word = 32 // bits
    words = numbers.astype(np.uint64).reshape(*numbers.shape[:-1], -1, per_word)
    return np.sum(words << (np.arange(per_word, dtype=np.uint64) * bits), axis=-1).astype(np.uint32)


@pytest.mark.parametrize("scale_lane", range(4))
def test_product_has_the_fragments_of_the_isa(scale_lane):
    """A 16 × 64 and B 64 × 8 laid out by the PTX ISA's tables, one register after the other."""
    rng = np.random.default_rng(scale_lane)
    a, b = rng.integers(0, 16, (16, 64)), rng.integers(0, 16, (8, 64))
    scale_a, scale_b = (rng.integers(0, 0x7F, (n, 4)).astype(np.uint8) for n in (16, 8))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    words_a, words_b = packed(a, 4), packed(b, 4)  # [rows, 8]: word w holds k = 8w .. 8w + 7
    lanes = [(lane // 4, lane % 4) for lane in range(32)]
    fragments_a = np.array(
        [[words_a[g, t], words_a[g + 8, t], words_a[g, 4 + t], words_a[g + 8, 4 + t]] for g, t in lanes]
    )
    fragments_b = np.array([[words_b[g, t], words_b[g, 4 + t]] for g, t in lanes])
    scales_a, scales_b = (rng.integers(0, 2**32, 32, dtype=np.uint32) for _ in range(2))  # ignored lanes
    for row in range(16):
        scales_a[4 * (row % 8) + row // 8] = packed(scale_a[row], 8)[0]
    for column in range(8):
        scales_b[4 * column + scale_lane] = packed(scale_b[column], 8)[0]
    at = [[(g + 8 * (i // 2), 2 * t + i % 2) for i in range(4)] for g, t in lanes]
    fragments_c = np.array([[c[place] for place in lane] for lane in at], np.float32)

    d = fp4_sim.product(scale_lane, fragments_a, fragments_b, scales_a, scales_b, fragments_c)
    real = lambda codes, scale: E2M1[codes] * np.repeat(  # noqa: E731
        scale.view(ml_dtypes.float8_e4m3fn).astype(np.float64), 16, axis=1
    )
    wanted = real(a, scale_a) @ real(b, scale_b).T
    size = np.abs(real(a, scale_a)) @ np.abs(real(b, scale_b)).T + np.abs(c)
    for lane in range(32):
        for i, place in enumerate(at[lane]):
            assert abs(d[lane, i] - (wanted + c)[place]) <= 2**-21 * size[place]


def run(case, recipe, q, k, v, masks, quantized=None):
    kv = fp4_sim.quantize_kv(
        k, v, masks.bounds, four_or_six=recipe.four_or_six, smooth_k=recipe.smooth_k, smooth_v=recipe.smooth_v
    )
    qq = fp4_sim.quantize_q(
        q, k, kv[3], kv[2], masks.bounds,
        four_or_six=recipe.four_or_six, smooth_q=recipe.smooth_q, scale=case.H**-0.5,
    )  # fmt: skip
    queries, keys_values = quantized or (qq, kv)
    attended = fp4_sim.attend(
        queries, keys_values, masks, scale=case.H**-0.5, window_left=case.left, window_right=case.right,
        head_dim=case.H, out_dtype=np.asarray(q).dtype,
    )  # fmt: skip
    return qq, kv, attended


def check(case, recipe, bad=False):
    queries, keys_values, results = expected(case, recipe, bad)
    qq, kv, attended = run(case, recipe, *problem(case, bad), quantized=(queries, keys_values))
    # Probabilities are divided by scales through logarithms: a few more take the other code.
    compare((qq, kv, attended), (queries, keys_values, results), out_bound=5e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case):
    """The arrangement of warps of architectures with FP4 products and that of the others take turns."""
    sim.settings(architecture=(80, 120)[CASES.index(case) % 2])
    check(case, SAGE3)


@pytest.mark.parametrize("recipe", [SAGE3.replace(name="published", published=True), BARE], ids=lambda r: r.name)
@pytest.mark.parametrize("architecture, schedule", [(80, 1), (120, 7)])
def test_recipes_and_orders_of_threads(recipe, architecture, schedule):
    sim.settings(architecture=architecture, schedule=schedule)
    check(by_name["everything"], recipe)


@pytest.mark.parametrize("name", ["gqa", "segments", "bf16"])
def test_bad_tokens(name):
    check(by_name[name], SAGE3, bad=True)


@pytest.mark.parametrize("magnitude", [1e-20, 1e-30, 1e4, 1e30])
def test_magnitudes(magnitude):
    case = by_name["ragged"]
    q, k, v, masks = problem(case)
    as_float32 = functools.partial(np.asarray, dtype=np.float32)
    operands = (as_float32(q) * magnitude, as_float32(k) * magnitude, as_float32(v) * magnitude)
    from test_cpu_fp4 import run as run_operations

    wanted = run_operations(case, SAGE3, "reference", *operands, masks)
    got = run(case, SAGE3, *operands, masks)
    for side in (0, 1):
        for x, y in zip(got[side][:3], wanted[side][:3], strict=True):
            assert_same_bits(x, y)
    if magnitude == 1e-20:
        assert relative_l2(got[2][0], wanted[2][0]) < 5e-3


@pytest.mark.parametrize("sizes", [(1, 1, 1, 2, 1, 64), (2, 77, 130, 6, 3, 64), (1, 1000, 300, 2, 2, 128)])
def test_the_planned_workspaces_are_what_the_launchers_need(sizes):
    batch, keys, queries, heads, kv_heads, padded = sizes
    shape = sim.Shape(batch, queries, keys, heads, kv_heads, padded, padded)
    for name in ("quantize_kv_fp4", "quantize_q_fp4"):
        needed = getattr(sim.library(), f"sim_{name}_workspace_bytes")(ctypes.byref(shape))
        planned = _workspace.fp4_bytes(name, batch, queries, keys, heads, kv_heads, padded, {})
        assert needed <= planned < needed + 8 * _workspace.ALIGNMENT
