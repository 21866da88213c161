"""The CPU handlers against the specification, called directly through `jax.ffi.ffi_call`."""

from __future__ import annotations

import functools

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from instruction_sets import ISAS
from metrics import assert_same_bits, assert_same_keys_and_values, relative_l2

from sage_jax import _native_cpu, masking, reference
from sage_jax.quantization import QuantizedKV, QuantizedQ
from sage_jax.recipe import PRESETS, padded_head_dim

for _name, _capsule in _native_cpu.registrations().items():
    jax.ffi.register_ffi_target(_name, _capsule, platform="cpu")

PV = {"e4m3": 0, "f16": 1, "bf16": 2, "int8": 3}
DP = {None: 0, "int8": 1, "bf16": 2}
BACKWARD = {"train8": 0, "sagebwd": 1}
F32, S8 = jnp.float32, jnp.int8


def call(name, results, *operands, **attributes):
    """An FFI call whose results are (shape, dtype) pairs, outside of any helper of the package."""
    avals = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results)
    return jax.ffi.ffi_call(name, avals)(*operands, **attributes)


def quantize_kv(k, v, bounds, *, pv, v_range, smooth_k, smooth_v, dp):
    batch, keys, heads, head_dim = k.shape
    padded, tiles = padded_head_dim(head_dim), -(-keys // 64)
    dense, turned = (batch, heads, keys, padded), (batch, heads, padded, 64 * tiles)
    scales, channels = (batch, heads, tiles), (batch, heads, padded)
    pv_type = {"e4m3": jnp.float8_e4m3fn, "f16": jnp.float16, "bf16": jnp.bfloat16, "int8": S8}[pv]
    results = [
        (dense, S8),
        (scales, F32),
        (channels, F32),
        (turned if pv in ("e4m3", "int8") else dense, pv_type),
        (scales if pv == "int8" else channels, F32),
        (channels, F32),
        (dense if dp else (0,), jnp.bfloat16 if dp == "bf16" else S8),
        (scales if dp == "int8" else (0,), F32),
        (channels if dp else (0,), F32),
        (channels[:2] if dp else (0,), F32),
    ]
    attributes = dict(
        pv=np.int32(PV[pv]),
        v_range=np.float32(v_range),
        smooth_k=np.int32(smooth_k),
        smooth_v=np.int32(smooth_v),
        dp=np.int32(DP[dp]),
    )
    return QuantizedKV(*call("sage_jax_quantize_kv", results, k, v, bounds, **attributes))


def quantize_q(q, k_mean, bounds, *, q_block, scale):
    batch, tokens, heads, head_dim = q.shape
    rows = (batch, heads, tokens)
    results = [((*rows, padded_head_dim(head_dim)), S8), (rows, F32), (rows, F32)]
    attributes = dict(q_block=np.int64(q_block), scale=np.float32(scale))
    return QuantizedQ(*call("sage_jax_quantize_q", results, q, k_mean, bounds, **attributes))


def attend(
    qq, kv, masks, *, pv, f16_accumulate, scale, window_left, window_right, head_dim, out_dtype
):
    batch, heads, tokens, _ = qq.q8.shape
    rows = ((batch, heads, tokens), F32)
    return call(
        "sage_jax_attend",
        [((batch, tokens, heads, head_dim), out_dtype), rows, rows, rows],
        *(*qq, kv.k8, kv.k_scale, kv.v_pv, kv.v_scale, kv.v_mean, *masks),
        pv=np.int32(PV[pv]),
        f16_accumulate=np.int32(f16_accumulate),
        scale=np.float32(scale),
        window_left=np.int64(window_left),
        window_right=np.int64(window_right),
        mask_tile=np.int32(1),
    )


def attend_backward(
    qq,
    kv,
    m,
    l,
    out,
    dout,
    dlse,
    masks,
    *,
    backward,
    dp,
    exact_delta,
    scale,
    window_left,
    window_right,
    dtypes,
    with_dlogits=False,
):
    batch, keys = qq.q8.shape[0], kv.k8.shape[2]
    kv_shape = (batch, keys, kv.k8.shape[1], out.shape[-1])
    logits = (*l.shape, keys) if with_dlogits else (0, 0, 0, 0)
    keys_and_values = (kv.k8, kv.k_scale, kv.k_mean, kv.v_dp, kv.v_dp_scale, kv.k_max, kv.v_norm)
    operands = (qq.q8, qq.q_scale, *keys_and_values, kv.v_mean)
    return call(
        "sage_jax_attend_backward",
        [(out.shape, dtypes[0]), (kv_shape, dtypes[1]), (kv_shape, dtypes[2]), (logits, F32)],
        *(*operands, m, l, out, dout, dlse, *masks),
        backward=np.int32(BACKWARD[backward]),
        dp=np.int32(DP[dp]),
        exact_delta=np.int32(exact_delta),
        deterministic=np.int32(0),
        scale=np.float32(scale),
        window_left=np.int64(window_left),
        window_right=np.int64(window_right),
        mask_tile=np.int32(1),
    )


RECIPES = (
    *(recipe for recipe in PRESETS.values() if not recipe.fp4),
    PRESETS["sage2"].replace(name="bf16_values", pv="bf16", smooth_k=False),
    PRESETS["sage2"].replace(name="unsmoothed_values", smooth_v=False),
    PRESETS["train8"].replace(name="train8_exact", dp="bf16", delta="exact"),
    PRESETS["train8"].replace(name="train8_exact_int8", delta="exact", pv="f16"),
    PRESETS["sagebwd"].replace(name="sagebwd_exact", pv="e4m3", delta="exact", q_block=128),
)
# Both sides do the same arithmetic; sums run in another order and exp2 has another last bit, about
# 1e-7. Where that moves a number across a rounding boundary, one code changes: by 6% of itself for
# e4m3. One flip among the ten thousand codes of a small problem moves a result by 2e-4 (seen), at
# most about 1e-3. A wrong rule (a scale, a rounding, a tile) changes all entries and costs 1e-2.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-3, "float16": 1e-3}


def close(actual, expected, dtype, name):
    """Equal where not finite, and relative L2 error within TOLERANCE elsewhere."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, name
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=name)
    error = relative_l2(actual[finite], expected[finite])
    assert error <= TOLERANCE[str(np.dtype(dtype))], f"{name}: relative L2 error {error:.2e}"


def kv_options(recipe, dp="of the recipe"):
    dp = (recipe.dp if recipe.backward else None) if dp == "of the recipe" else dp
    smooth = dict(smooth_k=recipe.smooth_k, smooth_v=recipe.smooth_v)
    return dict(pv=recipe.pv, v_range=recipe.v_range, dp=dp, **smooth)


@functools.lru_cache(maxsize=None)
def expected_forward(case, recipe):
    """The specification's operands and results, with garbage beyond the lengths of the inputs."""
    q, k, v, dout, dlse, masks = cases.make_inputs(case)
    q_len, kv_len = masks.bounds[:, 0, None, None, None], masks.bounds[:, 1, None, None, None]
    beyond_q = jnp.arange(case.T)[None, :, None, None] >= q_len
    beyond_k = jnp.arange(case.S)[None, :, None, None] >= kv_len
    q, dout = jnp.where(beyond_q, jnp.nan, q), jnp.where(beyond_q, jnp.inf, dout)
    k, v = jnp.where(beyond_k, jnp.inf, k), jnp.where(beyond_k, jnp.nan, v)
    kv = jax.jit(functools.partial(reference.quantize_kv, **kv_options(recipe)))(k, v, masks.bounds)
    q_options = dict(q_block=recipe.q_block, scale=case.H**-0.5)
    qq = jax.jit(functools.partial(reference.quantize_q, **q_options))(q, kv.k_mean, masks.bounds)
    window = dict(window_left=case.left, window_right=case.right, scale=case.H**-0.5)
    options = dict(
        pv=recipe.pv,
        f16_accumulate=recipe.pv_accumulator == "f16",
        head_dim=case.H,
        out_dtype=case.dtype,
        **window,
    )
    results = jax.jit(functools.partial(reference.attend, **options))(qq, kv, masks)
    return (q, k, v, dout, dlse, masks), (kv, qq, q_options), (options, window, results)


def check_quantisers(case, recipe):
    (q, k, v, _, _, masks), (kv, qq, q_options), _ = expected_forward(case, recipe)
    assert_same_keys_and_values(quantize_kv(k, v, masks.bounds, **kv_options(recipe)), kv)
    actual = quantize_q(q, kv.k_mean, masks.bounds, **q_options)
    assert_same_bits(actual.q8, qq.q8, "q8")
    assert_same_bits(actual.q_scale, qq.q_scale, "q_scale")
    np.testing.assert_allclose(actual.lse_shift, qq.lse_shift, rtol=1e-5, atol=1e-5)


def check_forward(case, recipe):
    (_, _, _, _, _, masks), (kv, qq, _), (options, _, expected) = expected_forward(case, recipe)
    actual = attend(qq, kv, masks, **options)
    close(actual[0], expected[0], case.dtype, "out")
    for name, x, y in zip(("lse", "m", "l"), actual[1:], expected[1:]):
        close(x, y, "float32", name)


def check_backward(case, recipe, with_dlogits=False, nan_at=None):
    (_, _, _, dout, dlse, masks), (kv, qq, _), (_, window, forward) = expected_forward(case, recipe)
    out, _, m, l = forward
    if nan_at in ("out", "dout"):
        out, dout = (x.at[0, 50, 1, 3].set(jnp.nan) if nan_at == name else x
                     for name, x in (("out", out), ("dout", dout)))  # fmt: skip
    elif nan_at:
        l, dlse = (x.at[0, 1, 50].set(jnp.nan) if nan_at == name else x
                   for name, x in (("l", l), ("dlse", dlse)))  # fmt: skip
    options = dict(
        backward=recipe.backward,
        dp=recipe.dp,
        exact_delta=recipe.delta == "exact",
        dtypes=(case.dtype,) * 3,
        with_dlogits=with_dlogits,
        **window,
    )
    operands = (qq, kv, m, l, out, dout, dlse, masks)
    actual = attend_backward(*operands, **options)
    expected = jax.jit(functools.partial(reference.attend_backward, **options))(*operands)
    for name, x, y in zip(("dq", "dk", "dv", "dlogits"), actual, expected):
        close(x, y, case.dtype if name != "dlogits" else "float32", name)


# The recipes differ in number formats and the cases in masks and shapes, which different code
# handles: all cases under the two defaults, all recipes on the cases with most features.
ALL_RECIPES_ON = ("ragged", "everything")
PAIRS = [
    pytest.param(case, recipe, id=f"{case}-{recipe.name}")
    for case in (*cases.CASES, *cases.BIAS_CASES)
    for recipe in RECIPES
    if recipe.name == "train8" or case.name in ALL_RECIPES_ON
]


@pytest.mark.parametrize("case, recipe", PAIRS)
def test_against_the_specification(case, recipe):
    check_quantisers(case, recipe)
    check_forward(case, recipe)
    if recipe.backward:
        check_backward(case, recipe, with_dlogits=case.bias is not None)


def test_every_instruction_set_of_this_cpu():
    """The portable kernels and, on a CPU with AVX-512, the AVX2 ones would otherwise never run."""
    used = _native_cpu.isa()
    everything = next(case for case in cases.CASES if case.name == "everything")
    newest = None
    try:
        for isa in ISAS:
            if not _native_cpu.select_isa(isa):
                continue
            assert _native_cpu.isa() == isa
            newest = isa
            for recipe in (PRESETS["train8"], PRESETS["sagebwd"], PRESETS["sage1"]):
                check_quantisers(everything, recipe)
                check_forward(everything, recipe)
                if recipe.backward:
                    check_backward(everything, recipe)
    finally:
        assert _native_cpu.select_isa(used)
    assert used == newest
    assert not _native_cpu.select_isa("vax")


@pytest.mark.parametrize("head_dim", [64, 256])
def test_scores_are_the_same_integers_on_every_instruction_set(head_dim, isa):
    """Codes at both ends of their range, of which sums of pairs or quads must not saturate."""
    rng = np.random.default_rng(head_dim)
    q8 = rng.choice([-127, 0, 126, 127], (1, 1, 21, head_dim)).astype(np.int8)
    k8 = rng.choice([-127, -126, 0, 127], (1, 1, 70, head_dim)).astype(np.int8)
    q8[0, 0, 0], q8[0, 0, 1], k8[0, 0, 3], k8[0, 0, 69] = 127, -127, 127, -127
    ones, zeros = (lambda *shape: jnp.ones(shape, F32)), (lambda *shape: jnp.zeros(shape, F32))
    qq = QuantizedQ(jnp.asarray(q8), ones(1, 1, 21), zeros(1, 1, 21))
    v = jnp.zeros((1, 1, head_dim, 128), jnp.float8_e4m3fn)
    channels = ones(1, 1, head_dim)
    kv = QuantizedKV(
        jnp.asarray(k8), ones(1, 1, 2), channels, v, channels, channels,
        jnp.zeros((0,), S8), *(jnp.zeros((0,), F32),) * 3,
    )  # fmt: skip
    unit = np.float32(1 / 8)
    options = dict(pv="e4m3", f16_accumulate=False, scale=unit, head_dim=head_dim, out_dtype=F32)
    top = (q8[0, 0].astype(np.int64) @ k8[0, 0].astype(np.int64).T).max(1).astype(np.float32)
    expected = top * np.float32(unit * np.float32(np.log2(np.e)))
    window = dict(window_left=masking.OPEN, window_right=masking.OPEN)
    m = attend(qq, kv, masking.no_masks(1, 21, 70), **options, **window)[2]
    assert_same_bits(m[0, 0], jnp.asarray(expected), isa)


def awkward(rng, shape, dtype):
    """Zero tiles, constant channels, huge, tiny and denormal magnitudes, ties, NaN and Inf."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, (shape[0], shape[1], 1, 1))
    x[:, 70:100] *= 1e4 if np.dtype(dtype).itemsize == 4 else 10
    x[:, 130:140] *= 1e-20
    x[:, 192:256] = 0
    x[..., 3] = 2.5
    x[..., 5] = 1e-39
    x[:, ::7] = np.round(x[:, ::7] * 4) / 4
    x[0, 20, 0, 1], x[-1, 90, -1, 0], x[0, 200, 0, 2] = np.nan, -np.inf, np.inf
    return jnp.asarray(x.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("pv", list(PV))
def test_quantisers_on_awkward_values(dtype, pv):
    rng = np.random.default_rng(PV[pv])
    k, v, q = (awkward(rng, (2, 300, heads, 48), dtype) for heads in (2, 2, 4))
    bounds = jnp.array([[300, 290, 0], [150, 300, 0]], jnp.int32)
    for dp, smooth_k in (("int8", True), ("bf16", False), (None, True)):
        smooth = dict(smooth_k=smooth_k, smooth_v=pv == "e4m3" and dp != "bf16")
        options = dict(pv=pv, v_range=448.0, dp=dp, **smooth)
        expected = jax.jit(functools.partial(reference.quantize_kv, **options))(k, v, bounds)
        assert_same_keys_and_values(quantize_kv(k, v, bounds, **options), expected)
    for q_block in (1, 50, 64, 512):
        options = dict(q_block=q_block, scale=0.125)
        actual = quantize_q(q, expected.k_mean, bounds, **options)
        wanted = reference.quantize_q(q, expected.k_mean, bounds, **options)
        assert_same_bits(actual.q8, wanted.q8, f"q8, q_block {q_block}")
        assert_same_bits(actual.q_scale, wanted.q_scale, f"q_scale, q_block {q_block}")


@pytest.mark.parametrize("tokens", (200, 1500))
def test_bad_keys_and_bad_values_count_on_their_own(tokens):
    k, v = cases.bad_keys_and_bad_values(tokens)
    bounds = masking.no_masks(1, tokens, tokens).bounds
    options = dict(pv="e4m3", v_range=448.0, smooth_k=True, smooth_v=True, dp="int8")
    assert_same_keys_and_values(quantize_kv(k, v, bounds, **options), reference.quantize_kv(k, v, bounds, **options))


@pytest.mark.parametrize("tokens", (257, 700))
@pytest.mark.parametrize("pv", ("e4m3", "f16"))
def test_values_beyond_the_sample(tokens, pv):
    k, v = cases.values_beyond_the_sample(tokens)
    bounds = masking.no_masks(1, tokens, tokens).bounds
    options = dict(pv=pv, v_range=3.5, smooth_k=True, smooth_v=pv == "e4m3", dp="int8")
    assert_same_keys_and_values(quantize_kv(k, v, bounds, **options), reference.quantize_kv(k, v, bounds, **options))


def test_rows_with_a_value_that_bf16_makes_infinite_have_no_norm():
    k, v = (jnp.asarray(np.random.default_rng(seed).standard_normal((1, 80, 1, 64)), F32) for seed in (1, 2))
    v = v.at[0, 7, 0, 3].set(np.finfo(np.float32).max)
    bounds = masking.no_masks(1, 80, 80).bounds
    options = dict(pv="bf16", v_range=448.0, smooth_k=True, smooth_v=False, dp="bf16")
    expected = reference.quantize_kv(k, v, bounds, **options)
    assert 0 < float(expected.v_norm[0, 0]) < 100
    assert_same_keys_and_values(quantize_kv(k, v, bounds, **options), expected)


@pytest.mark.parametrize("recipe", ["sage2", "sagebwd", "train8"])
def test_nan_reaches_only_the_rows_that_see_it(recipe):
    """A NaN in a key and an Inf in a query under a causal mask."""
    recipe, shape = PRESETS[recipe], (1, 150, 1, 64)
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))
    masks = masking.no_masks(1, 150, 150)
    kv = quantize_kv(k.at[0, 100, 0, 7].set(jnp.nan), v, masks.bounds, **kv_options(recipe))
    qq = quantize_q(
        q.at[0, 30, 0, 0].set(jnp.inf), kv.k_mean, masks.bounds, q_block=recipe.q_block, scale=0.125
    )
    options = dict(pv=recipe.pv, f16_accumulate=False, scale=0.125, head_dim=64, out_dtype=F32)
    results = attend(qq, kv, masks, window_left=masking.OPEN, window_right=0, **options)
    sees_nan = np.arange(150) >= 100
    sees_nan[30] = True
    for name, x in zip(
        ("out", "lse", "l"), (results[0][0, :, 0], results[1][0, 0], results[3][0, 0])
    ):
        nan = np.isnan(np.asarray(x))
        np.testing.assert_array_equal(nan.reshape(150, -1).all(1), sees_nan, err_msg=name)
        np.testing.assert_array_equal(nan.reshape(150, -1).any(1), sees_nan, err_msg=name)


@pytest.mark.parametrize("nan_at", ["l", "out", "dout", "dlse"])
@pytest.mark.parametrize("recipe", ["train8", "sagebwd"])
def test_gradients_of_a_row_with_a_nan(recipe, nan_at):
    case = next(case for case in cases.BIAS_CASES if case.name == "bias_row")
    check_backward(case, PRESETS[recipe], with_dlogits=True, nan_at=nan_at)


@pytest.mark.parametrize("bad", ["k", "v"])
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.backward], ids=lambda r: r.name)
def test_dq_of_a_row_that_sees_bad_keys_only(recipe, bad):
    """Query 0 of a causal mask, whose only key is bad, and queries of a segment of bad keys."""
    q, k, v, dout = (
        jnp.asarray(x, F32)
        for x in np.random.default_rng(3).standard_normal((4, 1, 150, 1, 64))
    )
    which = np.arange(150) % 149 == 0  # keys 0 and 149, in different tiles
    at = jnp.asarray(which)[None, :, None, None]
    k, v = (jnp.where(at, jnp.inf, x) if name == bad else x for name, x in (("k", k), ("v", v)))
    segments = jnp.where(jnp.asarray(which), 1, 2)[None].at[0, 100].set(1)
    masks = masking.no_masks(1, 150, 150)._replace(q_seg=segments, kv_seg=segments)
    kv = quantize_kv(k, v, masks.bounds, **kv_options(recipe))
    qq = quantize_q(q, kv.k_mean, masks.bounds, q_block=recipe.q_block, scale=0.125)
    settings = dict(scale=0.125, window_left=masking.OPEN, window_right=0)
    forward = dict(pv=recipe.pv, f16_accumulate=False, head_dim=64, out_dtype=F32, **settings)
    out, _, m, l = attend(qq, kv, masks, **forward)
    options = dict(backward=recipe.backward, dp=recipe.dp, exact_delta=recipe.delta == "exact")
    options |= dict(dtypes=(F32,) * 3, with_dlogits=True, **settings)
    operands = (qq, kv, m, l, out, dout, jnp.zeros_like(l), masks)
    actual = attend_backward(*operands, **options)
    expected = reference.attend_backward(*operands, **options)
    nan = np.isnan(np.asarray(actual[0]))[0, :, 0]
    np.testing.assert_array_equal(nan.any(1), nan.all(1))
    np.testing.assert_array_equal(np.flatnonzero(nan.all(1)), [0, 100, 149])
    for name, x, y in zip(("dq", "dk", "dv", "dlogits"), actual, expected):
        close(x, y, "float32", name)


def test_same_bits_on_every_run():
    """Threads take work in any order; sums must not notice."""
    case = next(case for case in cases.CASES if case.name == "gqa")
    case = cases.dataclasses.replace(case, name="long_gqa", T=700, S=700, B=1)
    (_, k, v, dout, dlse, masks), (kv, qq, _), (options, window, forward) = expected_forward(
        case, PRESETS["train8"]
    )
    backward = dict(backward="train8", dp="int8", exact_delta=False, dtypes=(F32,) * 3, **window)
    out, _, m, l = forward
    runs = [
        attend(qq, kv, masks, **options)
        + attend_backward(qq, kv, m, l, out, dout, dlse, masks, **backward)
        for _ in range(3)
    ]
    for other in runs[1:]:
        for x, y in zip(runs[0], other):
            assert_same_bits(x, y)


def test_operands_are_checked_with_sentences():
    masks = masking.no_masks(1, 70, 70)
    x = jnp.ones((1, 70, 2, 64))
    sage2 = kv_options(PRESETS["sage2"])
    kv = quantize_kv(x, x, masks.bounds, **sage2)
    qq = quantize_q(x, kv.k_mean, masks.bounds, q_block=1, scale=1.0)
    options = dict(pv="e4m3", f16_accumulate=False, scale=1.0, head_dim=64, out_dtype=F32)
    options |= dict(window_left=masking.OPEN, window_right=masking.OPEN)

    def refused(sentence, qq=qq, kv=kv, masks=masks, **changes):
        with pytest.raises(Exception, match=sentence):
            jax.block_until_ready(attend(qq, kv, masks, **(options | changes)))

    refused(r"`k_scale` is F32\[1, 2, 1\], but must be F32 of shape \[1, 2, 2\]",
            kv=kv._replace(k_scale=kv.k_scale[..., :1]))  # fmt: skip
    refused(r"`v_pv` is F8E4M3FN.* but must be BF16 of shape \[1, 2, 70, 64\]", pv="bf16")
    refused(r"`mask` is PRED\[1, 3, 70, 70\], but must be PRED of shape \[1, 2, 70, 70\] \(or 1",
            masks=masks._replace(mask=jnp.ones((1, 3, 70, 70), bool)))  # fmt: skip
    refused(r"`v_mean` is F32\[1, 2, 32\], but must be F32 of shape \[1, 2, 64\]",
            kv=kv._replace(v_mean=kv.v_mean[..., :32]))  # fmt: skip
    refused("`out` has 100 channels", head_dim=100)
    refused("3 key/value heads", kv=kv._replace(k8=jnp.zeros((1, 3, 70, 64), S8)))
    with pytest.raises(Exception, match="head dimension is 300, but must be 1 to 256"):
        wide = jnp.ones((1, 70, 2, 300))
        rows = ((1, 2, 70), F32)
        call("sage_jax_quantize_q", [((1, 2, 70, 512), S8), rows, rows], wide, kv.k_mean,
             masks.bounds, q_block=np.int64(1), scale=np.float32(1))  # fmt: skip
    with pytest.raises(Exception, match="called with 2 operands and 1 results, but takes 3"):
        call("sage_jax_quantize_q", [((1,), F32)], x, x, q_block=np.int64(1), scale=np.float32(1))
