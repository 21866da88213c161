"""The quantized cache: decoding gives what full attention gives, and costs half a bf16 cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sage_jax import decode
from sage_jax.quantization import round_e4m3

# Relative L2 error of attention over INT8 tokens against exact attention on normal data: 0.7% from
# V and 0.3 to 0.4% from K (sigma 1). Measured 0.0070 to 0.0079; bf16 arithmetic adds 0.003.
BOUND = {"float32": 0.010, "bfloat16": 0.013}


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def error(out, exact):
    out, exact = (np.asarray(x, np.float64) for x in (out, exact))
    return np.linalg.norm(out - exact) / np.linalg.norm(exact)


def exact_attention(q, k, v, **kwargs):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, **kwargs)


def inputs(batch, tokens, heads, kv_heads, head_dim, dtype=jnp.float32, offset=3.0):
    """q, k, v of normal data; every channel of k has an offset, as real keys do."""
    q = normal(0, batch, tokens, heads, head_dim, dtype=dtype)
    k = normal(1, batch, tokens, kv_heads, head_dim) + offset * normal(2, kv_heads, head_dim)
    v = normal(3, batch, tokens, kv_heads, head_dim, dtype=dtype)
    return q, k.astype(dtype), v


def filled(k, v, capacity=None, **kwargs):
    """A cache that got all tokens in one append."""
    batch, tokens, kv_heads, head_dim = k.shape
    cache = decode.init_cache(batch, capacity or tokens, kv_heads, head_dim, **kwargs)
    return append(cache, k, v)


append = jax.jit(decode.append)  # fewer compilations than op by op
attend = jax.jit(decode.attend, static_argnames=("is_causal", "local_window_size"))


@functools.partial(jax.jit, donate_argnums=0)
def step(cache, q, k, v):
    cache = decode.append(cache, k, v)
    return cache, decode.attend(cache, q)


@pytest.mark.parametrize(
    "dtype,heads,kv_heads,head_dim,prompt,ragged",
    [
        ("float32", 4, 2, 64, 17, False),
        ("float32", 3, 1, 40, 1, True),
        ("bfloat16", 4, 4, 128, 1, False),
        ("bfloat16", 4, 2, 64, 17, True),
    ],
)
def test_steps_equal_full_causal_attention(dtype, heads, kv_heads, head_dim, prompt, ragged):
    tokens = 33
    q, k, v = inputs(2, tokens, heads, kv_heads, head_dim, jnp.dtype(dtype))
    cache = decode.init_cache(2, tokens + 3, kv_heads, head_dim, ragged=ragged)
    cache, out = step(cache, q[:, :prompt], k[:, :prompt], v[:, :prompt])
    outs = [out]
    for t in range(prompt, tokens):
        cache, out = step(cache, *(x[:, t : t + 1] for x in (q, k, v)))
        outs.append(out)
    out = jnp.concatenate(outs, axis=1)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert np.all(np.asarray(cache.length) == tokens)
    assert error(out, exact_attention(q, k, v, is_causal=True)) < BOUND[dtype]


def test_one_append_writes_what_many_write():
    q, k, v = inputs(2, 20, 2, 2, 64)
    first = append(decode.init_cache(2, 24, 2, 64), k[:, :8], v[:, :8])
    many = first
    for t in range(8, 20):
        many = append(many, k[:, t : t + 1], v[:, t : t + 1])
    once = append(first, k[:, 8:], v[:, 8:])
    for a, b in zip(once, many, strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(once.k_mean - k[:, :8].mean(1)).max()) < 1e-5


def test_smoothing_removes_a_common_offset_of_the_keys():
    q, k, v = inputs(1, 64, 1, 1, 64, offset=30.0)
    exact = exact_attention(q, k, v)
    smoothed = append(decode.init_cache(1, 64, 1, 64), k[:, :9], v[:, :9])
    plain = smoothed._replace(k_mean=jnp.zeros_like(smoothed.k_mean))
    smoothed, plain = (append(c, k[:, 9:], v[:, 9:]) for c in (smoothed, plain))
    assert error(attend(smoothed, q, is_causal=False), exact) < 0.015
    # The same appended unsmoothed: codes as coarse as the offset. Rows 0:9 keep their own codes and
    # would need the mean, so only the keys appended later are compared.
    later = jnp.arange(64) >= 9
    args = dict(is_causal=False, mask=later)
    exact = exact_attention(q, k[:, 9:], v[:, 9:])
    assert error(attend(plain, q, **args), exact) > 0.05
    assert error(attend(smoothed, q, **args), exact) < 0.015


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "heavy tokens", "outlier channels"])
def test_int8_values_are_more_accurate_than_e4m3(kind):
    rng = np.random.default_rng(0)
    v = rng.standard_normal((512, 64))
    if kind == "heavy tails":
        v = rng.standard_t(4, v.shape)
    if kind == "heavy tokens":
        v = v * np.exp(0.7 * rng.standard_normal((512, 1)))
    if kind == "outlier channels":
        v[:, :4] += 10 * rng.standard_normal(4)
    v = jnp.asarray(v, jnp.float32)
    codes, scale = decode._int8_tokens(v)
    amax = jnp.abs(v).max(1, keepdims=True)
    e4m3 = round_e4m3(v * (448 / amax)) * (amax / 448)
    p = jax.nn.softmax(normal(7, 32, 512))
    assert error(p @ (codes * scale[:, None]), p @ v) < 0.75 * error(p @ e4m3, p @ v)


@pytest.mark.parametrize("head_dim,ratio", [(64, 0.534), (128, 0.518)])
def test_bytes_against_a_bf16_cache(head_dim, ratio):
    cache = decode.init_cache(2, 512, 4, head_dim)
    bf16 = 2 * 2 * 2 * 512 * 4 * head_dim
    assert cache.nbytes == sum(x.nbytes for x in cache)
    assert 0.5 < cache.nbytes / bf16 < ratio


@pytest.mark.parametrize("ragged", [False, True])
def test_append_writes_into_the_donated_buffers(ragged):
    q, k, v = inputs(2, 1, 2, 2, 64)
    cache = decode.init_cache(2, 256, 2, 64, ragged=ragged)
    compiled = step.lower(cache, q, k, v).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache.nbytes
    new, _ = step(cache, q, k, v)
    assert all(x.is_deleted() for x in cache)
    assert np.all(np.asarray(new.length) == 1)


def test_ragged_writes_index_the_leading_axes():
    # XLA's GPU compiler transposes the whole buffer of a scatter along any others.
    q, k, v = inputs(2, 1, 2, 2, 64)
    traced = append.trace(decode.init_cache(2, 8, 2, 64, ragged=True), k, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    dims = "input_batching_dims = [0, 1], scatter_indices_batching_dims = [0, 1], scatter_dims_to"
    assert text.count(dims) == text.count('stablehlo.scatter"') == 4


def test_grouped_heads_are_not_repeated():
    batch, tokens, heads, capacity, head_dim = 2, 1, 8, 96, 64
    cache = decode.init_cache(batch, capacity, 1, head_dim)
    query = normal(0, batch, tokens, heads, head_dim)
    jaxpr = jax.make_jaxpr(decode.attend)(cache, query)
    largest = max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)
    assert largest <= max(cache.k8.size, batch * heads * tokens * capacity)


def test_bf16_queries_make_bf16_products_on_gpus():
    cache = decode.init_cache(2, 96, 1, 64)
    lowered = jax.jit(decode.attend).trace(cache, normal(0, 2, 1, 8, 64, dtype=jnp.bfloat16))
    cuda, cpu = (lowered.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu"))
    products = [line for line in cuda.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("bf16" in line for line in products)
    assert not any("bf16" in line for line in cpu.splitlines() if "dot_general" in line)


def test_overflow_is_refused_or_gives_nan():
    q, k, v = inputs(2, 5, 2, 2, 64)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of capacity 4 .* holds 0"):
        jax.jit(decode.append)(decode.init_cache(2, 4, 2, 64), k, v)
    cache = filled(k, v, capacity=8, ragged=True)
    with pytest.raises(ValueError, match="capacity 8 that holds 5 already"):
        decode.append(cache, k, v)
    # Under jit only row 1, which gets 4 more tokens, becomes overfull.
    cache = jax.jit(decode.append)(cache, k[:, :4], v[:, :4], lengths=jnp.array([2, 4]))
    out = np.asarray(attend(cache, q[:, :1]))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_ragged_prompts_equal_each_row_alone():
    q, k, v = inputs(3, 12, 2, 1, 64)
    lengths = [12, 5, 1]
    cache = decode.init_cache(3, 16, 1, 64, ragged=True)
    cache = append(cache, k, v, lengths=jnp.array(lengths))
    prompt = attend(cache, q, positions=jnp.arange(12))
    qn, kn, vn = inputs(3, 1, 2, 1, 64, offset=-2.0)
    cache = append(cache, kn, vn)
    out = attend(cache, qn)
    np.testing.assert_array_equal(cache.length, [13, 6, 2])
    for b, n in enumerate(lengths):
        alone = filled(k[b : b + 1, :n], v[b : b + 1, :n], capacity=16)
        expected = attend(alone, q[b : b + 1, :n])
        np.testing.assert_allclose(prompt[b, :n], expected[0], atol=1e-5)
        alone = append(alone, kn[b : b + 1], vn[b : b + 1])
        np.testing.assert_allclose(out[b], attend(alone, qn[b : b + 1])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[2, 8], [0, 3], [6, 0]])
@pytest.mark.parametrize("put", [decode.append, append])
def test_padding_past_the_end_of_a_cache_overwrites_nothing(put, lengths):
    q, k, v = inputs(2, 18, 2, 1, 64)
    first, many = [10, 8], [10 + lengths[0], 8 + lengths[1]]
    cache = decode.init_cache(2, 16, 1, 64, ragged=True)
    cache = put(cache, k[:, :10], v[:, :10], lengths=jnp.array(first))
    cache = put(cache, k[:, 10:], v[:, 10:], lengths=jnp.array(lengths))
    np.testing.assert_array_equal(cache.length, many)
    out = attend(cache, q[:, :1])
    for b, n in enumerate(lengths):
        row = slice(b, b + 1)
        alone = filled(k[row, : first[b]], v[row, : first[b]], capacity=16)
        alone = append(alone, k[row, 10 : 10 + n], v[row, 10 : 10 + n])
        for got, expected in zip(cache[:4], alone[:4], strict=True):
            np.testing.assert_array_equal(got[b, :, : many[b]], expected[0, :, : many[b]])
        np.testing.assert_allclose(out[b], attend(alone, q[row, :1])[0], atol=1e-5)


@pytest.mark.parametrize("put", [decode.append, append])
def test_a_padded_prompt_may_be_longer_than_the_cache(put):
    q, k, v = inputs(2, 18, 2, 1, 64)
    empty = decode.init_cache(2, 16, 1, 64, ragged=True)
    cache = put(empty, k, v, lengths=jnp.array([3, 16]))
    np.testing.assert_array_equal(cache.v8, filled(k[:, :16], v[:, :16]).v8)
    np.testing.assert_array_equal(cache.length, [3, 16])


def test_the_room_that_is_checked_is_that_of_the_tokens_that_count():
    q, k, v = inputs(2, 8, 2, 2, 64)
    cache = decode.append(decode.init_cache(2, 12, 2, 64, ragged=True), k, v, lengths=[8, 3])
    np.testing.assert_array_equal(decode.append(cache, k, v, lengths=[4, 8]).length, [12, 11])
    jax.jit(lambda k, n: decode.append(cache, k, k, lengths=n))(k, jnp.array([4, 8]))
    for wrap in (lambda f: f, jax.jit):  # a program knows a cache that it closes over
        for lengths, tokens in (([5, 8], 5), (None, 8)):
            with pytest.raises(ValueError, match=f"{tokens} tokens do not .* 12 that holds 8"):
                wrap(lambda k: decode.append(cache, k, k, lengths=lengths))(k)


def test_the_number_of_tokens_may_be_symbolic():
    (t,) = jax.export.symbolic_shape("t", constraints=["t <= 8"])
    x = jax.ShapeDtypeStruct((2, t, 2, 64), jnp.float32)
    for ragged in (False, True):
        jax.export.export(append)(decode.init_cache(2, 8, 2, 64, ragged=ragged), x, x)


@pytest.mark.parametrize(
    "lengths,counted",
    [
        ([9, -3], [4, 0]),
        (np.array([2**32 + 1, -(2**32)]), [4, 0]),
        (np.array([2**63, 2], np.uint64), [4, 2]),
        (jnp.array([2**32 - 1, 3], jnp.uint32), [4, 3]),
        (jnp.array([7, -8], jnp.int4), [4, 0]),
        ((jnp.int32(3), 0), [3, 0]),
    ],
)
def test_lengths_are_clipped_to_the_tokens_there_are(lengths, counted):
    q, k, v = inputs(2, 4, 2, 2, 64)
    cache = decode.init_cache(2, 8, 2, 64, ragged=True)
    given, expected = (decode.append(cache, k, v, lengths=n) for n in (lengths, np.array(counted)))
    for a, b in zip(given, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert given.length.dtype == jnp.int32 and given.length.tolist() == counted
    if not isinstance(lengths, np.ndarray):  # jit itself would narrow them
        assert append(cache, k, v, lengths=lengths).length.tolist() == counted


@pytest.mark.parametrize("xp", [np, jnp])
def test_narrow_lengths_of_a_long_prompt(xp):
    k, cache = normal(0, 2, 300, 1, 8), decode.init_cache(2, 300, 1, 8, ragged=True)
    cache = append(cache, k, k, lengths=xp.array([127, -5], np.int8))
    np.testing.assert_array_equal(cache.length, [127, 0])


@pytest.mark.parametrize(
    "window,expected",
    [
        (3, (3, 3)),
        (np.int64(3), (3, 3)),
        ((5, 0), (5, 0)),
        ((None, 2), (64, 2)),
        ((2, None), (2, 64)),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_windows(window, expected, causal):
    q, k, v = inputs(2, 24, 4, 2, 64)
    out = attend(filled(k, v, 30), q, is_causal=causal, local_window_size=window)
    exact = exact_attention(q, k, v, is_causal=causal, local_window_size=expected)
    assert error(out, exact) < BOUND["float32"]


@pytest.mark.parametrize("ragged", [False, True])
def test_without_implicit_rank_promotion(ragged):
    q, k, v = inputs(2, 24, 4, 2, 64)
    expected = decode.attend(decode.append(decode.init_cache(2, 30, 2, 64), k, v), q)
    with jax.numpy_rank_promotion("raise"):
        cache = decode.append(decode.init_cache(2, 30, 2, 64, ragged=ragged), k, v)
        out = decode.attend(cache, q, mask=jnp.ones((24, 30), bool), local_window_size=24)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 24, 32), (1, 1, 24, 32), (4, 1, 32), (24, 32), (32,)])
def test_masks(shape):
    q, k, v = inputs(2, 24, 4, 2, 64)
    mask = jax.random.bernoulli(jax.random.key(9), 0.6, shape).at[..., 0].set(True)
    out = attend(filled(k, v, 32), q, mask=mask)
    full = jnp.broadcast_to(mask, (2, 4, 24, 32))[..., :24]
    assert error(out, exact_attention(q, k, v, mask=full, is_causal=True)) < BOUND["float32"]


def test_a_query_block_at_a_time_equals_all_at_once(monkeypatch):
    q, k, v = inputs(2, 21, 4, 2, 64)
    mask = jax.random.bernoulli(jax.random.key(9), 0.6, (2, 1, 21, 21))
    cache = filled(k, v)
    for kwargs in ({}, {"mask": mask}, {"mask": mask[:, :, :1]}, {"local_window_size": (4, 0)}):
        whole = attend(cache, q, **kwargs)
        monkeypatch.setattr(decode, "QUERY_BLOCK", 8)
        blocked = jax.jit(functools.partial(decode.attend, cache, **kwargs))(q)
        np.testing.assert_allclose(blocked, whole, atol=1e-6)
        monkeypatch.undo()


def test_rows_that_see_nothing_are_zero():
    q, k, v = inputs(2, 6, 2, 2, 64)
    mask = jnp.ones((2, 1, 6, 6), bool).at[1, 0, 3].set(False)
    out = np.asarray(attend(filled(k, v), q, mask=mask))
    assert (out[1, 3] == 0).all() and np.isfinite(out).all() and (out[1, 2] != 0).any()
    assert (np.asarray(attend(decode.init_cache(2, 6, 2, 64), q)) == 0).all()


def test_zero_tokens_give_no_nan():
    q, k, v = inputs(1, 8, 1, 1, 64)
    k, v = k.at[:, 2:5].set(0), v.at[:, 2:5].set(0)
    assert error(attend(filled(k, v), q), exact_attention(q, k, v, is_causal=True)) < 0.015
    zeros = jnp.zeros_like(q)
    assert (np.asarray(attend(filled(zeros, zeros), zeros)) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_bad_values_reach_the_rows_that_see_them_only(where, bad):
    q, k, v = inputs(2, 8, 2, 2, 64)
    clean = np.asarray(attend(filled(k, v), q))
    arrays = {"query": q, "key": k, "value": v}
    arrays[where] = arrays[where].at[1, 5, 0, 7].set(bad)
    cache = filled(arrays["key"], arrays["value"])
    out = np.asarray(attend(cache, arrays["query"]))
    nan = np.isnan(out).all(-1)
    expected = np.zeros((2, 8, 2), bool)
    expected[1, 5 if where == "query" else slice(5, None), 0] = True
    if where == "query":
        expected[1, 6:] = False
    np.testing.assert_array_equal(nan, expected)
    np.testing.assert_array_equal(np.isnan(out).any(-1), expected)
    np.testing.assert_allclose(out[~expected], clean[~expected], atol=0.05)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_bad_query_gives_nan_whatever_the_sign_of_its_scores(bad):
    q, k, v = inputs(1, 2, 2, 1, 64)
    cache = filled(k, v)._replace(k8=jnp.ones((1, 1, 2, 64), jnp.int8))  # so all have one sign
    q = q.at[0, 0, 1].set(bad)
    mask = jnp.ones((1, 2, 2, 2), bool)
    out = np.asarray(attend(cache, q, mask=mask, is_causal=False))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[[False, True], [False, False]]])
    np.testing.assert_array_equal(np.isnan(out).any(-1), np.isnan(out).all(-1))
    unseen = attend(cache, q, mask=mask.at[:, 1, 0].set(False), is_causal=False)
    assert (np.asarray(unseen)[0, 0, 1] == 0).all()


@pytest.mark.parametrize("positions", [[3, 5], ([3, 5], [3, 5]), np.array([3, 5], np.int8)])
def test_positions_may_be_lists_and_numpy_arrays(positions):
    q, k, v = inputs(2, 6, 2, 2, 64)
    cache = filled(k, v)
    out = decode.attend(cache, q[:, 3::2], positions=positions)
    np.testing.assert_allclose(out, attend(cache, q)[:, 3::2], rtol=1e-5, atol=1e-6)
    far = decode.attend(cache, q, positions=np.full(6, 2**32))
    np.testing.assert_allclose(far, attend(cache, q, is_causal=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1, np.float64(0.3), np.array(0.3), jnp.float32(0.3)])
def test_scales_are_scalars_of_any_kind(scale):
    q, k, v = inputs(1, 6, 2, 2, 64)
    exact = exact_attention(q, k, v, scale=float(scale), is_causal=True)
    assert error(decode.attend(filled(k, v), q, scale=scale), exact) < 0.05


@pytest.mark.parametrize("magnitude", [1e-20, 1e4])
def test_relative_accuracy_at_any_magnitude(magnitude):
    q, k, v = inputs(1, 16, 2, 2, 64)
    out = attend(filled(k * magnitude, v * magnitude), q / magnitude)
    exact = exact_attention(q, k, v, is_causal=True)
    assert error(out / magnitude, exact) < BOUND["float32"]


def test_float16_queries_do_not_overflow():
    q, k, v = inputs(1, 16, 2, 2, 64, jnp.float16)
    cache = filled(k, v * 1000)
    out = attend(cache, q)
    exact = exact_attention(q, k, v * 1000, is_causal=True)
    assert out.dtype == jnp.float16 and error(out, exact) < BOUND["bfloat16"]


def test_a_scan_carries_the_cache():
    q, k, v = inputs(2, 10, 2, 1, 64)
    cache = append(decode.init_cache(2, 10, 1, 64), k[:, :1], v[:, :1])

    def body(cache, x):
        cache, out = step(cache, *(a[:, None] for a in x))
        return cache, out[:, 0]

    per_step = tuple(jnp.moveaxis(x[:, 1:], 1, 0) for x in (q, k, v))
    cache, outs = jax.lax.scan(body, cache, per_step)
    exact = exact_attention(q, k, v, is_causal=True)[:, 1:]
    assert error(jnp.moveaxis(outs, 0, 1), exact) < BOUND["float32"]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_batch_and_heads_over_devices(kind, ragged):
    q, k, v = inputs(2, 9, 4, 2, 64)
    axis_types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axis_types)
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    cache = decode.init_cache(2, 12, 2, 64, ragged=ragged, sharding=place(P("data", "model")))
    assert cache.k_scale.sharding.shard_shape(cache.k_scale.shape) == (1, 1, 12)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, place(P("data", None, "model"))) for x in (q, k, v)]
        cache, out = step(cache, *split)
    assert cache.k8.sharding.shard_shape(cache.k8.shape) == (1, 1, 12, 64)
    assert error(out, exact_attention(q, k, v, is_causal=True)) < BOUND["float32"]


def test_tokens_and_channels_of_a_cache_stay_whole():
    mesh = jax.make_mesh((2,), ("x",))
    with pytest.raises(ValueError, match="over batch and heads only"):
        decode.init_cache(2, 8, 2, 64, sharding=jax.NamedSharding(mesh, P(None, None, "x")))


@pytest.mark.parametrize(
    "message,call",
    [
        ("key should have shape .2, T, 2, 64.", lambda c, x: decode.append(c, x[:, :, :1], x)),
        ("value should be floating point", lambda c, x: decode.append(c, x, x.astype(jnp.int32))),
        ("the same shape", lambda c, x: decode.append(c, x, x[:, :1])),
        ("ragged=True", lambda c, x: decode.append(c, x, x, lengths=jnp.array([1, 1]))),
        ("query should have shape", lambda c, x: decode.attend(c, x[..., :32])),
        ("query should be floating", lambda c, x: decode.attend(c, x.astype(jnp.int8))),
        ("multiple of the cache's 2", lambda c, x: decode.attend(c, x[:, :, :1])),
        ("mask should be bool", lambda c, x: decode.attend(c, x, mask=jnp.ones((2, 2, 4, 8)))),
        ("mask should be", lambda c, x: decode.attend(c, x, mask=jnp.ones((2, 2, 4, 4), bool))),
        ("positions should", lambda c, x: decode.attend(c, x, positions=jnp.arange(3))),
        ("got float32 .4,.; give", lambda c, x: decode.attend(c, x, positions=x[0, :, 0, 0])),
        ("got float32 .4,.; give one place", lambda c, x: decode.attend(c, x, positions=[0.5] * 4)),
        ("got list; give one place", lambda c, x: decode.attend(c, x, positions=[[1], [1, 2]])),
        ("is_causal should be", lambda c, x: decode.attend(c, x, is_causal=jnp.array(True))),
        ("is_causal should be", lambda c, x: decode.attend(c, x, is_causal=1)),
        ("is_causal should be", lambda c, x: decode.attend(c, x, is_causal="no")),
        ("scale should be a scalar", lambda c, x: decode.attend(c, x, scale=jnp.ones(8))),
        ("scale should be a scalar", lambda c, x: decode.attend(c, x, scale=np.ones((1,)))),
        ("scale should be a number", lambda c, x: decode.attend(c, x, scale=[0.1])),
        ("scale should be a number", lambda c, x: decode.attend(c, x, scale=True)),
        ("an array of complex64", lambda c, x: decode.attend(c, x, scale=jnp.array(1j))),
        ("scale=nan times", lambda c, x: decode.attend(c, x, scale=np.nan)),
        ("negative side", lambda c, x: decode.attend(c, x, local_window_size=(-1, 0))),
        ("give one int, or", lambda c, x: decode.attend(c, x, local_window_size=1.5)),
        ("give one int, or", lambda c, x: decode.attend(c, x, local_window_size=(1, 2, 3))),
        ("capacity should be", lambda c, x: decode.init_cache(2, 0, 2, 64)),
        ("kv_heads=0 and head_dim=64", lambda c, x: decode.init_cache(2, 8, 0, 64)),
        ("kv_heads=2 and head_dim=0", lambda c, x: decode.init_cache(2, 8, 2, 0)),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(message, call):
    with pytest.raises((ValueError, TypeError), match=message):
        call(decode.init_cache(2, 8, 2, 64), jnp.zeros((2, 4, 2, 64)))


@pytest.mark.parametrize(
    "given,lengths",
    [
        ("float32 .2,.", jnp.array([1.0, 2.5])),
        ("float32 .2,.", [1.0, 2.5]),
        ("bool .2,.", [True, False]),
        ("int32 .3,.", jnp.array([1, 2, 3])),
        ("int32 ..", 3),
        ("list", [[1], [2, 3]]),
    ],
)
def test_lengths_that_are_no_counts_are_refused(given, lengths):
    x, cache = jnp.zeros((2, 4, 2, 64)), decode.init_cache(2, 8, 2, 64, ragged=True)
    message = f"lengths should be an integer array of shape .2,., but got {given}; give one count"
    with pytest.raises(ValueError, match=message):
        decode.append(cache, x, x, lengths=lengths)
