"""What the function means: jax.nn's semantics where they agree, the documented differences, and extreme values.

What it refuses, and what is said about a call beforehand: tests/test_support.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metrics import assert_same_bits, relative_l2

import sage_jax
from sage_jax import _ffi

B, T, S, N, K, H = 2, 33, 70, 4, 2, 24
BOUND = (
    0.06  # of O against exact attention: the accuracy of the 8-bit products, see docs/numerics.md
)
# every backend of this machine: the specification, and the native module where it is built
BACKENDS = ["reference"] + ["cpu"] * (_ffi.load("cpu") is not None)
each_backend = pytest.mark.parametrize("implementation", BACKENDS)
attend = sage_jax.dot_product_attention
exact = functools.partial(jax.nn.dot_product_attention, implementation="xla")


def inputs(*, t=T, s=S, n=N, k=K, h=H, dtype=jnp.float32, scale=1.0, batch=B):
    rng = np.random.default_rng(0)
    shapes = (batch, t, n, h), (batch, s, k, h), (batch, s, k, h)
    return [jnp.asarray(rng.standard_normal(shape) * scale, dtype) for shape in shapes]


def random_mask(*shape):
    mask = np.random.default_rng(1).random(shape) < 0.7
    mask[..., 0] = True  # no row without a key: there the functions differ on purpose
    return jnp.asarray(mask)


LENGTHS = dict(
    query_seq_lengths=jnp.array([20, 33], jnp.int32),
    key_value_seq_lengths=jnp.array([70, 41], jnp.int32),
)
CALLS = {
    "plain": {},
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(5, 9)),
    "window_int": dict(local_window_size=7),
    "window_causal": dict(local_window_size=(12, 3), is_causal=True),
    "window_diagonal": dict(local_window_size=0),
    "window_right_of_diagonal": dict(local_window_size=(-1, 20)),
    "lengths": LENGTHS,
    "lengths_causal": dict(**LENGTHS, is_causal=True),
    "key_lengths": dict(key_value_seq_lengths=jnp.array([3, 70], jnp.int32)),
    "scale": dict(scale=0.4),
    "negative_scale": dict(scale=-0.3),
    "zero_scale": dict(scale=0.0),
    "traced_scale": dict(scale=jnp.float32(0.2)),
    "mask": dict(mask=random_mask(B, N, T, S)),
    "mask_2d": dict(mask=random_mask(T, S)),
    "mask_3d": dict(mask=random_mask(N, 1, S)),
    "mask_and_causal": dict(mask=random_mask(B, 1, 1, S), is_causal=True),
    "bias": dict(bias=jnp.asarray(np.random.default_rng(2).standard_normal((1, N, T, S)), jnp.float32)),
    "bias_bf16_row": dict(bias=jnp.linspace(-3, 3, S, dtype=jnp.bfloat16)),
}  # fmt: skip


# the specification itself is checked in test_reference.py: here only where this layer prepares operands for it
SELECTED = [(BACKENDS[-1], name) for name in CALLS] + [
    ("reference", name)
    for name in ("lengths_causal", "mask_3d", "bias_bf16_row")
    if len(BACKENDS) > 1
]


@pytest.mark.parametrize("implementation, name", SELECTED)
def test_means_what_jax_nn_means(implementation, name):
    q, k, v = inputs()
    f = functools.partial(attend, implementation=implementation)
    out, lse = f(q, k, v, return_residual=True, **CALLS[name])
    want, want_lse = exact(q, k, v, return_residual=True, **CALLS[name])
    valid = slice(0, 20) if "lengths" in name and name != "key_lengths" else slice(None)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    assert relative_l2(out, want) < BOUND
    np.testing.assert_allclose(lse[:, valid], want_lse[:, valid], atol=0.1)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (5, 1)])
def test_grouped_heads(heads):
    x = inputs(n=heads[0], k=heads[1])
    assert relative_l2(attend(*x), exact(*x)) < BOUND


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("h", [1, 64, 100, 256])
def test_dtypes_and_head_dims(dtype, h):
    x = inputs(h=h, dtype=dtype, n=2, k=1)
    out, lse = attend(*x, return_residual=True)
    assert out.dtype == dtype and out.shape == x[0].shape and lse.dtype == jnp.float32
    assert relative_l2(out, exact(*(a.astype(jnp.float32) for a in x))) < BOUND


LONG = 131_072


@pytest.mark.parametrize(
    "t, s, kwargs",
    [
        (256, LONG, dict(causal_alignment="bottom_right")),
        (LONG, 256, {}),
        (LONG, LONG, dict(local_window_size=(256, 0))),
    ],
    ids=["keys", "queries", "window"],
)
def test_sequences_of_128k(t, s, kwargs):
    """Values and gradients; with a window those of the last tokens, which need no others."""
    x = inputs(t=t, s=s, n=1, k=1, h=16, batch=1)
    dout = jnp.cos(jnp.arange(t * 16, dtype=jnp.float32)).reshape(x[0].shape)

    def results(f, q, k, v, dout):
        out, vjp = jax.vjp(f, q, k, v)
        return out, *vjp(dout)

    f = functools.partial(attend, is_causal=True, **kwargs)
    got = jax.jit(functools.partial(results, f))(*x, dout)
    assert all(np.all(np.isfinite(a)) for a in got)
    first, last = (1024, 512) if t == s else (0, 0)  # of the tokens compared with, and compared
    tail = [a[:, -first:] for a in (*x, dout)]
    i, j = np.arange(tail[0].shape[1])[:, None], np.arange(tail[1].shape[1])
    seen = (j <= i + max(s - t, 0)) & (j >= i - (256 if t == s else LONG))
    want = results(functools.partial(exact, mask=jnp.asarray(seen)), *tail)
    for a, b in zip(got, want, strict=True):
        assert relative_l2(a[:, -last:], b[:, -last:]) < 0.08


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32, np.int64, list])
def test_lengths_of_any_integer_type(dtype):
    """200 keys are more than an int8 can count."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 16)), jax.random.normal(jax.random.key(1), (2, 200, 1, 16))
    lengths = [100, 7] if dtype is list else np.array([100, 7], dtype) if dtype is np.int64 else jnp.array([100, 7], dtype)
    expected = [attend(q[b : b + 1], k[b : b + 1, :n], k[b : b + 1, :n]) for b, n in enumerate((100, 7))]
    assert_same_bits(attend(q, k, k, key_value_seq_lengths=lengths), jnp.concatenate(expected))


@pytest.mark.parametrize("length", [2**31, 2**32 + 5, np.iinfo(np.int64).max, -(2**40)])
def test_lengths_that_no_int32_holds_are_clipped(length):
    q, k = jax.random.normal(jax.random.key(0), (1, 1, 1, 16)), jax.random.normal(jax.random.key(1), (1, 70, 1, 16))
    out = attend(q, k, k, key_value_seq_lengths=np.array([length]))
    assert_same_bits(out, attend(q, k, k) if length > 0 else jnp.zeros_like(out))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 200), (129, 1), (63, 65), (128, 64)])
def test_lengths_that_divide_nothing(sizes):
    x = inputs(t=sizes[0], s=sizes[1])
    assert relative_l2(attend(*x), exact(*x)) < BOUND


def test_rank_three():
    x = inputs(batch=1)
    out, lse = attend(*x, is_causal=True, return_residual=True)
    flat = [a[0] for a in x]
    got = attend(*flat, is_causal=True, return_residual=True)
    assert got[0].shape == (T, N, H) and got[1].shape == (T, N)
    assert_same_bits(got[0], out[0])
    assert_same_bits(got[1], lse[0])
    ids = jnp.zeros(S, jnp.int32)
    segments = dict(query_segment_ids=ids[:T], key_value_segment_ids=ids)
    assert_same_bits(attend(*flat, is_causal=True, **segments), got[0])


@each_backend
def test_segments_are_separate_sequences(implementation):
    q, k, v = inputs(t=S, batch=1)
    ids = jnp.asarray([[0] * 25 + [1] * 30 + [5] * 15], jnp.int32)
    f = functools.partial(attend, is_causal=True, implementation=implementation)
    out = f(q, k, v, query_segment_ids=ids, key_value_segment_ids=ids)
    for start, stop in ((0, 25), (25, 55), (55, 70)):
        part = [x[:, start:stop] for x in (q, k, v)]
        assert relative_l2(out[:, start:stop], exact(*part, is_causal=True)) < BOUND


@each_backend
def test_bottom_right_alignment(implementation):
    """The last valid query sees all valid keys, row by row of the batch."""
    q, k, v = inputs()
    lengths = dict(query_seq_lengths=jnp.array([33, 10]), key_value_seq_lengths=jnp.array([70, 40]))
    f = functools.partial(
        attend, is_causal=True, causal_alignment="bottom_right", implementation=implementation
    )
    for kwargs, q_len, kv_len in (({}, (T, T), (S, S)), (lengths, (33, 10), (70, 40))):
        out = f(q, k, v, local_window_size=(50, None), **kwargs)
        for b in range(B):
            i, j = np.arange(q_len[b])[:, None] + kv_len[b] - q_len[b], np.arange(kv_len[b])
            part = q[b : b + 1, : q_len[b]], k[b : b + 1, : kv_len[b]], v[b : b + 1, : kv_len[b]]
            want = exact(*part, mask=jnp.asarray((j <= i) & (j >= i - 50)))
            assert relative_l2(out[b : b + 1, : q_len[b]], want) < BOUND
            assert not np.any(out[b, q_len[b] :])


@each_backend
def test_rows_that_see_nothing(implementation):
    """Zeros, LSE −inf and zero gradients: never NaN. jax.nn averages the values there."""
    q, k, v = inputs()
    mask = jnp.asarray(np.random.default_rng(3).random((B, 1, T, S)) < 0.5).at[:, :, 5:9].set(False)
    lengths = jnp.array([0, S], jnp.int32)

    def f(q, k, v):
        return attend(
            q,
            k,
            v,
            mask=mask,
            key_value_seq_lengths=lengths,
            return_residual=True,
            implementation=implementation,
        )

    (out, lse), vjp = jax.vjp(f, q, k, v)
    dq, dk, dv = vjp((jnp.ones_like(out), jnp.ones_like(lse)))
    dark = np.zeros((B, T), bool)
    dark[0], dark[:, 5:9] = True, True
    assert not np.any(out[dark]) and np.all(np.isneginf(lse[dark])) and not np.any(dq[dark])
    assert np.all(np.isfinite(lse[~dark])) and np.any(dq[~dark])
    assert not np.any(dk[0]) and not np.any(dv[0])
    assert all(np.all(np.isfinite(g)) for g in (dq, dk, dv))


@pytest.mark.parametrize("shape", [(0, T, S), (B, 0, S), (B, T, 0)], ids=str)
@pytest.mark.parametrize("full", [True, False], ids=["full", "broadcast"])
def test_bias_where_nothing_is_to_be_seen(shape, full):
    b, t, s = shape
    x = inputs(t=t, s=s, batch=b)
    bias = jnp.zeros((b, N, t, s) if full else (1, N, t, 1))
    loss = lambda q, k, v, bias: jnp.sum(attend(q, k, v, bias))  # noqa: E731
    value, gradients = jax.value_and_grad(loss, (0, 1, 2, 3))(*x, bias)
    assert value == 0
    for gradient, given in zip(gradients, (*x, bias), strict=True):
        assert_same_bits(gradient, jnp.zeros_like(given))


@pytest.mark.parametrize(
    "shape", [(0, T, S), (B, 0, S), (B, T, 0)], ids=["batch", "queries", "keys"]
)
def test_nothing_at_all(shape):
    batch, t, s = shape
    q, k, v = (jnp.ones(size) for size in ((batch, t, N, H), (batch, s, K, H), (batch, s, K, H)))
    (out, lse), vjp = jax.vjp(lambda *a: attend(*a, return_residual=True), q, k, v)
    assert out.shape == q.shape and not np.any(out)
    assert lse.shape == q.shape[:3] and np.all(np.isneginf(lse))
    assert all(not np.any(g) for g in vjp((jnp.ones_like(out), jnp.ones_like(lse))))


def test_gradients_of_scale_bias_and_lse():
    q, k, v = inputs()
    bias = jnp.asarray(np.random.default_rng(4).standard_normal((1, N, 1, S)), jnp.float32)

    def loss(f, q, scale, bias):
        out, lse = f(q, k, v, bias, scale=scale, return_residual=True)
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse))

    def exactly(q, k, v, bias, *, scale, return_residual):
        logits = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, N // K, H), k) * scale
        logits = logits.reshape(B, N, T, S) + bias
        p = jax.nn.softmax(logits).reshape(B, K, N // K, T, S)
        out = jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(q.shape)
        return out, jnp.swapaxes(jax.nn.logsumexp(logits, axis=-1), 1, 2)

    got = jax.grad(loss, (1, 2, 3))(attend, q, jnp.float32(0.3), bias)
    want = jax.grad(loss, (1, 2, 3))(exactly, q, jnp.float32(0.3), bias)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape and relative_l2(x, y) < 0.12


@pytest.mark.parametrize("recipe", [None, *sage_jax.recipes])
def test_recipes(recipe):
    x = inputs()
    bound = 0.2 if recipe == "sage3" else BOUND
    assert relative_l2(attend(*x, recipe=recipe), exact(*x)) < bound


def test_default_is_sage2_forward_and_train8_backward():
    x = inputs()
    assert_same_bits(attend(*x), attend(*x, recipe="sage2"))
    loss = lambda *a, **kw: jnp.sum(attend(*a, **kw) ** 2)  # noqa: E731
    for got, want in zip(
        jax.grad(loss, (0, 1, 2))(*x), jax.grad(loss, (0, 1, 2))(*x, recipe="train8"), strict=True
    ):
        assert_same_bits(got, want)


# ------------------------------------------------------------------------------------------------------ values


@each_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values_stay_in_the_rows_that_see_them(bad, implementation):
    q, k, v = (np.array(x) for x in inputs())
    q[0, 7, 1, 3] = bad  # one row of one head
    k[0, 20, 1, 2] = bad  # seen by queries 20.. of query heads 2 and 3 of batch row 0
    v[1, 30, 0, 5] = bad  # by queries 30.. of heads 0 and 1 of batch row 1
    expected = np.zeros((B, T, N), bool)
    expected[0, 7, 1], expected[0, 20:, 2:], expected[1, 30:, :2] = True, True, True
    f = lambda *a: attend(*a, is_causal=True, return_residual=True, implementation=implementation)  # noqa: E731
    (out, lse), vjp = jax.vjp(f, *map(jnp.asarray, (q, k, v)))
    np.testing.assert_array_equal(np.isnan(out), np.repeat(expected[..., None], H, -1))
    np.testing.assert_array_equal(np.isnan(lse), expected)
    clean = attend(*inputs(), is_causal=True, implementation=implementation)
    assert relative_l2(np.asarray(out)[~expected], np.asarray(clean)[~expected]) < 0.05
    dq, _, _ = vjp((jnp.ones_like(out), jnp.ones_like(lse)))
    assert np.all(np.isfinite(dq[0, :7])) and np.all(np.isnan(dq[0, 20:, 2:]))


@each_backend
def test_padding_may_hold_anything(implementation):
    """Contents past the lengths are never used, not even NaN."""
    q, k, v = inputs()
    lengths = dict(query_seq_lengths=jnp.array([20, 33]), key_value_seq_lengths=jnp.array([41, 70]))
    f = functools.partial(attend, implementation=implementation, **lengths)
    dirty = [x.at[0, n:].set(jnp.nan) for x, n in ((q, 20), (k, 41), (v, 41))]
    assert_same_bits(f(*dirty), f(q, k, v))
    loss = lambda *a: jnp.sum(jnp.sin(f(*a)))  # noqa: E731
    for got, want in zip(
        jax.grad(loss, (0, 1, 2))(*dirty), jax.grad(loss, (0, 1, 2))(q, k, v), strict=True
    ):
        assert_same_bits(got, want)


@each_backend
def test_hidden_tokens_share_scales_but_not_nan(implementation):
    """What docs/semantics.md says of tokens that are hidden otherwise than by lengths."""
    q, k, v = inputs(t=S)
    hidden = jnp.arange(S) >= 50
    keep = ~hidden[None, None, None]
    segments = dict(
        query_segment_ids=jnp.zeros((B, S), int),
        key_value_segment_ids=hidden * jnp.ones((B, 1), int),
    )
    wanted = exact(q, k[:, :50], v[:, :50])
    for call in (dict(mask=keep), segments):
        f = functools.partial(attend, implementation=implementation, **call)
        error = lambda x: relative_l2(
            f(q, *(a.at[:, 50:].set(x(a[:, 50:])) for a in (k, v))), wanted
        )  # noqa: E731
        assert error(lambda a: a) < BOUND and error(jnp.zeros_like) < BOUND
        assert error(lambda a: jnp.full_like(a, jnp.nan)) < BOUND
        assert error(lambda a: 100 * a) > 5 * BOUND


@each_backend
def test_a_bias_beyond_float32_hides(implementation):
    """Once times log2 e it is −inf; larger ones are numbers."""
    q, k, v = inputs()
    f = functools.partial(attend, q, k, v, implementation=implementation, return_residual=True)
    for value, seen in ((np.finfo(np.float32).min, False), (-np.inf, False), (-1e30, True)):
        out, lse = f(jnp.zeros((T, S)).at[3].set(value))
        assert np.any(out[:, 3]) == seen and np.all(np.isneginf(lse[:, 3])) == (not seen)


@each_backend
@pytest.mark.parametrize("call", ["plain", "lengths_causal", "mask"])
def test_a_mean_of_the_values_costs_nothing(call, implementation):
    """The output's error relative to what it would be without that mean, alone and under `vmap`."""
    q, k, v = inputs()
    mean = 40 * jnp.asarray(np.random.default_rng(3).standard_normal((B, 1, K, H)), jnp.float32)
    f = functools.partial(attend, implementation=implementation, **CALLS[call])
    wanted = exact(q, k, v, **CALLS[call])

    def error(out, mean=mean):
        out = out - jnp.repeat(mean, N // K, axis=2)
        return relative_l2(out[0, :20], wanted[0, :20])  # rows within every length

    assert error(f(q, k, v + mean)) < BOUND
    assert error(f(q, k, v + mean, recipe="sage2pp")) < BOUND
    unsmoothed = sage_jax.recipes["sage2"].replace(smooth_v=False)
    assert error(f(q, k, v + mean, recipe=unsmoothed)) > 5 * BOUND
    plain, shifted = jax.vmap(lambda v: f(q, k, v))(jnp.stack([v, v + mean]))
    assert error(shifted) < BOUND and error(plain, 0 * mean) < BOUND


@each_backend
@pytest.mark.parametrize("magnitude", [1e-20, 1e-8, 1e4])
def test_magnitudes_keep_their_relative_accuracy(magnitude, implementation):
    q, k, v = inputs()
    f = lambda *a: attend(*a, implementation=implementation)  # noqa: E731
    base, vjp = jax.vjp(f, q, k, v)
    dq, dk, dv = vjp(jnp.cos(base))

    out, vjp = jax.vjp(f, q, k, v * magnitude)
    assert relative_l2(out / magnitude, base) < 0.03
    gq, gk, gv = vjp(jnp.cos(base))
    for got, want in ((gq / magnitude, dq), (gk / magnitude, dk), (gv, dv)):
        assert relative_l2(got, want) < 0.06

    out, vjp = jax.vjp(f, q / magnitude, k * magnitude, v)
    assert relative_l2(out, base) < 0.03
    gq, gk, gv = vjp(jnp.cos(base))
    for got, want in ((gq / magnitude, dq), (gk * magnitude, dk), (gv, dv)):
        assert relative_l2(got, want) < 0.06


@each_backend
@pytest.mark.parametrize("log2, vanishes", [(-98, False), (-104, True)])
def test_rows_bounded_by_2_to_the_minus_100_give_no_gradient(log2, vanishes, implementation):
    """The bound that docs/semantics.md states, for dO of one row: 8/7 ‖dO‖ max ‖V‖."""
    q, k, v = inputs(h=16)
    v = v.at[..., 0].set(7 / 8).at[..., 1:].set(0.0) * jnp.linspace(0.1, 1, S)[:, None, None]
    out, vjp = jax.vjp(lambda *a: attend(*a, implementation=implementation), q, k, v)
    dout = jnp.zeros_like(out).at[:, :, :, 0].set(2.0**log2)  # the bound is 2^log2
    dq, dk, dv = vjp(dout)
    assert np.any(dv)
    assert np.any(dq) != vanishes and np.any(dk) != vanishes


@each_backend
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_where_dout_lies_along_what_values_differ_by(head_dim, implementation):
    """As it does in models that have learnt: dP − D is √H/2 times what random data have, and no code may be cut off."""
    q, k, v = inputs(h=head_dim, s=200)
    u = jax.random.normal(jax.random.key(5), (head_dim,))
    v = 0.1 * v + jnp.where(jax.random.bernoulli(jax.random.key(6), 0.5, v.shape[:3])[..., None], u, -u)
    out, vjp = jax.vjp(lambda *a: attend(*a, implementation=implementation), q, k, v)
    wanted = jax.vjp(exact, q, k, v)[1](jnp.broadcast_to(u, out.shape))
    for name, got, want in zip(("dq", "dk"), vjp(jnp.broadcast_to(u, out.shape)), wanted):
        assert relative_l2(got, want) < 0.08, name


@each_backend
def test_constant_channels_and_zero_blocks(implementation):
    q, k, v = inputs(s=200)
    k, v = (
        k.at[:, :, :, 0].set(7.0).at[:, 64:128].set(0.0),
        v.at[:, :, :, 3].set(0.0).at[:, :64].set(0.0),
    )
    q = q.at[:, :10].set(0.0)
    out, vjp = jax.vjp(lambda *a: attend(*a, implementation=implementation), q, k, v)
    assert relative_l2(out, exact(q, k, v)) < BOUND
    assert all(np.all(np.isfinite(g)) for g in vjp(jnp.ones_like(out)))
    zeros = [jnp.zeros_like(x) for x in (q, k, v)]
    out, vjp = jax.vjp(lambda *a: attend(*a, implementation=implementation), *zeros)
    assert not np.any(out) and all(np.all(np.isfinite(g)) for g in vjp(jnp.ones_like(out)))


def test_inputs_are_not_modified():
    x = [np.asarray(a) for a in inputs()]
    before = [a.copy() for a in x]
    on_device = [jnp.asarray(a) for a in x]
    jax.grad(lambda *a: jnp.sum(attend(*a)), (0, 1, 2))(*on_device)
    for a, b, c in zip(x, before, on_device, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(c, b)
