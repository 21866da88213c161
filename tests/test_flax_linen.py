"""Linen: the adapter inside Flax's own layer, and `SageAttention` against that layer."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
import flax.linen as nn
from jax.sharding import PartitionSpec

from sage_jax.flax import attention_fn
from sage_jax.flax.linen import SageAttention

B, T, F, N, H = 2, 20, 32, 4, 16
# Bounds as in test_flax_nnx.py: 8-bit P·V against exact attention, and the INT8 cache against it.
BOUND = 0.05
CACHE_BOUND = 0.012


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def error(out, exact):
    out, exact = (np.asarray(x, np.float64) for x in (out, exact))
    return np.linalg.norm(out - exact) / np.linalg.norm(exact)


def flax_layer(**kwargs):
    return nn.MultiHeadDotProductAttention(N, qkv_features=N * H, **kwargs)


def sage_layer(**kwargs):
    return SageAttention(N, qkv_features=N * H, **kwargs)


def init(layer, *inputs):
    return layer.init(jax.random.key(0), *inputs)


def apply(layer, variables, *inputs, **kwargs):
    return layer.apply(variables, *inputs, **kwargs)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_step(layer, params, cache, x, **kwargs):
    out, new = layer.apply({**params, "cache": cache}, x, mutable=["cache"], **kwargs)
    return out, new["cache"]


CAUSAL = nn.make_causal_mask(jnp.ones((B, T)))


def test_adapter_gets_the_mask_through_the_filter_of_linen():
    x = normal(0, B, T, F)
    exact_layer = flax_layer()
    params = init(exact_layer, x)
    exact = apply(exact_layer, params, x, mask=CAUSAL)
    layer = flax_layer(attention_fn=attention_fn(recipe="train8"))
    dense = apply(layer, params, x, mask=CAUSAL)
    assert CAUSAL.dtype == jnp.float32 and 0 < error(dense, exact) < BOUND
    assert error(apply(layer, params, x), exact) > 0.1  # the mask matters
    causal = flax_layer(attention_fn=attention_fn(recipe="train8", is_causal=True))
    np.testing.assert_array_equal(apply(causal, params, x), dense)
    # Linen passes only what it finds by name: all that its own function takes has to be there.
    ours, theirs = (
        inspect.signature(f).parameters for f in (attention_fn(), nn.dot_product_attention)
    )
    assert set(theirs) - set(ours) == {"einsum_dot_general"}  # never passed by the layer
    assert not any(p.kind is p.VAR_KEYWORD for p in ours.values())


def test_a_window_may_be_a_list():
    layers = [sage_layer(local_window_size=window) for window in ([3, 0], (3, 0))]
    assert layers[0] == layers[1] and hash(layers[0]) == hash(layers[1])


@pytest.mark.parametrize(
    "options,keywords,message",
    [
        (dict(dropout_rate=0.1), dict(deterministic=False), "drops attention probabilities"),
        ({}, dict(sow_weights=True), "asks for the attention probabilities"),
        (
            dict(
                qk_attn_weights_einsum_cls=lambda: jnp.einsum,
                attn_weights_value_einsum_cls=lambda: jnp.einsum,
            ),
            {},
            "leave both unset",
        ),
    ],
)
def test_adapter_refuses_through_the_layer_of_flax(options, keywords, message):
    x = normal(0, B, 4, F)
    params = init(flax_layer(), x)
    layer = flax_layer(attention_fn=attention_fn(), **options)
    with pytest.raises(ValueError, match=message):
        layer.apply(params, x, rngs={"dropout": jax.random.key(1)}, **keywords)


def test_adapter_serves_decode_with_the_cache_of_flax():
    x = normal(0, B, 6, F)
    layer = flax_layer(attention_fn=attention_fn(), decode=True)
    variables = init(layer, x)
    params, cache = {"params": variables["params"]}, variables["cache"]
    outs = []
    for t in range(6):
        out, cache = decode_step(layer, params, cache, x[:, t : t + 1])
        outs.append(out)
    exact = apply(flax_layer(), params, x, mask=CAUSAL[..., :6, :6])
    assert error(jnp.concatenate(outs, 1), exact) < BOUND


@pytest.mark.parametrize(
    "options", [{}, dict(normalize_qk=True, out_features=24), dict(use_bias=False)], ids=str
)
def test_parameters_of_flax_load_and_mean_the_same(options):
    x = normal(0, B, T, F)
    theirs, ours = flax_layer(**options), sage_layer(is_causal=True, **options)
    params, own = init(theirs, x), init(ours, x)
    jax.tree.map(np.testing.assert_array_equal, own, params)  # names, shapes and values
    assert params["params"]["query"]["kernel"].shape == (F, N, H)
    exact = apply(theirs, params, x, mask=CAUSAL)
    assert 0 < error(apply(ours, params, x), exact) < BOUND


def test_grouped_heads_cross_attention_and_lengths():
    x, y = normal(0, B, T, F), normal(1, B, 11, 24)
    ours = sage_layer(num_kv_heads=2)
    params = init(ours, x, y)
    assert params["params"]["key"]["kernel"].shape == (24, 2, H)
    # Flax's Linen layer has no grouped heads: repeat the two of keys and values.
    repeated = jax.tree.map(lambda p: p, params)
    for name in ("key", "value"):
        repeated["params"][name] = {
            leaf: jnp.repeat(p, 2, axis=-2) for leaf, p in params["params"][name].items()
        }
    lengths = jnp.array([11, 4])
    mask = (jnp.arange(11) < lengths[:, None])[:, None, None]
    exact = apply(flax_layer(), repeated, x, y, mask=mask)
    assert error(apply(ours, params, x, y, key_value_seq_lengths=lengths), exact) < BOUND
    assert error(apply(ours, params, x, y, mask=mask.astype(float)), exact) < BOUND


@pytest.mark.parametrize("options", [dict(implementation="nope"), dict(recipe="nope")], ids=str)
def test_what_does_not_exist_is_refused_when_made(options):
    with pytest.raises(ValueError, match="'nope' is unknown; choose one of"):
        sage_layer(**options)


def test_dtype_and_param_dtype():
    layer = sage_layer(dtype=jnp.bfloat16, param_dtype=jnp.float16, normalize_qk=True)
    x = normal(0, B, T, F)
    params = init(layer, x)
    assert {p.dtype.name for p in jax.tree.leaves(params)} == {"float16"}
    assert apply(layer, params, x).dtype == jnp.bfloat16


def test_sharding_metadata_is_that_of_flax():
    def annotated(init, *names):
        return nn.with_partitioning(init, names)

    zeros, kernel_init = nn.initializers.zeros, nn.linear.default_kernel_init
    options = dict(
        kernel_init=annotated(kernel_init, "data", "model", None),
        out_kernel_init=annotated(kernel_init, "model", None, "data"),
        bias_init=annotated(zeros, "model", None),
        out_bias_init=annotated(zeros, None),
    )
    x = normal(0, B, 4, F)
    ours, theirs = (
        nn.get_partition_spec(jax.eval_shape(make(**options).init, jax.random.key(0), x))
        for make in (sage_layer, flax_layer)
    )
    assert ours == theirs
    assert ours["params"]["key"]["kernel"] == PartitionSpec("data", "model", None)
    assert ours["params"]["out"]["kernel"] == PartitionSpec("model", None, "data")


def test_dropout_falls_on_the_output_only():
    x = normal(0, B, T, F)
    layer = sage_layer(dropout_rate=0.25)
    params = init(sage_layer(), x)
    kept = apply(sage_layer(), params, x)
    rngs = {"dropout": jax.random.key(1)}
    out = np.asarray(layer.apply(params, x, deterministic=False, rngs=rngs))
    dropped = out == 0
    assert 0.1 < dropped.mean() < 0.4
    np.testing.assert_allclose(out[~dropped], np.asarray(kept)[~dropped] / 0.75, rtol=1e-5)
    np.testing.assert_array_equal(layer.apply(params, x, deterministic=True), kept)
    given = layer.apply(params, x, deterministic=False, dropout_rng=jax.random.key(2))
    assert 0.1 < (np.asarray(given) == 0).mean() < 0.4


@pytest.mark.parametrize("recipe", ["train8"])
def test_training_lowers_the_loss_with_gradients_that_are_right(recipe):
    x = normal(0, 4, T, F)
    causal = nn.make_causal_mask(jnp.ones((4, T)))
    exact, ours = (
        flax_layer(normalize_qk=True),
        sage_layer(recipe=recipe, normalize_qk=True, is_causal=True),
    )
    params = init(ours, x)
    teacher = jax.tree.map(lambda p: p + 0.1 * normal(p.size, *p.shape), params)
    target = apply(exact, teacher, x, mask=causal)
    optimizer = optax.adam(3e-3)

    def loss(params, layer, **kwargs):
        return jnp.mean((layer.apply(params, x, **kwargs) - target) ** 2)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params, ours)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value, gradients

    expected = jax.jit(jax.grad(loss), static_argnums=1)(params, exact, mask=causal)["params"]
    state, losses, gradients = optimizer.init(params), [], []
    for _ in range(15):
        params, state, value, gradient = step(params, state)
        losses.append(float(value))
        gradients.append(gradient["params"])
    for name in ("query", "key", "value", "out"):
        gradient = np.asarray(gradients[0][name]["kernel"])
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
        assert error(gradient, expected[name]["kernel"]) < 0.12, name
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize(
    "options",
    [{}, dict(num_kv_heads=2, normalize_qk=True, rope_theta=1e4, local_window_size=(6, 0))],
    ids=["plain", "everything"],
)
def test_decoding_equals_the_full_pass(options):
    x = normal(0, B, T, F)
    layer = sage_layer(is_causal=True, **options)
    variables = init(layer.clone(decode=True), jnp.zeros((B, T + 4, F)))
    params, cache = {"params": variables["params"]}, variables["cache"]
    assert cache["cached_key"].dtype == cache["cached_value"].dtype == jnp.int8
    assert cache["cached_key"].shape == (B, options.get("num_kv_heads", N), T + 4, H)
    assert int(cache["cache_index"]) == 0
    full = apply(layer, params, x)
    outs = []
    for piece in [x[:, :7]] + [x[:, t : t + 1] for t in range(7, T)]:
        out, cache = decode_step(layer.clone(decode=True), params, cache, piece)
        outs.append(out)
    out = jnp.concatenate(outs, axis=1)
    assert int(cache["cache_index"]) == T
    assert error(out, full) < BOUND  # the full pass has the larger error of the two
    if not options:
        exact = apply(flax_layer(), params, x, mask=CAUSAL)
        assert error(out, exact) < CACHE_BOUND


def test_ragged_prompts_decode_like_each_row_alone():
    x, new, lengths = normal(0, B, 6, F), normal(1, B, 1, F), [6, 3]
    layer = sage_layer(rope_theta=1e4, decode=True, ragged_cache=True)
    variables = init(layer, jnp.zeros((B, 8, F)))
    params, cache = {"params": variables["params"]}, variables["cache"]
    prompt, cache = decode_step(layer, params, cache, x, key_value_seq_lengths=jnp.array(lengths))
    out, cache = decode_step(layer, params, cache, new)
    np.testing.assert_array_equal(cache["cache_index"], [7, 4])
    layer = layer.clone(ragged_cache=False)
    for b, n in enumerate(lengths):
        cache = init(layer, jnp.zeros((1, 8, F)))["cache"]
        alone, cache = decode_step(layer, params, cache, x[b : b + 1, :n])
        np.testing.assert_allclose(prompt[b, :n], alone[0], atol=1e-5)
        alone, cache = decode_step(layer, params, cache, new[b : b + 1])
        np.testing.assert_allclose(out[b], alone[0], atol=1e-5)


def test_decode_refuses_what_it_has_no_use_for():
    x = normal(0, B, 4, F)
    layer = sage_layer(decode=True)
    variables = init(layer, x)
    run = functools.partial(layer.apply, variables, x, mutable=["cache"])
    with pytest.raises(ValueError, match="is_causal is not used in decode mode"):
        run(is_causal=False)
    with pytest.raises(ValueError, match="query_segment_ids is not used in decode mode"):
        run(query_segment_ids=jnp.zeros((B, 4), jnp.int32))
    with pytest.raises(ValueError, match="cross-attention layer with decode=False"):
        run(x)
    with pytest.raises(ValueError, match="even head dimension"):
        SageAttention(2, qkv_features=6, rope_theta=1e4).init(jax.random.key(0), x)
