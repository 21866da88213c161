"""The CUDA kernels against the specification and exact attention: `pytest -m gpu` on a GPU machine.

The specification runs on the host (in float32 as IEEE has it), each operation on the very operands
that the kernel gets, so that what is compared is one kernel and nothing before it. Exact attention
runs there as well: XLA tunes every product for the GPU it compiles for, which takes minutes for
problems of new sizes and milliseconds of use.
"""

import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, make_inputs, values_beyond_the_sample
from metrics import assert_same_bits, assert_same_keys_and_values, relative_l2
from oracle import exact_forward, window
from test_reference import TABLE, VARIANTS, assert_as_accurate_as_the_table, table_problem

from sage_jax import _vjp, accuracy, dot_product_attention, reference
from sage_jax._ffi import Settings, operation
from sage_jax.masking import Masks
from sage_jax.quantization import SAMPLED_VALUES, QuantizedKV, QuantizedQ, sample_tokens
from sage_jax.recipe import PRESETS

pytestmark = pytest.mark.gpu

TRAIN8, SAGEBWD = PRESETS["train8"], PRESETS["sagebwd"]
OTHERS = (
    TRAIN8.replace(pv="bf16", dp="bf16"),
    TRAIN8.replace(pv="f16", delta="exact"),
    TRAIN8.replace(q_block=64, smooth_k=False),
    SAGEBWD.replace(q_block=128, delta="exact"),
)
SOME_CASES = tuple(c for c in CASES if c.name in ("ragged", "gqa", "d128", "everything"))
ALL_RECIPES = (*(r for r in PRESETS.values() if not r.fp4), *OTHERS)
WIDELY_TESTED = (PRESETS["sage1"], TRAIN8, SAGEBWD)  # the others run parts of the same kernels
FORWARD = [
    (c, r) for r in ALL_RECIPES for c in (CASES if r in WIDELY_TESTED else SOME_CASES)
]  # fmt: skip
BACKWARD = [(c, r) for c, r in FORWARD if r.backward]
QUANTISERS = [(c, r) for c, r in FORWARD if c in SOME_CASES or r is TRAIN8]


def by_name(value):
    return value.name


def named(pairs):
    """Parameters; with pytest-xdist one process runs all tests of a pair and computes it once."""

    def parameter(case, recipe):
        name = f"{recipe.name}-{case.name}"
        return pytest.param(case, recipe, id=name, marks=pytest.mark.xdist_group(name))

    return [parameter(*pair) for pair in pairs]


def settings_of(case, recipe, implementation, deterministic=False):
    return Settings(
        recipe=recipe,
        scale=case.H**-0.5,
        window_left=case.left,
        window_right=case.right,
        head_dim=case.H,
        dtype=np.dtype(case.dtype),
        implementation=implementation,
        for_backward=recipe.backward is not None,
        deterministic=deterministic,
    )


def present(operands):
    """The operands with None for what is absent, as operations take them."""
    return [None if x is None or not any(x.shape) else x for x in operands]


def fetched(results):
    return [x if x is None else np.asarray(x) for x in results]


def on_gpu(name, case, recipe, *operands, deterministic=False):
    run = operation(name, settings_of(case, recipe, "cuda", deterministic))
    return fetched(run(*present(operands)))


def host():
    """A context in which JAX computes on the CPU."""
    return jax.default_device(jax.devices("cpu")[0])


def on_host(name, case, recipe, *operands, implementation="reference"):
    with host():
        run = operation(name, settings_of(case, recipe, implementation))
        return fetched(run(*fetched(present(operands))))


@functools.cache
def specified(case, recipe):
    """(inputs of the case, quantized operands and forward results of the specification)."""
    with host():
        inputs = make_inputs(case)
    return inputs, *forward_on_host(case, recipe, inputs)


def on_warpgroups(case, recipe):
    """Whether the kernels for Hopper's warpgroups run it: they look for a running maximum every 128 keys, others every 64."""
    hopper = jax.devices("cuda")[0].compute_capability == "9.0"
    return hopper and recipe.pv != "int8" and not recipe.f16_accumulate and case.H <= 128


@functools.partial(jax.jit, static_argnames=("case", "recipe", "warpgroups", "interpolated"))
def specified_rows(case, recipe, warpgroups, qq, kv, masks, interpolated=False):
    settings = settings_of(case, recipe, "reference")
    return reference.attend(
        qq, kv, masks, pv=recipe.pv, f16_accumulate=recipe.f16_accumulate, scale=settings.scale,
        window_left=settings.window_left, window_right=settings.window_right,
        head_dim=settings.head_dim, out_dtype=settings.dtype,
        key_tile=128 if warpgroups else 64, bounded=warpgroups and recipe.pv == "e4m3",
        interpolated=interpolated,
    )  # fmt: skip


def output_on_host(case, recipe, qq, kv, masks, interpolated=False):
    """The specified output at the running maxima of the kernel that this GPU takes."""
    with host():
        rows = specified_rows(case, recipe, on_warpgroups(case, recipe), qq, kv, masks, interpolated=interpolated)
        return np.asarray(rows[0])


def largest_unit(case, qq, kv):
    """What a unit of the INT8 product changes a logit by, where it is largest.

    A score's offset is rounded to it (sm90/forward_softmax.cuh), so that now and then a probability takes the next e4m3
    code; most of all where a score is the product of one channel.
    """
    return float(np.nanmax(qq.q_scale) * np.abs(kv.k_scale).max() * case.H**-0.5)


def forward_on_host(case, recipe, inputs, implementation="reference"):
    """Quantized operands and forward results (qq, kv, rows)."""
    run = functools.partial(on_host, implementation=implementation)
    q, k, v, _, _, masks = inputs
    kv = QuantizedKV(*run("quantize_kv", case, recipe, k, v, masks.bounds))
    qq = QuantizedQ(*run("quantize_q", case, recipe, q, kv.k_mean, masks.bounds))
    return qq, kv, run("attend", case, recipe, *attend_operands(qq, kv, masks))


def gradients_on_host(case, recipe, inputs):
    """(out, lse, dq, dk, dv) of the CPU handlers.

    tests/test_cpu.py holds them to the specification. They need not be compiled for each size.
    """
    *_, dout, dlse, masks = inputs
    qq, kv, rows = forward_on_host(case, recipe, inputs, implementation="cpu")
    operands = backward_operands(qq, kv, rows, dout, dlse, masks)
    grads = on_host("attend_backward", case, recipe, *operands, implementation="cpu")
    return *rows[:2], *grads[:3]


def attend_operands(qq, kv, masks):
    return *qq, kv.k8, kv.k_scale, kv.v_pv, kv.v_scale, kv.v_mean, *masks


def backward_operands(qq, kv, rows, dout, dlse, masks):
    out, _, m, l = rows
    values = kv.v_dp, kv.v_dp_scale, kv.k_max, kv.v_norm, kv.v_mean
    return qq.q8, qq.q_scale, kv.k8, kv.k_scale, kv.k_mean, *values, m, l, out, dout, dlse, *masks


def assert_agree(actual, expected, bound, name):
    """The same NaNs and infinities; relative L2 distance of the rest below `bound`."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    special = ~np.isfinite(expected)
    assert_same_bits(
        np.where(special, actual, 0), np.where(special, expected, 0), f"{name}: NaN and Inf"
    )
    actual, expected = actual[~special], expected[~special]
    if not expected.any():
        assert not actual.any(), f"{name} should be zero"
    else:
        assert relative_l2(actual, expected) < bound, f"{name}: {relative_l2(actual, expected):.2e}"


ROUNDING = {"float32": 0.0, "bfloat16": 2**-9, "float16": 2**-12}
# Rounding P relative to the maximum of 128 keys or of 64 gives other codes in the tiles before a row's largest score:
# two draws of e4m3's rounding error of P, about .018, on at most all of a short row. (References rise above the maximum
# in longer rows.)
EARLY_TILES = 0.025


def bound_of(recipe, dtype):
    """How far a kernel's sums may be from the specification's.

    The codes are the same but for values within an ulp of a rounding boundary. FP8 matrix units
    keep about 14 bits of a sum, and f16 accumulators 11; results are rounded to the output's dtype.
    """
    kernel = 5e-3 if recipe.f16_accumulate else 3e-3 if recipe.pv == "e4m3" else 1e-3
    return kernel + ROUNDING[dtype]


def gradient_bound(recipe, dtype):
    """The same for gradients, whose products are in e4m3 whatever `pv` is.

    Delta is a sum in any order, so that some codes come out as the next. Where that is one code of the largest G, the
    key's whole gradient moves by 6% of its part: up to 6.6e-3 of all in eight problems like the cases, a tenth of that as
    a rule; seen when Hopper's kernels rounded the offset of a score as well, which they do no more.
    """
    return (1e-2 if recipe.backward == "train8" else 1e-3) + ROUNDING[dtype]


# ------------------------------------------------------------------------ against the specification


@pytest.mark.parametrize("case, recipe", named(QUANTISERS))
def test_quantisers_are_bit_equal(case, recipe):
    (q, k, v, _, _, masks), qq, kv, _ = specified(case, recipe)
    ours = on_gpu("quantize_kv", case, recipe, k, v, masks.bounds)
    assert_same_keys_and_values(ours, kv)
    q8, q_scale, lse_shift = on_gpu("quantize_q", case, recipe, q, kv.k_mean, masks.bounds)
    assert_same_bits(q8, qq.q8, "q8")
    assert_same_bits(q_scale, qq.q_scale, "q_scale")
    np.testing.assert_allclose(lse_shift, qq.lse_shift, rtol=1e-5, atol=1e-5)  # a sum in any order


@pytest.mark.parametrize("recipe", [PRESETS["sage1"], TRAIN8], ids=by_name)
@pytest.mark.parametrize("tokens, dtype", [(300, "float32"), (5000, "bfloat16")])
def test_values_beyond_the_sample(recipe, tokens, dtype):
    """Their heads are written once more; the other heads are not."""
    case = Case("beyond", B=1, T=8, S=tokens, N=3, K=3, H=64, dtype=dtype)
    k, v = (x.astype(dtype) for x in values_beyond_the_sample(tokens))
    bounds = make_inputs(case)[-1].bounds
    expected = QuantizedKV(*on_host("quantize_kv", case, recipe, k, v, bounds))
    assert_same_keys_and_values(on_gpu("quantize_kv", case, recipe, k, v, bounds), expected)


@pytest.mark.parametrize("case, recipe", named(FORWARD))
def test_forward_follows_the_specification(case, recipe):
    (_, _, _, _, _, masks), qq, kv, expected = specified(case, recipe)
    out, lse, m, l = on_gpu("attend", case, recipe, *attend_operands(qq, kv, masks))
    unit = largest_unit(case, qq, kv)
    if not on_warpgroups(case, recipe):
        assert_agree(out, expected[0], bound_of(recipe, case.dtype), "out")
    else:
        specified_out = output_on_host(case, recipe, qq, kv, masks)
        assert_agree(out, specified_out, bound_of(recipe, case.dtype) + 20 * unit, "out")
        assert_agree(out, expected[0], EARLY_TILES, "out at other running maxima")
    for name, actual, one in zip(("lse", "m", "l"), (lse, m, l), expected[1:], strict=True):
        np.testing.assert_allclose(actual, one, rtol=1e-4 + unit, atol=1e-4 + unit, err_msg=name)


@pytest.mark.parametrize("case, recipe", named(BACKWARD))
def test_backward_follows_the_specification(case, recipe):
    (_, _, _, dout, dlse, masks), qq, kv, rows = specified(case, recipe)
    operands = backward_operands(qq, kv, rows, dout, dlse, masks)
    expected = on_host("attend_backward", case, recipe, *operands)
    ours = on_gpu("attend_backward", case, recipe, *operands)
    bound = gradient_bound(recipe, case.dtype)
    for name, actual, one in zip(("dq", "dk", "dv"), ours[:3], expected[:3], strict=True):
        assert_agree(actual, one, bound, name)


@pytest.mark.parametrize("recipe", [PRESETS["sage1"], TRAIN8, OTHERS[1], SAGEBWD], ids=by_name)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_tokens_reach_the_rows_that_see_them(recipe, value):
    case = Case("bad", T=150, S=150, N=4, K=2, right=0)
    q, k, v, dout, dlse, masks = make_inputs(case)
    q, k, v = (
        q.at[0, 9, 1, 5].set(value),
        k.at[0, 70, 0, 3].set(value),
        v.at[1, 100, 1, 0].set(value),
    )
    kv = QuantizedKV(*on_host("quantize_kv", case, recipe, k, v, masks.bounds))
    assert_same_keys_and_values(on_gpu("quantize_kv", case, recipe, k, v, masks.bounds), kv)
    qq = QuantizedQ(*on_host("quantize_q", case, recipe, q, kv.k_mean, masks.bounds))
    rows = on_host("attend", case, recipe, *attend_operands(qq, kv, masks))
    ours = on_gpu("attend", case, recipe, *attend_operands(qq, kv, masks))
    specified_out = rows[0]
    if on_warpgroups(case, recipe):
        specified_out = output_on_host(case, recipe, qq, kv, masks)
    assert_agree(ours[0], specified_out, bound_of(recipe, "float32"), "out")
    sees = np.zeros((2, 150, 4), bool)
    sees[0, 9, 1] = sees[0, 70:, :2] = sees[1, 100:, 2:] = True
    assert (np.isnan(ours[0]).all(-1) == sees).all() and (np.isnan(ours[0]).any(-1) == sees).all()
    # an INT8 tile of sagebwd may spread a NaN over its 64 rows; how far is not specified
    if recipe.backward == "train8":
        operands = backward_operands(qq, kv, rows, dout, dlse, masks)
        expected = on_host("attend_backward", case, recipe, *operands)
        ours = on_gpu("attend_backward", case, recipe, *operands)
        for name, actual, one in zip(("dq", "dk", "dv"), ours[:3], expected[:3], strict=True):
            same = np.isnan(actual) == np.isnan(one)
            if name != "dq":  # the gradient of a bad key itself may be NaN or zero
                same[0, 70, 0] = same[1, 100, 1] = True
            assert same.all(), name


# -------------------------------------------------------------------------- against exact attention


def gradient_program(case, recipe, *, deterministic=False):
    """Compiles, when it is first called, (q, k, v, dout, dlse, masks) -> (out, lse, dq, dk, dv)."""

    @jax.jit
    def run(q, k, v, dout, dlse, masks):
        settings = settings_of(case, recipe, "cuda", deterministic)
        results, pull = jax.vjp(lambda *x: _vjp.attention(settings, *x, masks), q, k, v)
        return *results, *pull((dout, dlse))

    return lambda q, k, v, dout, dlse, masks: run(q, k, v, dout, dlse, Masks(*present(masks)))


def gradients_on_gpu(case, recipe, *inputs, deterministic=False):
    """(out, lse, dq, dk, dv) of the whole call, as a user gets them."""
    return gradient_program(case, recipe, deterministic=deterministic)(*inputs)


def random_case(rng):
    """A problem of random sizes and masks."""
    kv_heads, causal = int(rng.integers(1, 3)), bool(rng.integers(2))
    sizes = {"B": rng.integers(1, 4), "T": rng.integers(1, 400), "S": rng.integers(1, 400)}
    return Case(
        "random",
        **{name: int(size) for name, size in sizes.items()},
        N=kv_heads * int(rng.integers(1, 4)),
        K=kv_heads,
        H=int(rng.integers(1, 257)),
        dtype=str(rng.choice(["bfloat16", "float16", "float32"])),
        left=int(rng.choice([2**30, 2**30, 5, 100])),
        right=0 if causal else int(rng.choice([2**30, 2**30, 3, 70])),
        bottom_right=bool(rng.integers(2)),
        lengths=bool(rng.integers(2)),
        segments=bool(rng.integers(2)),
        mask=tuple(int(x) for x in rng.integers(0, 2, 4)) if rng.integers(2) else None,
        empty_rows=True,
    )


@pytest.mark.parametrize("number", range(16))
def test_random_problems_with_fresh_data(number):
    seed = int(os.environ.get("SAGE_JAX_TEST_SEED", time.time_ns() % 10**9))
    case = random_case(np.random.default_rng((seed, number)))
    recipe = (TRAIN8, SAGEBWD, OTHERS[0], OTHERS[1])[number % 4]
    where = f"{recipe.name}, {case}, set SAGE_JAX_TEST_SEED={seed} to repeat"
    with host():
        inputs = make_inputs(case, seed)
        q, k, v, _, _, masks = inputs
        exact, exact_lse = fetched(exact_forward(q, k, v, masks, **window(case)))
    ours = gradients_on_gpu(case, recipe, *inputs)
    expected = gradients_on_host(case, recipe, inputs)
    bound = {name: gradient_bound(recipe, case.dtype) for name in ("lse", "dq", "dk", "dv")}
    bound["out"] = EARLY_TILES if on_warpgroups(case, recipe) else bound_of(recipe, case.dtype)
    if recipe.delta == "output":  # out is part of dS
        bound["dq"] = bound["dk"] = max(bound["dq"], bound["out"])
    for name, actual, one in zip(("out", "lse", "dq", "dk", "dv"), ours, expected, strict=True):
        assert_agree(actual, one, bound[name], f"{name} of {where}")
    empty = np.isneginf(exact_lse)
    assert (np.isneginf(np.asarray(ours[1])) == empty).all(), where
    assert not np.swapaxes(np.asarray(ours[2], np.float32), 1, 2)[empty].any(), where
    if exact.any():
        assert relative_l2(np.asarray(ours[0], np.float32), exact) < 0.1, where


@pytest.mark.parametrize(
    "data, variant",
    [pytest.param(*row, marks=pytest.mark.xdist_group(row[0])) for row in TABLE],
    ids=lambda x: x,
)
def test_accuracy_table(data, variant):
    """The kernels are as accurate as the specification."""
    with host():
        inputs, sides, _ = table_problem(data)
    case = Case("table", B=1, T=2048, S=2048, N=1, K=1, H=128, right=sides["window_right"])
    results = gradients_on_gpu(case, VARIANTS[variant], *inputs)
    assert_as_accurate_as_the_table(data, variant, results)


@pytest.mark.parametrize("queries, keys", [(256, 131072), (131072, 256)])
def test_long_sequences(queries, keys):
    keys_of_rng = jax.random.split(jax.random.key(3), 4)
    shapes = ((1, n, 1, 64) for n in (queries, keys, keys, queries))
    # Drawn in float32: JAX's bfloat16 normals take few distinct values and have a mean, so that the
    # rounding errors of V, being the same in many tokens, would not average out as the outputs do.
    q, k, v, dout = (
        jax.random.normal(a, s).astype(jnp.bfloat16) for a, s in zip(keys_of_rng, shapes)
    )
    report = accuracy.compare(
        q, k, v, dout=dout, recipes=["sage2", "train8", "sagebwd"], implementation="cuda",
        is_causal=True, causal_alignment="bottom_right" if keys > queries else "top_left",
    )  # fmt: skip
    for errors in report.errors.values():
        for tensor in errors:
            assert errors[tensor].rel_l2 < 0.1, f"\n{report}"


@pytest.mark.parametrize("recipe", [PRESETS["sage2"], PRESETS["sage2"].replace(pv="bf16")], ids=by_name)
@pytest.mark.parametrize(
    "case",
    [
        Case("one query", B=1, T=1, S=20000, N=16, K=4, H=128, dtype="bfloat16", right=0, bottom_right=True),
        Case("lengths", B=3, T=3, S=3000, N=6, K=2, H=64, lengths=True, right=0, bottom_right=True),
        Case("window", B=2, T=16, S=2000, N=4, K=1, H=100, left=900, right=0, bottom_right=True),
    ],
    ids=str,
)  # fmt: skip
def test_few_queries_split_the_keys(case, recipe):
    """Probabilities are rounded relative to other maxima than the specification's. For e4m3 that draws their rounding
    error, .026 rms, anew: sqrt(2) times that is between two draws.
    """
    with host():
        inputs = make_inputs(case)
    qq, kv, expected = forward_on_host(case, recipe, inputs, implementation="cpu")
    rows = on_gpu("attend", case, recipe, *attend_operands(qq, kv, inputs[-1]))
    again = on_gpu("attend", case, recipe, *attend_operands(qq, kv, inputs[-1]))
    for name, actual, repeated, wanted in zip(("out", "lse", "m", "l"), rows, again, expected):
        assert_same_bits(repeated, actual, f"{name}, repeated")
        rough = 0.04 if name == "out" and recipe.pv == "e4m3" else 5e-3 if name == "out" else 1e-5
        assert_agree(actual, wanted, rough, name)


@pytest.mark.parametrize("recipe", [PRESETS["sage2"], PRESETS["sage2"].replace(pv="bf16")], ids=by_name)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_few_queries_and_bad_tokens(head_dim, recipe):
    """A key with a NaN, another with an Inf that the window hides from some queries, a query with a NaN, no keys at all."""
    case = Case(
        "bad", B=3, T=5, S=2500, N=8, K=2, H=head_dim, left=1100, right=0, bottom_right=True, lengths=True,
        empty_rows=True,
    )  # fmt: skip
    with host():
        q, k, v, *rest = make_inputs(case)
        q = q.at[0, 2, 5, 7].set(jnp.nan)
        k = k.at[0, 37, 0, 3].set(jnp.nan)
        v = v.at[1, :, 1, 0].set(jnp.where(jnp.arange(case.S) % 700 == 3, jnp.inf, v[1, :, 1, 0]))
    inputs = (q, k, v, *rest)
    qq, kv, expected = forward_on_host(case, recipe, inputs, implementation="cpu")
    rows = on_gpu("attend", case, recipe, *attend_operands(qq, kv, inputs[-1]))
    poisoned = np.isnan(np.asarray(expected[3]))
    assert poisoned.any() and not poisoned.all()
    for name, actual, wanted in zip(("out", "lse", "m", "l"), rows, expected):
        rough = 0.04 if name == "out" and recipe.pv == "e4m3" else 5e-3 if name == "out" else 1e-5
        if name == "m":  # that of a query with a NaN is open
            actual, wanted = (np.where(poisoned, 0.0, np.asarray(x)) for x in (actual, wanted))
        assert_agree(actual, wanted, rough, name)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("recipe", ["sage2", "sage2pp"])
def test_a_mean_of_the_values_costs_nothing(recipe, head_dim):
    """Relative to the output without it, over so many keys that what the matrix units cut off adds up."""
    with host():
        q, k, v, _ = accuracy.synthetic("normal", jax.random.key(2), tokens=4096, head_dim=head_dim)
        mean = 8 * jax.random.normal(jax.random.key(3), (1, 1, 1, head_dim))
        exact, shifted = accuracy.exact(q, k, v)["o"], v + mean
    out = dot_product_attention(q, k, shifted, recipe=recipe, implementation="cuda")
    assert relative_l2(np.asarray(out) - np.asarray(mean), exact) < 0.06


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [1000, 8192])
def test_sums_of_many_equal_probabilities_stay_finite(keys, head_dim):
    """Scores that are all the same, and the largest values of one sign before those of the other: as sums of e4m3 codes
    with 16 bits, 600 such products would overflow. Codes are the largest there are where the sample has met a third."""
    values = np.where(np.arange(keys) < keys // 2, 1.0, -1.0).astype(np.float32)
    values[np.asarray(sample_tokens(jnp.array([keys]), SAMPLED_VALUES))[0]] /= 3
    exact = np.cumsum(values) / np.arange(1, keys + 1)
    v = jnp.asarray(values)[None, :, None, None] * jnp.ones((1, 1, 1, head_dim))
    q, k = jnp.zeros_like(v), jax.random.normal(jax.random.key(0), v.shape)
    out = dot_product_attention(q, k, v, is_causal=True, recipe="sage2")
    np.testing.assert_allclose(np.asarray(out)[0, :, 0], np.broadcast_to(exact[:, None], (keys, head_dim)), atol=0.03)


@pytest.mark.parametrize("magnitude", [1e-20, 1e4, 1e34])
def test_tiny_and_huge_values_keep_their_relative_accuracy(magnitude):
    q, k, v, dout = accuracy.synthetic("normal", jax.random.key(1), tokens=300, head_dim=64)
    recipes = ["sage1", "train8", "train8:delta=exact", "sagebwd"]
    call = functools.partial(accuracy.compare, q, k, recipes=recipes, implementation="cuda")
    usual, scaled = call(v, dout=dout), call(v * magnitude, dout=dout)
    for label, errors in usual.errors.items():
        for tensor, error in errors.items():
            assert scaled.errors[label][tensor].rel_l2 < 1.1 * error.rel_l2 + 1e-4, f"\n{scaled}"
