"""NNX: the adapter inside Flax's own layer, and `SageAttention` against that layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
from flax import nnx
from jax.sharding import PartitionSpec as P

import sage_jax.flax._layer
from sage_jax.flax import attention_fn
from sage_jax.flax.nnx import SageAttention

B, T, F, N, H = 2, 20, 32, 4, 16
SIZES = dict(num_heads=N, in_features=F, qkv_features=N * H)
# Relative L2 error of a layer's output against exact attention: 8-bit P·V leaves 3 to 4% on normal
# data (docs/numerics.md); measured here 0.026 to 0.032.
BOUND = 0.05
# The same in float32 over the INT8 cache, without a quantized P: measured 0.005.
CACHE_BOUND = 0.012


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def error(out, exact):
    out, exact = (np.asarray(x, np.float64) for x in (out, exact))
    return np.linalg.norm(out - exact) / np.linalg.norm(exact)


def with_parameters_of(layer, other):
    """layer with the parameters of another, which must have the same names, shapes and types."""
    state = nnx.state(other, nnx.Param)
    assert jax.tree.structure(state) == jax.tree.structure(nnx.state(layer, nnx.Param))
    nnx.update(layer, state)
    return layer


def flax_layer(seed=0, **kwargs):
    return nnx.MultiHeadAttention(**{**SIZES, "decode": False, **kwargs}, rngs=nnx.Rngs(seed))


def sage_layer(seed=0, **kwargs):
    return SageAttention(**{**SIZES, **kwargs}, rngs=nnx.Rngs(seed))


@nnx.jit
def step(layer, x, **kwargs):
    """A call in decode mode; only here is compiling faster than running op by op."""
    return layer(x, **kwargs)


# The adapter.


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_adapter_runs_in_flax_and_float_masks_are_masks(kv_heads):
    x = normal(0, B, T, F)
    mask = nnx.make_causal_mask(jnp.ones((B, T)))
    assert mask.dtype == jnp.float32
    exact = flax_layer(num_kv_heads=kv_heads)(x, mask=mask)
    layer = flax_layer(num_kv_heads=kv_heads, attention_fn=attention_fn(recipe="train8"))
    dense = layer(x, mask=mask)
    assert 0 < error(dense, exact) < BOUND
    np.testing.assert_array_equal(dense, layer(x, mask=mask.astype(bool)))
    np.testing.assert_array_equal(dense, layer(x, is_causal=True))
    assert error(layer(x), exact) > 0.1  # the mask matters


def test_adapter_folds_extra_batch_axes():
    x = normal(0, 2, 3, T, F)
    layer = flax_layer(attention_fn=attention_fn(is_causal=True))
    flat = layer(x.reshape(6, T, F))
    np.testing.assert_allclose(layer(x).reshape(6, T, F), flat, atol=1e-6)
    q, k, v = (normal(i, 2, 3, 5, N, H) for i in range(3))
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (2, 1, N, 5, 5)).at[..., 0].set(True)
    folded, flat = jax.jit(attention_fn()), jax.jit(sage_jax.dot_product_attention)
    qkv = [a.reshape(6, 5, N, H) for a in (q, k, v)]
    for given in (mask, mask[0], mask[0, 0, 0]):
        full = jnp.broadcast_to(given, (2, 3, N, 5, 5))
        out = folded(q, k, v, mask=given)
        expected = flat(*qkv, mask=full.reshape(6, N, 5, 5))
        np.testing.assert_allclose(out.reshape(6, 5, N, H), expected, atol=1e-6)
    np.testing.assert_array_equal(folded(q[0, 0], k[0, 0], v[0, 0]), flat(*qkv)[0])


def test_adapter_serves_decode_with_the_cache_of_flax():
    x = normal(0, B, 6, F)
    layer = flax_layer(attention_fn=attention_fn(), decode=True)
    layer.init_cache(x.shape)
    out = jnp.concatenate([step(layer, x[:, t : t + 1]) for t in range(6)], axis=1)
    assert error(out, flax_layer()(x, is_causal=True)) < BOUND


def test_adapter_hands_its_settings_on():
    q, k, v = (normal(i, 1, 12, 2, H) for i in range(3))
    expected = functools.partial(sage_jax.dot_product_attention, q, k, v)
    for settings in (
        dict(recipe="sage1"),
        dict(recipe="sagebwd", is_causal=True),
        dict(scale=0.1, local_window_size=(3, 1)),
        dict(implementation="reference", is_causal=True, causal_alignment="bottom_right"),
    ):
        np.testing.assert_array_equal(attention_fn(**settings)(q, k, v), expected(**settings))
    bias = normal(5, 1, 2, 12, 12)
    np.testing.assert_array_equal(attention_fn()(q, k, v, bias=bias), expected(bias=bias))
    half = attention_fn()(q, k, v, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert attention_fn(recipe="sage1") is attention_fn(recipe="sage1")
    with pytest.raises(ValueError, match="'sage9' is unknown"):
        attention_fn(recipe="sage9")


@pytest.mark.parametrize("recipe", ["exact", "sage2", "train8"])
def test_hidden_tokens_may_hold_anything(recipe):
    q, k, v = (normal(i, 1, 12, 2, H) for i in range(3))
    seen = jnp.arange(12) < 9
    k, v = (x.at[:, 9:].set(jnp.nan) for x in (k, v))
    attend = functools.partial(attention_fn(recipe), mask=seen)
    assert error(attend(q, k, v), attention_fn("exact")(q, k[:, :9], v[:, :9])) < BOUND
    if recipe != "sage2":
        for x in jax.grad(lambda *qkv: jnp.sum(attend(*qkv) ** 2), (0, 1, 2))(q, k, v):
            assert jnp.isfinite(x).all() and (x[:, :9] != 0).any()


def test_adapters_are_shared_between_equal_arguments_only():
    assert attention_fn("train8") is attention_fn(recipe=sage_jax.recipes["train8"])
    assert attention_fn(local_window_size=[3, 0]) is attention_fn(local_window_size=(3, 0))
    q = normal(0, 1, 4, 1, H)
    assert attention_fn(scale=1)(q, q, q).shape == q.shape
    with pytest.raises(TypeError, match="scale should be a number"):
        attention_fn(scale=True)(q, q, q)
    for settings in (dict(scale=jnp.float32(1)), dict(local_window_size=np.array([3, 0]))):
        with pytest.raises(TypeError, match="should be a plain Python value, but attention_fn got"):
            attention_fn(**settings)


@pytest.mark.parametrize("make", [attention_fn, sage_layer])
@pytest.mark.parametrize("name", ["nope", "xla"])
def test_what_does_not_exist_is_refused_when_made(make, name):
    q = normal(0, 1, 4, 1, H)
    with pytest.raises(ValueError) as raised:
        make(implementation=name)
    assert str(raised.value) == sage_jax.supports(q, q, q, implementation=name)
    with pytest.raises(ValueError, match="recipe='nope' is unknown"):
        make(recipe="nope")
    with pytest.raises(ValueError, match="causal_alignment='nope' is not supported"):
        attention_fn(causal_alignment="nope")


def test_a_window_may_be_a_list():
    x = normal(0, B, T, F)
    listed, paired = (sage_layer(local_window_size=w) for w in ([3, 0], (3, 0)))
    call = nnx.jit(lambda layer, x: layer(x))
    np.testing.assert_array_equal(call(listed, x), call(paired, x))


@pytest.mark.parametrize(
    "keywords,message",
    [
        (dict(dropout_rate=0.1), "dropout_rate=0.1 .* use dropout_rate=0"),
        (dict(module=object()), "sow_weights=False"),
        (dict(input_positions=jnp.arange(4)), "rope_theta"),
        (dict(qk_attn_weights_einsum=jnp.einsum), "leave both unset"),
        (dict(attn_weights_value_einsum=jnp.einsum), "leave both unset"),
    ],
)
def test_adapter_refuses_what_it_cannot_honour(keywords, message):
    q = normal(0, 1, 4, 1, H)
    with pytest.raises(ValueError, match=message):
        attention_fn()(q, q, q, **keywords)


def test_adapter_refuses_through_the_layer_of_flax():
    x = normal(0, B, T, F)
    layer = flax_layer(attention_fn=attention_fn(), dropout_rate=0.5)
    with pytest.raises(ValueError, match="drops attention probabilities"):
        layer(x, deterministic=False)
    with pytest.raises(ValueError, match="asks for the attention probabilities"):
        layer(x, deterministic=True, sow_weights=True)
    assert np.isfinite(layer(x, deterministic=True)).all()


def test_batch_axes_must_agree():
    q = normal(0, 2, 4, 1, H)
    with pytest.raises(ValueError, match="key should have the batch axes of query, .2."):
        attention_fn()(q, q[:1], q[:1])
    with pytest.raises(ValueError, match="mask should be broadcastable"):
        attention_fn()(q, q, q, mask=jnp.ones((2, 1, 1, 4, 4)))


# The layer: parameters.


@pytest.mark.parametrize(
    "options",
    [{}, dict(num_kv_heads=2, normalize_qk=True), dict(use_bias=False, out_features=24)],
    ids=str,
)
def test_parameters_of_flax_load_and_mean_the_same(options):
    x = normal(0, B, T, F)
    theirs = flax_layer(**options)
    ours = sage_layer(seed=7, is_causal=True, **options)
    with_parameters_of(ours, theirs)
    assert 0 < error(ours(x), theirs(x, is_causal=True)) < BOUND
    # and the other way, and equal seeds give equal parameters
    back = with_parameters_of(flax_layer(seed=3, **options), ours)
    np.testing.assert_array_equal(back.query.kernel[...], theirs.query.kernel[...])
    fresh = nnx.state(sage_layer(**options), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, fresh, nnx.state(theirs, nnx.Param))


def test_cross_attention_and_lengths():
    x, y = normal(0, B, T, F), normal(1, B, 11, 24)
    options = dict(in_kv_features=24, num_kv_heads=2)
    theirs, ours = flax_layer(**options), sage_layer(**options)
    assert ours.key.kernel.shape == (24, 2, H) and ours.value.kernel.shape == (24, 2, H)
    lengths = jnp.array([11, 4])
    mask = (jnp.arange(11) < lengths[:, None])[:, None, None]
    exact = theirs(x, y, mask=mask)
    assert error(ours(x, y, key_value_seq_lengths=lengths), exact) < BOUND
    assert error(ours(x, y, mask=mask), exact) < BOUND
    with pytest.raises(ValueError, match="inputs_v was given without inputs_k"):
        ours(x, None, y)
    with pytest.raises(ValueError, match="cross-attention layer with rope_theta=None"):
        sage_layer(rope_theta=1e4)(x, x)


def test_dtype_and_param_dtype():
    layer = sage_layer(dtype=jnp.bfloat16, param_dtype=jnp.float16, normalize_qk=True)
    assert {p.dtype.name for p in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {"float16"}
    assert layer(normal(0, B, T, F)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(num_kv_heads=3), "multiple of num_kv_heads, but got 4 and 3"),
        (dict(qkv_features=30), "multiple of num_heads, but got 30 and 4"),
        (dict(qkv_features=12, rope_theta=1e4), "even head dimension"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sage_layer(**options)


def test_sharding_metadata_is_that_of_flax():
    metadata = dict(
        kernel_metadata={"out_sharding": ("data", "model", None)},
        out_kernel_metadata={"out_sharding": ("model", None, "data")},
        bias_metadata={"out_sharding": ("model", None)},
        out_bias_metadata={"out_sharding": (None,)},
        query_ln_scale_metadata={"out_sharding": (None,)},
        key_ln_scale_metadata={"out_sharding": (None,)},
        normalize_qk=True,
    )
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        ours, theirs = (
            nnx.get_partition_spec(nnx.state(make(**metadata), nnx.Param))
            for make in (sage_layer, flax_layer)
        )
    assert nnx.to_pure_dict(ours) == nnx.to_pure_dict(theirs)
    assert tuple(nnx.to_pure_dict(ours)["query"]["kernel"]) == ("data", "model", None)
    assert tuple(nnx.to_pure_dict(ours)["out"]["kernel"]) == ("model", None, "data")


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_heads_and_batch_over_devices(kind):
    options = dict(num_kv_heads=2, is_causal=True, rope_theta=1e4)
    x = normal(0, 4, 12, F)
    expected = sage_layer(**options)(x)
    axis_types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axis_types)
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    with jax.set_mesh(mesh):
        layer = sage_layer(
            kernel_metadata={"out_sharding": (None, "model", None)},
            out_kernel_metadata={"out_sharding": ("model", None, None)},
            bias_metadata={"out_sharding": ("model", None)},
            out_bias_metadata={"out_sharding": (None,)},
            **options,
        )
        x = jax.device_put(x, place(P("data")))
        results = {}
        if kind == "Explicit":
            results = dict(qkv_sharding=P("data", None, "model"), out_sharding=P("data"))
        run = nnx.jit(lambda layer, x: layer(x, **results))
        out = run(layer, x)
        assert out.sharding.is_equivalent_to(place(P("data")), 3)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        layer.init_cache((4, 16, F), sharding=place(P("data", "model")))
        layer.decode = True
        pieces = [x[:, :9]] + [x[:, t : t + 1] for t in range(9, 12)]
        steps = np.concatenate([run(layer, piece) for piece in pieces], axis=1)
    assert layer.cached_key[...].sharding.is_equivalent_to(place(P("data", "model")), 4)
    assert error(steps, expected) < BOUND


# The layer: what it computes.


def test_rotary_positions():
    x = normal(0, B, T, F)
    layer = sage_layer(rope_theta=1e4, is_causal=True)
    out = layer(x)
    assert error(out, sage_layer(is_causal=True)(x)) > 0.05
    shifted = layer(x, input_positions=jnp.arange(T) + 1000)
    assert error(shifted, out) < BOUND  # only differences of positions matter
    stretched = layer(x, input_positions=jnp.broadcast_to(3 * jnp.arange(T), (B, T)))
    assert error(stretched, out) > BOUND
    # The rotation, written with complex numbers.
    q, positions = normal(3, B, T, N, H), jnp.arange(T)
    turn = np.exp(1j * np.arange(T)[:, None] * 1e4 ** (-np.arange(H // 2) / (H // 2)))
    pairs = (np.asarray(q[..., : H // 2]) + 1j * np.asarray(q[..., H // 2 :])) * turn[:, None]
    rotated = sage_jax.flax._layer.rotate(q, positions, 1e4)
    np.testing.assert_allclose(rotated, np.concatenate([pairs.real, pairs.imag], -1), atol=1e-5)


@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="this Flax has no RoPE")
def test_rotary_positions_are_those_of_flax():
    x = normal(0, B, T, F)
    rotating = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE(theta=500.0))
    exact = flax_layer(attention_fn=rotating)(x, is_causal=True)
    assert error(sage_layer(rope_theta=500.0, is_causal=True)(x), exact) < BOUND


def test_windows_segments_and_overrides():
    x = normal(0, B, T, F)
    i = jnp.arange(T)
    near = (i[:, None] - i <= 4) & (i[:, None] >= i)
    theirs = flax_layer()
    window = sage_layer(is_causal=True, local_window_size=(4, 0))
    assert error(window(x), theirs(x, mask=near)) < BOUND
    ours = sage_layer(is_causal=True)
    np.testing.assert_array_equal(ours(x, is_causal=False), sage_layer()(x))
    segments = jnp.broadcast_to(jnp.where(i < 8, 0, 1), (B, T))
    packed = ours(x, query_segment_ids=segments, key_value_segment_ids=segments)
    alone = jnp.concatenate([theirs(x[:, :8], is_causal=True), theirs(x[:, 8:], is_causal=True)], 1)
    assert error(packed, alone) < BOUND


def test_dropout_falls_on_the_output_only():
    x = normal(0, B, T, F)
    layer = sage_layer(dropout_rate=0.25)
    kept = sage_layer()(x)
    out = np.asarray(layer(x))
    dropped = out == 0
    assert 0.1 < dropped.mean() < 0.4
    np.testing.assert_allclose(out[~dropped], np.asarray(kept)[~dropped] / 0.75, rtol=1e-5)
    layer.eval()
    np.testing.assert_array_equal(layer(x), kept)


@pytest.mark.parametrize("recipe", [None, "sagebwd"])
def test_training_lowers_the_loss_with_gradients_that_are_right(recipe):
    x, teacher = normal(0, 4, T, F), flax_layer(seed=9)
    options = dict(num_kv_heads=2, normalize_qk=True)
    target = teacher(x, is_causal=True)
    model = sage_layer(recipe=recipe, is_causal=True, **options)
    exact = with_parameters_of(flax_layer(**options), model)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    def loss(model, **kwargs):
        return jnp.mean((model(x, **kwargs) - target) ** 2)

    @nnx.jit
    def update(model, optimizer):
        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value, gradients

    expected = nnx.to_pure_dict(nnx.grad(functools.partial(loss, is_causal=True))(exact))
    losses = []
    for _ in range(15):
        value, gradients = update(model, optimizer)
        if not losses:
            first = nnx.to_pure_dict(gradients)
        losses.append(float(value))
    for name in ("query", "key", "value", "out"):
        gradient = first[name]["kernel"]
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
        assert error(gradient, expected[name]["kernel"]) < 0.12, name
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0], losses


# The layer: decoding.


@pytest.mark.parametrize(
    "options",
    [{}, dict(num_kv_heads=2, normalize_qk=True, rope_theta=1e4, local_window_size=(6, 0))],
    ids=["plain", "everything"],
)
def test_decoding_equals_the_full_pass(options):
    x = normal(0, B, T, F)
    layer = sage_layer(is_causal=True, **options)
    full = layer(x)
    layer.init_cache((B, T + 4, F))
    layer.decode = True
    assert layer.cached_key.dtype == layer.cached_value.dtype == jnp.int8
    assert layer.cached_key.shape == (B, layer.num_kv_heads, T + 4, H)
    pieces = [x[:, :7]] + [x[:, t : t + 1] for t in range(7, T)]
    out = jnp.concatenate([step(layer, piece) for piece in pieces], axis=1)
    assert int(layer.cache_index[...]) == T
    assert error(out, full) < BOUND  # the full pass has the larger error of the two
    if not options:
        exact = with_parameters_of(flax_layer(), layer)(x, is_causal=True)
        assert error(out, exact) < CACHE_BOUND


def test_ragged_prompts_decode_like_each_row_alone():
    x, lengths = normal(0, B, 6, F), [6, 3]
    layer = sage_layer(rope_theta=1e4, decode=True)
    layer.init_cache((B, 8, F), ragged=True)
    prompt = step(layer, x, key_value_seq_lengths=jnp.array(lengths))
    new = normal(1, B, 1, F)
    out = step(layer, new)
    np.testing.assert_array_equal(layer.cache_index[...], [7, 4])
    for b, n in enumerate(lengths):
        layer.init_cache((1, 8, F))
        np.testing.assert_allclose(prompt[b, :n], step(layer, x[b : b + 1, :n])[0], atol=1e-5)
        np.testing.assert_allclose(out[b], step(layer, new[b : b + 1])[0], atol=1e-5)


def test_decode_with_batch_axes_masks_and_view():
    x = normal(0, 2, 3, 4, F)
    layer = sage_layer()
    view = nnx.view(layer, decode=True, batch_size=(2, 3), max_length=4)
    assert view.cached_key.shape == (6, N, 4, H) and layer.cache_index is None
    hide = jnp.ones((2, 3, 1, 1, 4)).at[1, ..., 0].set(0)  # the first token, in half of the rows
    out = [step(view, x[..., t : t + 1, :], mask=hide if t else None) for t in range(4)]
    seen = jnp.broadcast_to(hide, (2, 3, 1, 4, 4)).at[..., 0, :].set(1)
    exact = flax_layer()(x, mask=seen * jnp.tril(jnp.ones((4, 4))), is_causal=True)
    assert error(jnp.concatenate(out, -2), exact) < CACHE_BOUND
    with pytest.raises(ValueError, match="needs batch_size and max_length"):
        nnx.view(layer, decode=True)


def test_views_of_other_sizes_have_an_empty_cache_of_their_own():
    layer = sage_layer(decode=True)
    layer.init_cache((B, 4, F), ragged=True)
    step(layer, normal(0, B, 3, F))
    same = [nnx.view(layer, decode=True), nnx.view(layer, decode=True, batch_size=(1, B), max_length=4)]
    assert all(view.cache_index is layer.cache_index for view in same)
    for sizes in (dict(decode=True, batch_size=3, max_length=4), dict(batch_size=(3,)), dict(max_length=9)):
        view = nnx.view(layer, **sizes)
        batch = 3 if "batch_size" in sizes else B
        assert view.cached_key.shape == (batch, N, sizes.get("max_length", 4), H)
        np.testing.assert_array_equal(view.cache_index[...], [0] * batch)
        step(view, normal(1, batch, 4, F))
    np.testing.assert_array_equal(layer.cache_index[...], [3] * B)
    assert nnx.view(layer, decode=False, batch_size=3).cache_index is layer.cache_index


def test_decode_refuses_what_it_has_no_use_for():
    x = normal(0, B, 4, F)
    layer = sage_layer(decode=True)
    with pytest.raises(ValueError, match="call init_cache"):
        layer(x)
    layer.init_cache((B, 6, F))
    ids = jnp.zeros((B, 4), jnp.int32)
    for keywords in (
        dict(is_causal=False),
        dict(query_seq_lengths=ids[:, 0]),
        dict(query_segment_ids=ids),
        dict(key_value_segment_ids=ids),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(keywords))} is not used in decode mode"):
            layer(x, **keywords)
    with pytest.raises(ValueError, match="cross-attention layer with decode=False"):
        layer(x, x)
    with pytest.raises(ValueError, match="ragged=True"):
        layer(x, key_value_seq_lengths=ids[:, 0])
    layer(x)
    with pytest.raises(ValueError, match="4 tokens do not fit a cache of capacity 6"):
        layer(x)
