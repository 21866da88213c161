"""The quantising kernels, run by the host simulator, against the specification: bit for bit."""

import ctypes

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_sim import library as sim
from metrics import assert_same_bits, assert_same_keys_and_values

from sage_jax import _workspace, reference

quantize_kv = jax.jit(
    reference.quantize_kv, static_argnames=("pv", "v_range", "smooth_k", "smooth_v", "dp")
)
quantize_q = jax.jit(reference.quantize_q, static_argnames=("q_block", "scale"))


def tensor(seed, shape, dtype, bad=True, offset=3.0):
    """Normal values with an offset per channel, a zero channel and, where there is room, a NaN and an Inf."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) + offset * rng.standard_normal((1, 1, *shape[2:]))
    x[..., -1] = 0.0
    if bad and shape[1] > 20:
        x[0, 5, 0, 0], x[0, 17, -1, -1], x[-1, shape[1] - 1, 0, 0] = np.nan, -np.inf, np.nan
    return jnp.asarray(x, jnp.float32).astype(dtype)


def bounds(batch, queries, keys):
    rows = [[max(1, queries - 9 * i), max(1, keys - 13 * i), 0] for i in range(batch)]
    return np.asarray(rows, np.int32)


@pytest.mark.parametrize(
    "shape, dtype, options",
    [
        ((2, 131, 2, 40), "float32", dict(pv="e4m3", dp="int8")),
        ((1, 700, 1, 128), "bfloat16", dict(pv="e4m3", dp="bf16")),
        ((1, 150, 1, 256), "float16", dict(pv="e4m3", dp="int8", smooth_k=False)),
        ((1, 330, 1, 64), "bfloat16", dict(pv="e4m3", dp=None, smooth_v=False)),
        ((2, 1300, 1, 64), "bfloat16", dict(pv="e4m3", dp="int8")),
        ((1, 1024, 2, 128), "float16", dict(pv="f16", dp="bf16")),
        ((1, 1100, 1, 36), "float32", dict(pv="int8", dp=None)),
        ((1, 300, 1, 128), "bfloat16", dict(pv="int8", dp="bf16")),
        ((1, 70, 2, 200), "float16", dict(pv="f16", dp=None)),
        ((2, 200, 1, 64), "bfloat16", dict(pv="bf16", dp="int8", smooth_k=False)),
        ((1, 90, 1, 33), "float32", dict(pv="int8", dp="int8", smooth_k=False)),
        ((1, 1, 1, 1), "float32", dict(pv="e4m3", dp=None, v_range=3.9375)),
    ],
)  # fmt: skip
def test_keys_and_values(shape, dtype, options):
    defaults = {"v_range": 448.0, "smooth_k": True, "smooth_v": options["pv"] == "e4m3"}
    options = {**defaults, **options}
    k, v = tensor(1, shape, dtype), tensor(2, shape, dtype, bad=False)
    assert np.abs(np.asarray(v, np.float32).mean(1)).max() > 1 or shape[1] == 1
    limits = bounds(shape[0], shape[1], shape[1])
    expected = quantize_kv(k, v, limits, **options)
    for schedule in (0, 1, 4):
        sim.settings(schedule=schedule)
        launches = sim.library().sim_launches()
        actual = sim.quantize_kv(k, v, limits, **options)
        launches = sim.library().sim_launches() - launches
        assert_same_keys_and_values(actual, expected)
        may_exceed = options["pv"] in ("e4m3", "f16") and shape[1] > 256
        assert launches == (2 if may_exceed or options["dp"] else 1)
    sim.settings()


@pytest.mark.parametrize("q_block", (1, 64, 128))
@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 150, 4, 40), "float32"), ((1, 70, 2, 128), "bfloat16"), ((1, 9, 1, 200), "float16")],
)
def test_queries(shape, dtype, q_block):
    batch, queries, heads, head_dim = shape
    q = tensor(3, shape, dtype, offset=0.5)
    padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    mean = np.zeros((batch, max(1, heads // 2), padded), np.float32)
    mean[..., :head_dim] = np.random.default_rng(4).standard_normal((*mean.shape[:2], head_dim))
    limits = bounds(batch, queries, 1)
    expected = quantize_q(q, mean, limits, q_block=q_block, scale=0.3)
    sim.settings(schedule=1)
    actual = sim.quantize_q(q, mean, limits, q_block=q_block, scale=0.3)
    sim.settings()
    assert_same_bits(actual[0], expected.q8, "q8")
    assert_same_bits(actual[1], expected.q_scale, "q_scale")
    # A sum of head_dim products of size 1, in another order.
    np.testing.assert_allclose(actual[2], expected.lse_shift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", (0.0, 1e-35, 1e-20, 1e4, 1e30))
def test_every_magnitude(size):
    k, v = (tensor(seed, (1, 80, 1, 64), "float32", bad=False) * size for seed in (5, 6))
    limits = bounds(1, 80, 80)
    options = dict(pv="e4m3", v_range=448.0, smooth_k=True, smooth_v=True, dp="int8")
    sim.settings()
    actual = sim.quantize_kv(k, v, limits, **options)
    assert_same_keys_and_values(actual, quantize_kv(k, v, limits, **options))


@pytest.mark.parametrize("tokens", (200, 1500))
@pytest.mark.parametrize("pv", ("e4m3", "f16"))
def test_bad_keys_and_bad_values_count_on_their_own(tokens, pv):
    k, v = cases.bad_keys_and_bad_values(tokens)
    limits = bounds(1, tokens, tokens)
    options = dict(pv=pv, v_range=448.0, smooth_k=True, smooth_v=pv == "e4m3", dp="int8")
    sim.settings()
    assert_same_keys_and_values(sim.quantize_kv(k, v, limits, **options), quantize_kv(k, v, limits, **options))


@pytest.mark.parametrize("tokens", (257, 700))
@pytest.mark.parametrize("pv, dtype", (("e4m3", "float32"), ("e4m3", "bfloat16"), ("f16", "float32")))
def test_values_beyond_the_sample(tokens, pv, dtype):
    k, v = (x.astype(dtype) for x in cases.values_beyond_the_sample(tokens))
    limits = bounds(1, tokens, tokens)
    options = dict(pv=pv, v_range=3.5, smooth_k=True, smooth_v=pv == "e4m3", dp="int8")
    expected = quantize_kv(k, v, limits, **options)
    for schedule in (0, 1):
        sim.settings(schedule=schedule)
        assert_same_keys_and_values(sim.quantize_kv(k, v, limits, **options), expected)
    sim.settings()


def test_rows_with_a_value_that_bf16_makes_infinite_have_no_norm():
    k, v = (tensor(seed, (1, 80, 1, 64), "float32", bad=False) for seed in (5, 6))
    v = np.array(v)
    v[0, 7, 0, 3] = np.finfo(np.float32).max
    limits = bounds(1, 80, 80)
    options = dict(pv="bf16", v_range=448.0, smooth_k=True, smooth_v=False, dp="bf16")
    expected = quantize_kv(k, v, limits, **options)
    assert 0 < float(expected.v_norm[0, 0]) < 100
    sim.settings()
    assert_same_keys_and_values(sim.quantize_kv(k, v, limits, **options), expected)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 64), (2, 77, 3, 64), (1, 1000, 2, 128), (3, 65, 1, 256)]
)
def test_the_planned_workspace_is_what_the_launcher_needs(sizes):
    batch, keys, kv_heads, padded = sizes
    shape = sim.Shape(batch, 1, keys, kv_heads, kv_heads, padded, padded)
    needed = sim.library().sim_quantize_kv_workspace_bytes(ctypes.byref(shape))
    planned = _workspace.quantize_kv_bytes(*sizes)
    assert needed <= planned < needed + 4 * _workspace.ALIGNMENT


def test_an_unsupported_block_of_queries_is_refused():
    q, mean = np.zeros((1, 4, 1, 64), np.float32), np.zeros((1, 1, 64), np.float32)
    with pytest.raises(RuntimeError, match="q_block must be 1, 64 or 128"):
        sim.quantize_q(q, mean, bounds(1, 4, 4), q_block=32, scale=1.0)
