"""FP4 attention: the formats bit for bit against ml_dtypes, attention against NumPy and against exact attention."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import BIAS_CASES, CASES, Case, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics import assert_same_bits, relative_l2
from oracle import exact_forward, window

from sage_jax import fp4_formats as fp4
from sage_jax import nvfp4
from sage_jax.accuracy_data import synthetic
from sage_jax.masking import no_masks

F4, UE4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
ALL = ("nvfp4", "mxfp4", "amxfp4")
round_e2m1 = jax.jit(fp4.round_e2m1)
quantize = jax.jit(fp4.quantize, static_argnums=(1, 2))

# --------------------------------------------------------------------------- the formats in NumPy


def e4m3(x):
    """float32 rounded to e4m3 by ml_dtypes, saturating, as float32."""
    return np.minimum(x, np.float32(448)).astype(UE4M3).astype(np.float32)


def e2m1(x):
    """float32 rounded to e2m1 by ml_dtypes, saturating, as float32."""
    return np.clip(x, np.float32(-6), np.float32(6)).astype(F4).astype(np.float32)


def divided(x, scale):
    """x · f32(1/scale); x · 0, with the sign of x, where the scale is 0."""
    inverse = np.float32(1) / np.where(scale == 0, np.float32(1), scale)
    return x * np.where(scale == 0, np.float32(0), inverse)


def block_candidates(blocks, fmt, four_or_six):
    """Scales [..., 1 or size] that a block of float32 [..., size] may have, in the order of preference."""
    top = np.abs(blocks).max(-1, keepdims=True)
    if fmt == "mxfp4":
        exponent = np.frexp(np.where(top == 0, 1, top))[1] - 1 - 2
        return [np.where(top == 0, 2.0**-100, 2.0**exponent).astype(np.float32)]
    if fmt == "amxfp4":
        sides = [
            e4m3(np.maximum(x, 0).max(-1, keepdims=True) * np.float32(1 / 6))
            for x in (blocks, -blocks)
        ]
        return [np.where(blocks < 0, sides[1], sides[0])]
    fractions = (np.float32(1 / 6), np.float32(1 / 4))[: 1 + four_or_six]
    return [e4m3(top * fraction) for fraction in fractions]


def squared_error(blocks, values):
    """Float32 sum over the block of squared differences of 12 significant bits, by halving: [..., 1]."""
    mantissa, exponent = np.frexp(values - blocks)
    x = np.ldexp(np.rint(mantissa * 4096) / np.float32(4096), exponent) ** 2
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x


def rounded_blocks(x, fmt="nvfp4", four_or_six=False):
    """What a quantizer makes of float32 [..., L]: dequantized values."""
    blocks = x.reshape(*x.shape[:-1], -1, 16 if fmt == "nvfp4" else 32)
    results = [e2m1(divided(blocks, s)) * s for s in block_candidates(blocks, fmt, four_or_six)]
    best = results[0]
    for other in results[1:]:
        best = np.where(squared_error(blocks, other) < squared_error(blocks, best), other, best)
    return best.reshape(x.shape)


@st.composite
def arrays_of_blocks(draw):
    """float32 [2, 64] of one of several characters, with exact ties and zeros among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "ties", "heavy", "tiny", "sparse", "huge"]))
    x = rng.standard_normal((2, 64))
    if kind == "ties":  # halfway between neighbours of e2m1, for scales that are powers of two
        x = rng.choice([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], (2, 64)) * rng.choice([-1, 1])
    if kind == "heavy":
        x = x * np.exp(3 * rng.standard_normal((2, 64)))
    if kind == "sparse":
        x = x * (rng.random((2, 64)) < 0.1)
    x = x * {"tiny": 2.0**-9, "huge": 300.0}.get(kind, 1.0)
    return np.clip(x * 2.0 ** draw(st.integers(-4, 8)), -1023, 1023).astype(np.float32)


@given(st.lists(st.floats(-9, 9, width=32), min_size=64, max_size=64))
@settings(max_examples=200, deadline=None)
def test_e2m1_rounding_is_that_of_ml_dtypes(numbers):
    x = np.array(numbers, np.float32)
    assert_same_bits(np.asarray(round_e2m1(x)), e2m1(x))


def test_e2m1_ties_and_every_code():
    values = np.arange(16, dtype=np.uint8).view(F4).astype(np.float32)
    between = np.unique((values[:, None] + values) / 2)
    edges = np.concatenate([values, between, np.nextafter(between, np.float32(9)), [7.9, 1e30]])
    x = np.concatenate([edges, -edges]).astype(np.float32)
    assert_same_bits(np.asarray(fp4.round_e2m1(jnp.asarray(x))), e2m1(x))
    codes = np.arange(16, dtype=np.uint8)
    packed = np.asarray(fp4.pack(jnp.asarray(values)))
    assert_same_bits(packed, codes[::2] | codes[1::2] << 4)
    assert_same_bits(np.asarray(fp4.unpack(jnp.asarray(packed))), values)


@given(arrays_of_blocks())
@settings(max_examples=100, deadline=None)
def test_nvfp4_codes_and_scales_are_those_of_ml_dtypes(x):
    codes, scale = map(np.asarray, quantize(x, "nvfp4"))
    blocks = x.reshape(2, 4, 16)
    expected = e4m3(np.abs(blocks).max(-1) * np.float32(1 / 6))
    assert_same_bits(scale, expected.astype(UE4M3))
    wanted = divided(blocks, expected[..., None]).clip(-6, 6).astype(F4).view(np.uint8)
    wanted = wanted.reshape(2, 64)
    assert_same_bits(codes, wanted[:, ::2] | wanted[:, 1::2] << 4)


@pytest.mark.parametrize("fmt, four_or_six", [*((f, False) for f in ALL), ("nvfp4", True)])
@given(x=arrays_of_blocks())
@settings(max_examples=60, deadline=None)
def test_dequantized_blocks_are_those_of_numpy(fmt, four_or_six, x):
    blocks = quantize(x, fmt, four_or_six)
    got = np.asarray(fp4.dequantize(blocks, fmt))
    np.testing.assert_array_equal(got, rounded_blocks(x, fmt, four_or_six))


def test_four_or_six_never_adds_error_and_four_is_taken_where_five_would_be_needed():
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    errors = {}
    for adaptive in (False, True):
        got = np.asarray(fp4.dequantize(quantize(x, "nvfp4", adaptive), "nvfp4"))
        errors[adaptive] = ((got - x) ** 2).reshape(64, 4, 16).sum(-1)
    # the comparison itself is made with 12 bits of each difference
    assert (errors[True] <= errors[False] * 1.001).all()
    assert errors[True].sum() < 0.9 * errors[False].sum()
    block = np.array([6.0, 4.5] + 14 * [0], np.float32)  # 4.5 of 6 is 3 of 4
    assert np.asarray(quantize(block, "nvfp4", True).scale) == 1.5
    assert np.asarray(quantize(block, "nvfp4", False).scale) == 1.0


@given(st.floats(2.0**-110, 2.0**127, width=32))
@settings(max_examples=50, deadline=None)
def test_tensor_scale_is_a_power_of_two_and_leaves_no_scale_out_of_range(amax):
    scale, inverse = (float(x) for x in fp4.tensor_scale(jnp.float32(amax)))
    assert np.frexp(scale)[0] == 0.5 and scale * inverse == 1
    assert 512 <= np.float32(amax) * inverse < 1024


def test_tensor_scale_of_nothing():
    assert [float(x) for x in fp4.tensor_scale(jnp.float32(2.0**-111))] == [0, 0]


# ----------------------------------------------------------------------------- attention in NumPy

PUBLISHED = dict(fmt="nvfp4", four_or_six=False, smooth_q=True, smooth_k=True, smooth_v=False)
SAGE3 = {**PUBLISHED, "four_or_six": True, "smooth_v": True}
BARE = {**PUBLISHED, "smooth_q": False, "smooth_k": False}


@functools.partial(jax.jit, static_argnames=("numerics", "window_left", "window_right"))
def _attention(q, k, v, masks, scale, *, numerics, window_left, window_right):
    options = dict(numerics)
    smooth = {name: options.pop(name) for name in ("smooth_q", "smooth_k", "smooth_v")}
    smooth_q = smooth.pop("smooth_q")
    kv = nvfp4.quantize_kv(k, v, masks.bounds, **options, **smooth)
    qq = nvfp4.quantize_q(
        q, k, kv.k_mean, kv.k_tensor, masks.bounds, **options, smooth_q=smooth_q, scale=scale
    )
    out = nvfp4.attend(
        qq, kv, masks, fmt=options["fmt"], scale=scale, window_left=window_left,
        window_right=window_right, head_dim=q.shape[-1], out_dtype=q.dtype,
    )  # fmt: skip
    return qq, kv, *out


def attention(q, k, v, masks, numerics=SAGE3, *, scale=None, **window):
    """(qq, kv, out, lse) of the specification."""
    window = {"window_left": 2**30, "window_right": 2**30, **window}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _attention(q, k, v, masks, scale, numerics=tuple(numerics.items()), **window)


def power_of_two_scale(x):
    return 2.0 ** (np.frexp(np.abs(x).max())[1] - 1 - 9)


def bf16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def padded(x, axis, multiple):
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, -x.shape[axis] % multiple)
    return np.pad(x, widths)


def one_head(q, k, v, numerics, scale):
    """FP4 attention of one head, float32 [T, H] and [S, H], S·V over all keys: (out [T, H], lse [T]) in float64.

    Written once more, with dense matrices and ml_dtypes, and online softmax as a loop over tiles of 64 keys.
    """
    fmt, adaptive = numerics["fmt"], numerics["four_or_six"]
    zero = np.zeros(q.shape[1], np.float32)
    k_mean = bf16(k.mean(0)) if numerics["smooth_k"] else zero
    v_mean = bf16(v.mean(0)) if numerics["smooth_v"] else zero
    v_mean = np.where(256 * np.abs(v_mean) < np.abs(v).max(0), 0, v_mean)

    def dequantized(x, axis):
        tensor = np.float32(power_of_two_scale(x))
        x = padded(x / tensor, axis, 64)
        x = x if axis == 1 else x.T
        x = rounded_blocks(np.ascontiguousarray(x), fmt, adaptive).astype(float) * tensor
        return x if axis == 1 else x.T

    keys, values = dequantized(k - k_mean, 1), dequantized(v - v_mean, 0)
    scores = []
    for start in range(0, len(q), 128):
        block = q[start : start + 128]
        mean = bf16(block.mean(0)) if numerics["smooth_q"] else zero
        delta = mean.astype(float) @ (k - k_mean).astype(float).T
        scores.append(dequantized(block - mean, 1) @ keys.T + delta)
    s = np.concatenate(scores) * scale * np.log2(np.e)

    top = np.full((len(q), 1), -np.inf)
    total, out = np.zeros((len(q), 1)), np.zeros((len(q), q.shape[1]))
    for start in range(0, len(k), 64):
        tile = s[:, start : start + 64]
        higher = np.maximum(top, tile.max(-1, keepdims=True))
        old, e = np.exp2(top - higher), np.exp2(tile - higher)
        p = rounded_blocks(padded((e * 2688).astype(np.float32), 1, 64), fmt).astype(float)
        total, out = total * old + e.sum(-1, keepdims=True), out * old
        out, top = out + p @ values[start : start + 64] / 2688, higher
    lse = (top + np.log2(total))[:, 0] * np.log(2) + scale * (q.astype(float) @ k_mean)
    return out / total + v_mean, lse


@pytest.mark.parametrize("fmt", ALL)
@pytest.mark.parametrize("numerics", [BARE, PUBLISHED, SAGE3], ids=["bare", "published", "sage3"])
def test_attention_is_that_of_numpy(numerics, fmt):
    numerics = {**numerics, "fmt": fmt, "four_or_six": numerics["four_or_six"] and fmt == "nvfp4"}
    case = Case("numpy", B=1, T=150, S=190, N=2, K=1, H=64)
    q, k, v, _, _, masks = make_inputs(case)
    _, _, out, lse = attention(q, k, v, masks, numerics, scale=0.2)
    for head in range(2):
        x = (np.asarray(a) for a in (q[0, :, head], k[0, :, 0], v[0, :, 0]))
        expected, expected_lse = one_head(*x, numerics, 0.2)
        # A probability on a rounding boundary may take the neighbouring code: 1e-4 of the result.
        # A wrong rule (another mean, scale or tile) costs 1e-2.
        assert relative_l2(out[0, :, head], expected) < 2e-3
        np.testing.assert_allclose(lse[0, head], expected_lse, atol=1e-4)


# ------------------------------------------------------------------------------- exact attention


@pytest.mark.parametrize("case", CASES + BIAS_CASES, ids=str)
def test_near_exact_attention_under_every_mask(case):
    q, k, v, _, _, masks = make_inputs(case)
    exact, exact_lse = exact_forward(q, k, v, masks, **window(case))
    _, _, out, lse = attention(q, k, v, masks, **window(case))
    assert out.dtype == q.dtype and np.isfinite(np.asarray(out, np.float32)).all()
    assert relative_l2(out, exact) < 0.2
    empty = np.isneginf(np.asarray(exact_lse))
    assert empty.any() == case.empty_rows
    assert (np.isneginf(np.asarray(lse)) == empty).all()
    assert (np.asarray(jnp.swapaxes(out, 1, 2), np.float32)[empty] == 0).all()
    # FP4 moves a logit by about 10% of its spread, and rows that see one key have nothing to average
    assert np.abs(np.asarray(lse - exact_lse)[~empty]).max(initial=0.0) < 1.0
    assert np.abs(np.asarray(lse - exact_lse)[~empty]).mean() < 0.12


@pytest.mark.parametrize("recipe", [PUBLISHED, SAGE3], ids=["published", "sage3"])
@pytest.mark.parametrize("spread", [0.0, 2.0**-9, 2.0**-14, 2.0**-24])
def test_queries_that_are_almost_their_mean_keep_the_product_with_the_mean(recipe, spread):
    """Where Q less its mean is (almost) zero, ΔS is all there is."""
    case = Case("alike", B=1, T=130, S=150, N=2, K=1)
    q, k, v, _, _, masks = make_inputs(case)
    q = 8 * q[:, :1].astype(jnp.bfloat16).astype(jnp.float32) + spread * q
    exact, exact_lse = exact_forward(q, k, v, masks, **window(case))
    _, _, out, lse = attention(q, k, v, masks, recipe)
    assert relative_l2(out, exact) < 0.2  # P and V in FP4; the mean of V is 1.0 away
    assert np.abs(np.asarray(lse - exact_lse)).max() < 1e-3 + 2 * spread


def test_a_mean_far_above_what_is_left_does_not_overflow():
    case = Case("far", B=1, T=128, S=70, N=1, K=1)
    q, k, v, _, _, masks = make_inputs(case)
    q = q * 1e-25 + jnp.float32(2.0**40)  # whose mean rounds to itself
    _, _, out, lse = attention(q, k, v, masks, SAGE3)
    assert np.isfinite(np.asarray(out)).all() and np.isfinite(np.asarray(lse)).all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_token_reaches_the_rows_that_see_it_and_no_other(where, bad):
    case = Case("causal", B=1, T=150, S=150, N=4, K=2, right=0)
    q, k, v, _, _, masks = make_inputs(case)
    clean = attention(q, k, v, masks, **window(case))[2]
    arrays = dict(q=q, k=k, v=v)
    arrays[where] = arrays[where].at[0, 70, 1, 5].set(bad)
    _, _, out, lse = attention(*arrays.values(), masks, **window(case))
    sees = np.zeros((1, 150, 4), bool)
    if where == "q":
        sees[:, 70, 1] = True
    else:
        sees[:, 70:, 2:] = True
    assert (np.isnan(np.asarray(out)) == sees[..., None]).all()
    assert (np.isnan(np.asarray(lse)).swapaxes(1, 2) == sees).all()
    # means move by what one token was worth, and with them every code
    assert relative_l2(np.asarray(out)[~sees], np.asarray(clean)[~sees]) < 0.2


def test_contents_past_the_lengths_are_never_used():
    case = Case("lengths", B=1, T=200, S=150)
    q, k, v, _, _, masks = make_inputs(case)
    masks = masks._replace(bounds=jnp.array([[140, 100, 0]], jnp.int32))
    dirty = q.at[:, 140:].set(jnp.nan), k.at[:, 100:].set(1e30), v.at[:, 100:].set(jnp.inf)
    for got, expected in zip(attention(*dirty, masks)[2:], attention(q, k, v, masks)[2:]):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1e4])
def test_tiny_and_huge_values_keep_their_relative_accuracy(magnitude):
    """Keys too: what they lose the softmax scale brings back."""
    q, k, v, _, _, masks = make_inputs(Case("plain", B=1, T=140, S=200))
    one = attention(q, k, v, masks)[2]
    scale = q.shape[-1] ** -0.5 / magnitude
    out = attention(q, k * magnitude, v * magnitude, masks, scale=scale)[2]
    exact = exact_forward(q, k, v, masks)[0]
    assert relative_l2(out / magnitude, exact) < 1.05 * relative_l2(one, exact) < 0.2


# d = 128, 2048 tokens, one head: relative L2 errors of O in the design's table, for the recipe
# as published, and the bars set for the default.
TABLE = {"normal": (0.189, 0.179), "outlier": (0.0525, 0.0265), "sharp": (0.334, 0.315)}


@functools.cache
def table_problem(kind, tokens=2048):
    q, k, v, _ = synthetic(kind, jax.random.key(0), tokens=tokens, head_dim=128)
    masks = no_masks(1, tokens, tokens)
    return q, k, v, masks, exact_forward(q, k, v, masks)[0]


@pytest.mark.parametrize("kind", TABLE)
def test_accuracy_table(kind):
    *operands, exact = table_problem(kind)
    published, ours = TABLE[kind]
    assert relative_l2(attention(*operands, PUBLISHED)[2], exact) == pytest.approx(
        published, rel=0.02
    )
    assert relative_l2(attention(*operands, SAGE3)[2], exact) <= ours


def test_each_choice_earns_its_place():
    """nvfp4 against the other formats, two-sided ones too, and smoothing, on data with outliers."""
    *operands, exact = table_problem("outlier", 768)
    error = {f: relative_l2(attention(*operands, {**PUBLISHED, "fmt": f})[2], exact) for f in ALL}
    assert error["nvfp4"] < 0.8 * error["amxfp4"] < 0.8 * error["mxfp4"]
    without = {
        name: relative_l2(attention(*operands, {**SAGE3, name: False})[2], exact)
        for name in ("four_or_six", "smooth_q", "smooth_k", "smooth_v")
    }
    ours = relative_l2(attention(*operands, SAGE3)[2], exact)
    assert all(ours < 0.98 * error for error in without.values()), (ours, without)
