"""`sage3` through the public function, JAX transformations and Flax: FP4 attention as users call it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs
from metrics import assert_same_bits, relative_l2
from test_nvfp4 import attention

import sage_jax
from sage_jax.masking import no_masks


def inputs(tokens=140, keys=150, dtype=jnp.float32):
    q, k, v, dout, *_ = make_inputs(Case("public", T=tokens, S=keys, N=4, K=2))
    return tuple(x.astype(dtype) for x in (q, k, v, dout))


attend = functools.partial(sage_jax.dot_product_attention, recipe="sage3")
TRAINABLE = sage_jax.recipes["sage3"].replace(backward="train8")


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_dot_product_attention_runs_the_specification(implementation):
    q, k, v, _ = inputs()
    out, lse = attend(q, k, v, implementation=implementation, return_residual=True)
    _, _, expected, expected_lse = attention(q, k, v, no_masks(2, 140, 150))
    assert relative_l2(out, expected) < 2e-3  # another compiled program: a last bit may move a code
    np.testing.assert_allclose(jnp.swapaxes(lse, 1, 2), expected_lse, atol=1e-4)


@pytest.mark.parametrize("name, fmt", [("cpu", "mxfp4"), ("cuda", "mxfp4"), ("cuda", "amxfp4")])
def test_implementations_without_kernels_say_so(name, fmt):
    q, k, v, _ = inputs()
    recipe = sage_jax.Recipe("mine", qk=fmt, pv=fmt)
    sentence = sage_jax.supports(q, k, v, recipe=recipe, implementation=name, platform=name)
    assert f"recipe 'mine' multiplies {fmt} operands" in sentence
    assert f"implementation='{name}' has no kernels in this build" in sentence
    assert "use implementation='reference'" in sentence and "\n" not in sentence
    assert sage_jax.supports(q, k, v, recipe=recipe) is None


def test_explain_names_the_reference_and_its_operations():
    q, k, v, _ = inputs()
    explained = sage_jax.explain(q, k, v, recipe="sage3", implementation="reference")
    assert explained.kernels == ("quantize_kv_fp4", "quantize_q_fp4", "attend_fp4")
    assert explained.training_recipe is None
    explained = sage_jax.explain(q, k, v, recipe=sage_jax.Recipe("mx", qk="mxfp4", pv="mxfp4"))
    assert (explained.platform, explained.backend) == ("cpu", "reference")
    assert "no mxfp4 kernels for cpu in this build" in str(explained)
    assert explained.kernels == ("quantize_kv_fp4", "quantize_q_fp4", "attend_fp4")
    training = sage_jax.explain(q, k, v, recipe=TRAINABLE)
    assert len(training.kernels) == 7 and training.kernels[-1].endswith("attend_backward")


def test_sage3_itself_has_no_gradient():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="'sage3' is for inference only and has no gradient") as e:
        jax.grad(lambda q: attend(q, k, v).sum())(q)
    assert 'backward="train8"' in str(e.value)
    assert sage_jax.supports(q, k, v, recipe="sage3", differentiate=True) == str(e.value)
    assert sage_jax.supports(q, k, v, recipe=TRAINABLE, differentiate=True) is None


@pytest.mark.parametrize("options", [{}, dict(is_causal=True, local_window_size=(60, None))])
def test_fp4_forward_with_8_bit_gradients(options):
    """The value is that of FP4, the gradients are those of train8: near the exact ones."""
    q, k, v, dout = inputs()
    call = functools.partial(sage_jax.dot_product_attention, return_residual=True, **options)
    (out, lse), pull = jax.vjp(functools.partial(call, recipe=TRAINABLE), q, k, v)
    for got, expected in zip((out, lse), call(q, k, v, recipe="sage3"), strict=True):
        assert relative_l2(got, expected) < 2e-3
    ours = pull((dout, jnp.ones_like(lse)))
    of_train8 = jax.vjp(functools.partial(call, recipe="train8"), q, k, v)[1]
    exactly = functools.partial(exact_softmax, **options)
    exact = jax.vjp(exactly, q, k, v)[1]((dout, jnp.ones_like(lse)))
    for got, same, expected in zip(ours, of_train8((dout, jnp.ones_like(lse))), exact, strict=True):
        assert_same_bits(got, same)
        assert relative_l2(got, expected) < 0.08


def exact_softmax(q, k, v, *, is_causal=False, local_window_size=None):
    """(out, lse) of plain float32 attention, differentiable in both by JAX."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * q.shape[-1] ** -0.5
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    seen = (distance >= 0) if is_causal else distance > -(10**6)
    seen &= distance <= (local_window_size or (10**6,))[0]
    logits = jnp.where(seen, logits, -jnp.inf)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v, precision="highest")
    return out, jnp.swapaxes(jax.nn.logsumexp(logits, axis=-1), 1, 2)


def test_transformations_give_the_same_rows():
    q, k, v, _ = inputs()
    plain = attend(q, k, v)
    rows = jax.jit(jax.vmap(attend))(q[:, None], k[:, None], v[:, None])[:, 0]
    assert relative_l2(rows, plain) < 2e-3


def test_heads_and_batch_split_over_devices():
    q, k, v, _ = inputs()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "model"))
    split = jax.jit(attend)(*(jax.device_put(x, place) for x in (q, k, v)))
    assert split.sharding.is_equivalent_to(place, 4)
    assert relative_l2(split, attend(q, k, v)) < 2e-3


@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 5), (1, 5, 0)], ids=str)
def test_nothing_to_attend_to(shape):
    batch, queries, keys = shape
    q, k = jnp.ones((batch, queries, 2, 16)), jnp.ones((batch, keys, 2, 16))
    out, lse = attend(q, k, k, return_residual=True)
    assert out.shape == q.shape and (np.asarray(out) == 0).all()
    assert np.isneginf(np.asarray(lse)).all() and lse.shape == q.shape[:3]


def test_flax_layers_take_the_recipe():
    from flax import nnx

    layer = sage_jax.flax.nnx.SageAttention(4, 64, num_kv_heads=2, recipe="sage3", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 70, 64))
    out = layer(x)
    layer8 = sage_jax.flax.nnx.SageAttention(
        4, 64, num_kv_heads=2, recipe="sage2", rngs=nnx.Rngs(0)
    )
    assert 1e-3 < relative_l2(out, layer8(x)) < 0.25
    flax_own = nnx.MultiHeadAttention(
        4, 64, decode=False, rngs=nnx.Rngs(0),
        attention_fn=sage_jax.flax.attention_fn(recipe=TRAINABLE),
    )  # fmt: skip
    gradients = nnx.grad(lambda m: (m(x) ** 2).mean())(flax_own)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradients))
