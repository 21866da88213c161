"""The forward kernels, run by the host simulator (tests/cuda_sim), against the specification.

Proven here: fragments, layouts, masks, rings of copies and barriers of the very sources that nvcc compiles. Not proven
here: the rounding of the matrix units' own sums, and speed; `pytest -m gpu` is for those.
"""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, make_inputs
from cuda_sim import library as sim
from metrics import assert_same_bits, relative_l2
from oracle import exact_forward

from sage_jax import _workspace, reference
from sage_jax.exponentials import interpolated_exp2
from sage_jax.masking import no_masks
from sage_jax.quantization import QuantizedKV, QuantizedQ
from sage_jax.recipe import PRESETS

EIGHT_BIT = {name: recipe for name, recipe in PRESETS.items() if not recipe.fp4}
RECIPES = {**EIGHT_BIT, "bf16": PRESETS["sage2"].replace(pv="bf16", name="bf16")}
ARCHITECTURES = {"e4m3": (80, 89, 90), "f16": (80,), "bf16": (80,), "int8": (80,)}
BY_NAME = {case.name: case for case in CASES}
# float32 sums in another order, and an ex2 that may move a probability across a rounding boundary:
# one flipped code in a problem of a hundred rows is worth up to 1e-3, a wrong rule 1e-2.
BOUND = 1e-3

specification = jax.jit(
    reference.attend,
    static_argnames=(
        "pv", "f16_accumulate", "scale", "window_left", "window_right", "head_dim", "out_dtype"
    ),
)  # fmt: skip


def quantize(q, k, v, masks, recipe):
    """Quantized on the simulator too: tests/test_cuda_sim_quantize.py proves those bits."""
    kv = sim.quantize_kv(
        k, v, masks.bounds, pv=recipe.pv, v_range=recipe.v_range, smooth_k=recipe.smooth_k,
        smooth_v=recipe.smooth_v, dp=None,
    )  # fmt: skip
    qq = sim.quantize_q(q, kv[2], masks.bounds, q_block=recipe.q_block, scale=q.shape[-1] ** -0.5)
    return QuantizedQ(*qq), QuantizedKV(*kv)


def arguments(recipe, case, dtype):
    return dict(
        pv=recipe.pv, f16_accumulate=recipe.f16_accumulate, scale=case.H**-0.5,
        window_left=case.left, window_right=case.right, head_dim=case.H, out_dtype=np.dtype(dtype),
    )  # fmt: skip


def check(actual, expected):
    """out within the bound; m, l, lse within float32 rounding; infinities, zeros and NaN in the same places."""
    expected = [np.asarray(x) for x in expected]
    poisoned = np.isnan(expected[3])
    for name, a, e in zip(("out", "lse", "m", "l"), actual, expected):
        a, e = a.astype(np.float64), e.astype(np.float64)
        if name == "m":  # the maximum of a poisoned row means nothing
            a, e = np.where(poisoned, 0, a), np.where(poisoned, 0, e)
        special = ~np.isfinite(e) | (e == 0)
        # XLA's CPU code flushes what lies below 1e-38 on the way to a maximum near 0.
        np.testing.assert_allclose(a[special], e[special], rtol=0, atol=1e-30, err_msg=name)
        assert relative_l2(a[~special], e[~special]) < (BOUND if name == "out" else 1e-6), name


def run(case, recipe, inputs=None):
    q, k, v, _, _, masks = inputs or make_inputs(case)
    qq, kv = quantize(q, k, v, masks, recipe)
    kw = arguments(recipe, case, q.dtype)
    expected = specification(qq, kv, masks, **kw)
    for architecture in ARCHITECTURES[recipe.pv]:
        sim.settings(architecture=architecture)
        check(sim.attend(qq, kv, masks, **kw), expected)
    return qq, kv, masks, kw


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_with_e4m3(case):
    run(case, RECIPES["sage2"])


@pytest.mark.parametrize("name", ("ragged", "d128", "d256", "everything"))
@pytest.mark.parametrize("recipe", ("sage1", "bf16", "sage2pp", "sagebwd"))
def test_every_format_of_the_values(recipe, name):
    run(BY_NAME[name], RECIPES[recipe])


@pytest.mark.parametrize("recipe", ("sage2", "sage2pp"))
@pytest.mark.parametrize("head_dim", (40, 64, 128, 200))
def test_a_mean_of_the_values_costs_nothing(recipe, head_dim):
    """Relative to what is left of the output without it: e4m3 of V itself would lose that altogether."""
    case = Case("mean", B=1, T=70, S=190, N=4, K=2, H=head_dim)
    q, k, v, dout, dlse, masks = make_inputs(case)
    mean = 40 * np.random.default_rng(1).standard_normal((1, 1, 2, head_dim)).astype(np.float32)
    qq, kv, masks, kw = run(case, RECIPES[recipe], (q, k, v + mean, dout, dlse, masks))
    exact = exact_forward(q, k, v, masks)[0]
    for architecture in (80, 89, 90):
        sim.settings(architecture=architecture)
        out = sim.attend(qq, kv, masks, **kw)[0]
        assert relative_l2(out - np.repeat(mean, 2, axis=2), exact) < 0.06
    sim.settings()


@pytest.mark.parametrize("recipe", ("sage2", "sagebwd"))
def test_any_order_of_threads_gives_the_same_bits(recipe):
    """A missing barrier or wait would let some order read garbage, which is NaN."""
    case, recipe = BY_NAME["everything"], RECIPES[recipe]
    qq, kv, masks, kw = run(case, recipe)
    first = None
    for schedule in (0, 1, 2, 3):
        sim.settings(schedule=schedule)
        result = sim.attend(qq, kv, masks, **kw)
        first = first or result
        for a, b in zip(result, first):
            assert_same_bits(a, b, f"schedule {schedule}")


@pytest.mark.parametrize("recipe", ("sage2", "sage1", "sagebwd"))
def test_bad_tokens_reach_the_rows_that_see_them_and_no_other(recipe):
    case = Case("bad", T=130, S=200, right=0, bottom_right=True)
    q, k, v, dout, dlse, masks = make_inputs(case)
    q = q.at[0, 7, 0, 3].set(jnp.nan)
    k = k.at[0, 150, 1, 5].set(jnp.inf).at[1, 90, 0, 0].set(jnp.nan)
    v = v.at[1, 199, 1, 63].set(jnp.nan)
    inputs = q, k, v, dout, dlse, masks
    qq, kv, masks, kw = run(case, RECIPES[recipe], inputs)
    out = sim.attend(qq, kv, masks, **kw)[0]
    hit = np.isnan(out).any(axis=-1)  # [B, T, N]; query i sees keys up to i + 70
    assert hit[0, :, 0].nonzero()[0].tolist() == [7]
    assert hit[0, :, 1].nonzero()[0].tolist() == list(range(80, 130))
    assert hit[1, :, 0].nonzero()[0].tolist() == list(range(20, 130))
    assert hit[1, :, 1].nonzero()[0].tolist() == [129]


def test_bad_keys_in_a_zero_tile():
    case = Case("bad_zero", B=1, T=5, S=70, N=1, K=1)
    q, k, v, dout, dlse, masks = make_inputs(case)
    k = jnp.zeros_like(k).at[0, 65, 0, 0].set(jnp.nan)
    run(case, RECIPES["sage2"], (q, k, v, dout, dlse, masks))


@pytest.mark.parametrize("recipe", ("sage2", "sage2pp", "sagebwd"))
@pytest.mark.parametrize("size", (0.0, 1e-20))
def test_zero_and_tiny_inputs(recipe, size):
    case = Case("tiny", B=1, T=40, S=100)
    q, k, v, dout, dlse, masks = make_inputs(case)
    run(case, RECIPES[recipe], (q * size, k * size, v * size, dout, dlse, masks))


def test_huge_scores_stay_in_the_hull_of_the_values():
    """Scores near 1e9, far beyond float32's fraction: the largest must still weigh exactly 1."""
    case, recipe = Case("huge", B=1, T=70, S=300), RECIPES["sage2"]
    q, k, v, _, _, masks = make_inputs(case)
    qq, kv = quantize(q * 1e4, k * 1e4, v, masks, recipe)
    for architecture in (80, 89, 90):
        sim.settings(architecture=architecture)
        out, _, m, l = sim.attend(qq, kv, masks, **arguments(recipe, case, np.float32))
        assert np.isfinite(out).all() and (l >= 1).all() and (m > 1e6).any()
        assert np.abs(out).max() <= float(jnp.abs(v).max()) * 1.04  # e4m3 rounds by up to 1/16


def test_tiles_in_which_nothing_is_visible_are_not_read():
    """Keys of other segments and masked tiles may hold anything: their codes are poisoned here."""
    case = Case("skip", B=1, T=64, S=256, N=1, K=1)
    q, k, v, _, _, _ = make_inputs(case)
    masks = no_masks(1, 64, 256)
    segments = jnp.asarray(np.arange(256)[None] // 128, jnp.int32)
    masks = masks._replace(q_seg=segments[:, 128:192], kv_seg=segments)
    qq, kv = quantize(q, k, v, masks, RECIPES["sage2"])
    poisoned = np.array(kv.v_pv)
    poisoned.view(np.uint8)[..., :128] = 0x7F  # e4m3 NaN
    kw = arguments(RECIPES["sage2"], case, np.float32)
    sim.settings()
    out = sim.attend(qq, kv._replace(v_pv=poisoned), masks, **kw)[0]
    assert_same_bits(out, sim.attend(qq, kv, masks, **kw)[0])
    assert np.isfinite(out).all()


def test_what_does_not_fit_is_refused_with_a_reason():
    case = Case("refused", B=1, T=3, S=3)
    q, k, v, _, _, masks = make_inputs(case)
    qq, kv = quantize(q, k, v, masks, RECIPES["sage1"])
    kw = arguments(RECIPES["sage1"], case, np.float32)
    with pytest.raises(RuntimeError, match="f16 accumulators go with e4m3 only"):
        sim.attend(qq, kv, masks, **{**kw, "f16_accumulate": True})
    sim.settings(architecture=75)
    with pytest.raises(RuntimeError, match="no kernel image"):
        sim.attend(qq, kv, masks, **kw)
    sim.settings()


@pytest.mark.parametrize(
    "which, schedule, error",
    [
        (0, 0, None), (0, 1, None), (1, 0, "wrong"), (2, 0, None), (3, 0, "wrong"),
        (4, 0, "deadlock"), (5, 0, "divergent warp"), (6, 0, "past the block"),
        (7, 0, "past the end of shared memory"),
    ],
)  # fmt: skip
def test_the_simulator_notices_mistakes(which, schedule, error):
    """Kernels with a barrier, a wait or lanes missing, or writing too far: tests/cuda_sim/selftest.cu."""
    sim.settings(schedule=schedule)
    lib = sim.library()
    lib.sim_selftest.restype = ctypes.c_char_p
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    text = lib.sim_selftest(which, ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    sim.settings()
    if error is None or error == "wrong":
        assert text is None
        expected = 2 * (x[::-1] if which < 2 else x)
        assert np.array_equal(out, expected) == (error is None)
    else:
        assert error in text.decode()


DECODING = (
    Case("one query", B=2, T=1, S=1100, N=8, K=2, H=128, right=0, bottom_right=True),
    Case("ragged", B=2, T=5, S=1500, N=6, K=2, H=64, lengths=True, right=0, bottom_right=True, empty_rows=True),
    Case("window", B=1, T=16, S=1030, N=3, K=1, H=80, left=700, right=0, bottom_right=True),
)  # fmt: skip


@pytest.mark.parametrize("name", ["sage2", "bf16"])
@pytest.mark.parametrize("case", DECODING, ids=str)
def test_keys_split_among_blocks(case, name):
    """Few queries, many keys. Probabilities are rounded relative to other maxima than the specification's: for e4m3 that
    draws their rounding error, .026 rms, anew: sqrt(2) times that is between two draws. Everything else, and bf16, must agree as usual.
    """
    recipe = RECIPES[name]
    q, k, v, _, _, masks = make_inputs(case)
    k = k.at[0, 37 if case.K > 1 else case.S - 8, 0, 3].set(jnp.nan)
    qq, kv = quantize(q, k, v, masks, recipe)
    arguments_ = arguments(recipe, case, "float32")
    launches = sim.library().sim_launches()
    out, lse, m, l = sim.attend(qq, kv, masks, **arguments_)
    assert sim.library().sim_launches() - launches == 2
    planned = _workspace.attend_bytes(
        case.B, case.T, case.S, case.N, case.K, qq.q8.shape[-1], pv=recipe.pv_code,
        f16_accumulate=False, mask_shape=(0, 0, 0, 0), segments=False,
    )  # fmt: skip
    assert planned > 0
    expected = [np.asarray(x) for x in specification(qq, kv, masks, **arguments_)]
    assert_same_bits(m, expected[2], "m")
    poisoned = np.isnan(expected[3])
    assert poisoned.any() and not poisoned.all()
    for name_, a, e, bound in zip(
        ("out", "lse", "l"), (out, lse, l), (expected[0], expected[1], expected[3]),
        (0.04 if recipe.pv == "e4m3" else 5e-3, 1e-5, 1e-5),
    ):  # fmt: skip
        special = ~np.isfinite(e)
        assert (np.isnan(a) == np.isnan(e)).all() and (np.isinf(a) == np.isinf(e)).all(), name_
        assert (a[~special] == 0).sum() == (e[~special] == 0).sum(), name_
        assert relative_l2(a[~special], e[~special]) < bound, name_


@pytest.mark.parametrize("name", ["sage2", "bf16", "sage2pp"])
@pytest.mark.parametrize("case", (BY_NAME["bf16"], BY_NAME["everything"], BY_NAME["mqa"], *DECODING[:2]), ids=str)
def test_queries_as_they_come(case, name):
    """Kernels without a quantizer of their own have them quantized beforehand, into the workspace."""
    recipe = RECIPES[name]
    q, k, v, _, _, masks = make_inputs(case)
    qq, kv = quantize(q.at[0, -1, 0, 0].set(jnp.nan), k, v, masks, recipe)
    arguments_ = arguments(recipe, case, "float32")
    launches = sim.library().sim_launches()
    (out,) = sim.attend(q.at[0, -1, 0, 0].set(jnp.nan), kv, masks, **arguments_)
    alone = sim.library().sim_launches() - launches
    assert_same_bits(out, sim.attend(qq, kv, masks, **arguments_)[0], "out")
    assert alone == 1 + sim.library().sim_launches() - launches - alone
    planned = _workspace.attend_queries_bytes(
        case.B, case.T, case.S, case.N, case.K, kv.k8.shape[-1], pv=recipe.pv_code, f16_accumulate=recipe.f16_accumulate,
        mask_shape=masks.mask.shape, segments=masks.q_seg.size > 0,
    )  # fmt: skip
    assert planned >= sim.workspace_bytes(q, kv, masks, **arguments_)


def test_interpolated_exponentials():
    """The bits that the specification's have, but where a float32 rounding puts one on the other side of a step of 1/1024."""
    scores = (32.0 * 224**2 + np.linspace(-4e5, 4e5, 20000)).astype(np.float32)
    for multiplier, maximum in ((3e-4, 110.0), (1e-5, 3.0), (2e-2, 7900.0)):
        multiplier = np.float32(multiplier)
        shift = np.float32(np.float32(-32.0 * 224**2) * multiplier + np.float32(6.0 - maximum))
        x = np.float64(scores) * np.float64(multiplier) + np.float64(shift)
        scores_below = scores[x <= 6]
        ours = sim.interpolate(scores_below, multiplier, shift).astype(np.float32)
        expected = np.asarray(interpolated_exp2(jnp.asarray(x[x <= 6], jnp.float32)))[: len(ours)]
        np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=2.0**-14)
        assert (ours == expected).mean() > (0.99 if multiplier < 1e-2 else 0.9)
    infinite = np.full(2, -np.inf, np.float32)
    assert not sim.interpolate(infinite, np.float32(1e-4), np.float32(0.0)).any()
