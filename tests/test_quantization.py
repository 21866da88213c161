"""The quantisers of the specification: number formats, scale rules, layouts, bad tokens."""

import cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from metrics import assert_same_bits, relative_l2

from sage_jax import quantization as qz
from sage_jax import reference
from sage_jax.masking import full_bounds


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def quantize(k, v, bounds=None, **changes):
    bounds = full_bounds(k.shape[0], 1, k.shape[1]) if bounds is None else bounds
    options = dict(pv="e4m3", dp="int8", v_range=448.0, smooth_k=True) | changes
    options = dict(smooth_v=True) | options
    return jax.jit(lambda *a: reference.quantize_kv(*a, **options))(k, v, bounds)


def dequantized_values(kv, tokens):
    """V as P·V and the mean that is added later see it: float32 [B, K, S, Hp]."""
    v = qz.untranspose_tokens(kv.v_pv.astype(jnp.float32), tokens) * kv.v_scale[:, :, None]
    return v + kv.v_mean[:, :, None]


def test_e4m3_rounding_matches_ml_dtypes():
    x = np.concatenate(
        [np.random.default_rng(0).standard_normal(20000) * 10.0**e for e in range(-4, 3)]
    ).astype(np.float32)
    grid = np.arange(0, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = np.concatenate([x, grid, -grid, (grid[1:] + grid[:-1]) / 2, [448.0, -448.0, 0.0, -0.0]])
    expected = np.clip(x, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    rounded = qz.round_e4m3(jnp.asarray(x, jnp.float32))
    assert_same_bits(rounded.astype(jnp.float8_e4m3fn), expected, "e4m3")
    assert_same_bits(rounded, expected.astype(np.float32), "e4m3 as float32")


def test_e4m3_saturates_and_keeps_nan():
    x = qz.round_e4m3(jnp.array([1e9, -1e9, jnp.inf, jnp.nan], jnp.float32))
    assert x[:3].tolist() == [448.0, -448.0, 448.0] and np.isnan(x[3])


@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1.0, 1e4])
def test_relative_accuracy_does_not_depend_on_magnitude(magnitude):
    k, v = normal(0, 1, 130, 2, 64) * magnitude, normal(1, 1, 130, 2, 64) * magnitude
    kv = quantize(k, v, smooth_k=False, smooth_v=False)
    dequantized = kv.k8.astype(jnp.float32) * qz.expand_tiles(kv.k_scale, 130)[..., None]
    assert relative_l2(dequantized, jnp.swapaxes(k, 1, 2)) < 0.012  # amax/127/sqrt(12) of normal data
    v_back = qz.untranspose_tokens(kv.v_pv.astype(jnp.float32), 130) * kv.v_scale[:, :, None]
    assert relative_l2(v_back, jnp.swapaxes(v, 1, 2)) < 0.03  # e4m3: 2^-4 at most, 2.6% rms


def test_codes_use_the_whole_range():
    kv = quantize(normal(0, 2, 200, 2, 64), normal(1, 2, 200, 2, 64))
    for codes in (kv.k8, kv.v_dp):
        tiles = qz.pad_axis(jnp.abs(codes.astype(jnp.int32)), 2, 64).reshape(2, 2, 4, 64, 64)
        assert (tiles.max(axis=(-1, -2)) == 127).all()


def test_zero_blocks_and_constant_channels_give_zeros_not_nan():
    k = jnp.full((1, 128, 1, 64), 3.0)  # constant: smoothing leaves nothing
    v = normal(1, 1, 128, 1, 64).at[..., 5].set(0.0).at[:, :64].set(0.0)
    kv = quantize(k, v, smooth_v=False)
    assert (kv.k8 == 0).all() and (kv.k_scale == 0).all()
    assert (kv.v_scale[..., 5] == 0).all() and (kv.v_dp_scale[..., 0] == 0).all()
    assert not any(np.isnan(np.asarray(x, np.float32)).any() for x in kv)


def test_smoothing_removes_offsets():
    k, offset = normal(0, 1, 256, 1, 64), 30 * normal(2, 1, 1, 1, 64)
    plain, shifted = quantize(k, k), quantize(k + offset, k)
    assert relative_l2(shifted.k_scale, plain.k_scale) < 0.05
    assert relative_l2(shifted.k_mean, jnp.mean(k + offset, axis=1)) < 2**-8


@pytest.mark.parametrize("size", (128, 256))
def test_the_sample_is_all_of_few_tokens_and_one_of_each_part_of_many(size):
    for valid in (0, 1, size - 1, size):
        assert np.asarray(qz.sample_tokens(jnp.array([valid]), size)).tolist() == [list(range(size))]
    for valid in (size + 1, 2 * size, 1000, 2**14, 2**17 + 5, 2**22 + 77, 2**31 - 1):
        tokens = np.asarray(qz.sample_tokens(jnp.array([valid]), size), np.int64)[0]
        part = np.arange(size) * valid
        assert (part // size <= tokens).all() and (tokens <= (part + valid) // size).all() and tokens[-1] < valid
        assert tokens.tolist() == [(size * i + 79 * i % size) * valid // size**2 for i in range(size)]
    # No period that a sequence could have as well: all places of the parts are met.
    tokens = np.asarray(qz.sample_tokens(jnp.array([size**2]), size))
    assert len(set((tokens % size).ravel().tolist())) == size


def test_means_are_those_of_the_sample():
    k = normal(0, 1, 2100, 1, 64) + 5
    kv = quantize(k, k + 1, jnp.array([[1, 1900, 0]], jnp.int32))
    for mean, size, offset in ((kv.k_mean, 128, 0), (kv.v_mean, 256, 1)):
        rows = np.asarray(k + offset, np.float64)[0, np.asarray(qz.sample_tokens(jnp.array([1900]), size))[0], 0]
        assert np.abs(np.asarray(mean)[0, 0] - rows.mean(0)).max() < 2**-6  # rounded to bf16 near 5


def test_scales_of_values_leave_room_above_the_sample_and_hold_the_largest():
    v = normal(0, 1, 3000, 1, 64)
    sample = np.abs(np.asarray(v)[0, np.asarray(qz.sample_tokens(jnp.array([3000]), 256))[0], 0]).max(0)
    for pv in ("e4m3", "f16"):
        kv = quantize(v, v.at[0, 7, 0, 3].set(100), pv=pv, smooth_v=False)
        limit = np.where(np.arange(64) == 3, 100, 3 * sample).astype(np.float32)
        scale = qz.scale_and_inverse(limit, 448.0) if pv == "e4m3" else qz.power_of_two_below(limit)
        assert_same_bits(kv.v_scale[0, 0], scale[0], pv)


@pytest.mark.parametrize("pv", ("e4m3", "f16"))
def test_values_that_the_sample_has_not_met_are_kept(pv):
    """A cache of zeros but for a few tokens, rare outliers."""
    k, v = cases.values_beyond_the_sample(1000)
    kv = quantize(k, v, pv=pv, v_range=3.5, smooth_v=pv == "e4m3")
    codes = kv.v_pv.astype(jnp.float32)
    codes = qz.untranspose_tokens(codes, 1000) if pv == "e4m3" else codes
    assert jnp.abs(codes).max() <= 3.5
    restored = codes * kv.v_scale[..., None, :]
    wanted = jnp.swapaxes(v, 1, 2) - (kv.v_mean[..., None, :] if pv == "e4m3" else 0)
    largest = jnp.max(jnp.abs(wanted), axis=2, keepdims=True)
    assert (jnp.abs(restored - wanted) <= 2**-4 * jnp.maximum(jnp.abs(wanted), 2**-5 * largest)).all()


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_a_sample_smooths_as_well_as_all_keys(tokens):
    k, offset = normal(0, 1, tokens, 1, 64), 30 * normal(2, 1, 1, 1, 64)
    drift = 2 * jnp.cumsum(normal(3, 1, tokens, 1, 64), axis=1) / tokens**0.5
    for keys in (k, k + drift):
        without = quantize(keys - keys.mean(axis=1, keepdims=True), k, smooth_k=False)
        assert relative_l2(quantize(keys + offset, k).k_scale, without.k_scale) < 0.05


def test_statistics_of_values_do_not_depend_on_keys():
    """A key may be bad where its value is not: such a value counts, as far as scales go."""
    k, v = normal(0, 1, 100, 1, 64), normal(1, 1, 100, 1, 64).at[0, 7].mul(10)
    kv, bad = quantize(k, v), quantize(k.at[0, 7].set(jnp.nan), v)
    for name in ("v_scale", "v_mean"):
        assert_same_bits(getattr(bad, name), getattr(kv, name), name)
    assert (qz.untranspose_tokens(bad.v_pv.astype(jnp.float32), 100)[0, 0, 7] == 0).all()


def test_smoothing_of_values_removes_offsets_from_the_codes_and_nothing_else():
    v, offset = normal(0, 1, 256, 2, 64), 30 * normal(2, 1, 1, 2, 64)
    plain, shifted = quantize(v, v), quantize(v, v + offset)
    without = quantize(v, v + offset, smooth_v=False)
    assert relative_l2(shifted.v_scale, plain.v_scale) < 0.05
    assert relative_l2(shifted.v_mean, jnp.mean(v + offset, axis=1)) < 2**-8
    assert (without.v_mean == 0).all()
    for name in ("k8", "k_scale", "k_mean"):
        assert_same_bits(getattr(shifted, name), getattr(without, name), name)
    assert relative_l2(shifted.v_dp_scale, plain.v_dp_scale) < 0.05
    assert without.v_dp_scale.min() > 5 * shifted.v_dp_scale.max()
    wanted = jnp.swapaxes(v + offset, 1, 2)
    deviations = jnp.swapaxes(v, 1, 2)
    error = lambda kv: jnp.linalg.norm(dequantized_values(kv, 256) - wanted)  # noqa: E731
    assert error(shifted) < 0.03 * jnp.linalg.norm(deviations)
    assert error(without) > 10 * error(shifted)


@pytest.mark.parametrize("bits", range(3))
def test_channel_maxima_are_those_of_the_rounded_differences(bits):
    """What kernels compute from the largest and the smallest value alone."""
    v = normal(bits, 1, 120, 1, 64) + 3 * normal(bits + 9, 1, 1, 1, 64)
    kv = quantize(v, v)
    high, low = jnp.max(v, axis=1), jnp.min(v, axis=1)
    largest = jnp.maximum(high - kv.v_mean, kv.v_mean - low)
    assert_same_bits(kv.v_scale, qz.scale_and_inverse(largest, 448.0)[0])


def test_a_mean_of_v_that_a_sample_can_not_tell_from_zero_stays():
    """Subtracted, it would be more than the output, where that is a mean of many values around zero."""
    v = normal(0, 1, 4096, 1, 128)
    kv = quantize(v, v.at[..., 64:].add(1.0))
    assert (kv.v_mean[..., :64] == 0).all() and (kv.v_mean[..., 64:] != 0).all()


def test_mean_is_a_bf16_value_and_ignores_tokens_past_the_length():
    k, v = normal(0, 2, 150, 2, 64), normal(1, 2, 150, 2, 64)
    bounds = jnp.array([[1, 100, 0], [1, 150, 0]], jnp.int32)
    kv = quantize(k, v, bounds)
    assert (kv.k_mean != 0).all()
    for mean in (kv.k_mean, kv.v_mean):
        assert_same_bits(mean.astype(jnp.bfloat16).astype(jnp.float32), mean)
    poisoned = quantize(k.at[0, 100:].set(jnp.nan), v.at[0, 100:].set(1e30), bounds)
    for name, a, b in zip(kv._fields, kv, poisoned):
        assert_same_bits(b, a, name)
    assert (kv.k8[0, :, 100:] == 0).all()
    assert (qz.untranspose_tokens(kv.v_pv.astype(jnp.float32), 150)[0, :, 100:] == 0).all()


def test_bad_tokens_are_marked_and_leave_the_others_alone():
    k, v = normal(0, 1, 130, 2, 64), normal(1, 1, 130, 2, 64)
    kv = quantize(k.at[0, 7, 0, 3].set(jnp.nan), v.at[0, 70, 1, 9].set(jnp.inf))
    assert kv.k8[0, 0, 7, 0] == -128 and kv.k8[0, 1, 70, 0] == -128
    assert (kv.k_scale < 0).tolist() == [[[True, False, False], [False, True, False]]]
    assert int((kv.k8 == -128).sum()) == 2
    values = qz.untranspose_tokens(kv.v_pv.astype(jnp.float32), 130)
    assert (values[0, 0, 7] == 0).all() and (values[0, 1, 70] == 0).all()
    assert not any(np.isnan(np.asarray(x, np.float32)).any() for x in kv)


def test_a_bad_token_in_a_zero_tile_still_marks_it():
    k = jnp.zeros((1, 64, 1, 64)).at[0, 3, 0, 0].set(jnp.inf)
    kv = quantize(k, k)
    assert kv.k_scale[0, 0, 0] < 0 and kv.k8[0, 0, 3, 0] == -128


def test_transposition_permutes_groups_of_sixteen_and_inverts():
    x = jnp.arange(2 * 70 * 3, dtype=jnp.float32).reshape(2, 70, 3)
    y = qz.transpose_tokens(x)
    assert y.shape == (2, 3, 128)
    assert y[0, 1, :16].tolist() == x[0, qz.PI, 1].tolist()
    assert (y[..., 80:] == 0).all()
    assert_same_bits(qz.untranspose_tokens(y, 70), x)


@pytest.mark.parametrize("q_block", [1, 64, 128])
def test_query_scales_are_per_block(q_block):
    q, bounds = normal(0, 1, 150, 2, 40), jnp.array([[140, 1, 0]], jnp.int32)
    qq = reference.quantize_q(q, jnp.zeros((1, 1, 64)), bounds, q_block=q_block, scale=0.5)
    scale = np.asarray(qq.q_scale)
    assert (scale[..., 140:] == 0).all() and (np.asarray(qq.q8)[..., 140:, :] == 0).all()
    for start in range(0, 140, q_block):
        block = scale[..., start : min(start + q_block, 140)]
        assert (block == block[..., :1]).all()
    expected = np.abs(np.asarray(q[:, :140])).max(axis=-1).swapaxes(1, 2)
    if q_block == 1:
        np.testing.assert_allclose(scale[..., :140], expected / 127, rtol=1e-6)


def test_lse_shift_is_the_removed_logit():
    q, mean = normal(0, 1, 20, 4, 64), normal(1, 1, 2, 64)
    qq = reference.quantize_q(q, mean, full_bounds(1, 20, 1), q_block=1, scale=0.25)
    expected = 0.25 * jnp.einsum("btkgh,bkh->bkgt", q.reshape(1, 20, 2, 2, 64), mean)
    np.testing.assert_allclose(qq.lse_shift, expected.reshape(1, 4, 20), atol=2e-5)


def test_query_with_nan_is_marked_alone():
    q = normal(0, 1, 70, 1, 64).at[0, 5, 0, 2].set(jnp.nan)
    qq = reference.quantize_q(q, jnp.zeros((1, 1, 64)), full_bounds(1, 70, 1), q_block=64, scale=1.0)
    assert np.isnan(np.asarray(qq.q_scale)[0, 0]).nonzero()[0].tolist() == [5]
    assert (qq.q8[0, 0, 5] == 0).all()


def test_f16_values_are_scaled_by_powers_of_two():
    v = normal(0, 1, 64, 1, 64) * 1e6  # beyond half precision's 65504
    kv = quantize(v, v, pv="f16")
    back = kv.v_pv.astype(jnp.float32) * kv.v_scale[:, :, None]
    assert relative_l2(back, jnp.swapaxes(v, 1, 2)) < 2**-11
    assert (jnp.log2(kv.v_scale) % 1 == 0).all()


def test_jit_and_eager_agree_in_every_bit():
    k, v = normal(0, 1, 100, 2, 40, dtype=jnp.bfloat16), normal(1, 1, 100, 2, 40, dtype=jnp.bfloat16)
    eager = reference.quantize_kv(
        k, v, full_bounds(1, 1, 100), pv="e4m3", dp="int8", v_range=448.0, smooth_k=True,
        smooth_v=True,
    )  # fmt: skip
    for name, a, b in zip(eager._fields, quantize(k, v), eager):
        assert_same_bits(a, b, name)
