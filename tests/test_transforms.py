"""Every JAX transformation of `sage_jax.dot_product_attention` gives what a plain call gives, or
says why it cannot.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P
from metrics import assert_same_bits, relative_l2
from programs import native_calls

import sage_jax
from sage_jax import _compat, _ffi

B, T, S, N, K, H = 2, 24, 40, 4, 2, 16
attend = functools.partial(sage_jax.dot_product_attention, is_causal=True)
needs_cpu = pytest.mark.skipif(
    _ffi.load("cpu") is None, reason="the native CPU module is not built"
)


def inputs(*lead, seed=0, heads=N, kv_heads=K, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((T, heads), (S, kv_heads), (S, kv_heads))
    return [jnp.asarray(rng.standard_normal((*lead, *s, H)), dtype) for s in shapes]


def loss(q, k, v, **kwargs):
    out, lse = attend(q, k, v, return_residual=True, **kwargs)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(lse))


gradients = jax.grad(loss, (0, 1, 2))


def assert_all_same(actual, expected):
    jax.tree.map(assert_same_bits, actual, expected)


def assert_all_close(actual, expected, bound=1e-5):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert relative_l2(x, y) < bound


def test_jit_is_eager():
    x = inputs(B)
    assert_all_close(jax.jit(attend)(*x), attend(*x))
    assert_all_close(jax.jit(gradients)(*x), gradients(*x))


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_without_jit(implementation):
    x = inputs(B)
    call = functools.partial(attend, implementation=implementation)
    grads = functools.partial(gradients, implementation=implementation)
    expected = call(*x), grads(*x), jax.vmap(call)(*(a[None] for a in x))
    with jax.disable_jit():
        actual = call(*x), grads(*x), jax.vmap(call)(*(a[None] for a in x))
    assert_all_same(actual, expected)


def test_value_and_grad_value_is_the_forward_value():
    """No recipe given: differentiating does not change the forward numbers."""
    x = inputs(B)
    value, _ = jax.value_and_grad(loss, (0, 1, 2))(*x)
    assert_all_close(value, loss(*x), 1e-6)


def test_vjp_linear_in_cotangent():
    x = inputs(B)
    out, vjp = jax.vjp(attend, *x)
    zeros = vjp(jnp.zeros_like(out))
    assert all(not np.any(g) for g in zeros)


# --------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize(
    "axes", [(0, 0, 0), (1, 2, 3), (-1, 0, 1), (0, None, None), (None, 1, None)]
)
def test_vmap_any_axis_partly_mapped(axes):
    V = 3
    plain = inputs(V, B)
    x = [p[0] if a is None else jnp.moveaxis(p, 0, a) for p, a in zip(plain, axes)]
    batched = jax.vmap(attend, axes)(*x)
    looped = jnp.stack(
        [attend(*(p[0 if a is None else i] for p, a in zip(plain, axes))) for i in range(V)]
    )
    assert_all_close(batched, looped)


def test_vmap_nested_with_masks_of_every_kind():
    x = inputs(2, 3, B)
    rng = np.random.default_rng(1)
    mask = jnp.asarray(rng.random((2, 1, 1, T, S)) < 0.7)  # mapped by the outer vmap only
    lengths = jnp.asarray(rng.integers(1, S, (3, B)))  # by the inner one only
    segments = jnp.asarray(rng.integers(0, 2, (2, 3, B, S)))

    def f(q, k, v, mask, lengths, ids):
        return attend(
            q, k, v, mask=mask, key_value_seq_lengths=lengths, query_segment_ids=ids[:, :T],
            key_value_segment_ids=ids, return_residual=True,
        )  # fmt: skip

    inner = jax.vmap(f, (0, 0, 0, None, 0, 0))
    nested = jax.jit(jax.vmap(inner, (0, 0, 0, 0, None, 0)))(*x, mask, lengths, segments)
    for i in range(2):
        for j in range(3):
            expected = f(*(p[i, j] for p in x), mask[i], lengths[j], segments[i, j])
            for got, want in zip(nested, expected, strict=True):
                np.testing.assert_allclose(got[i, j], want, rtol=1e-4, atol=1e-6)


def test_vmap_of_grad_and_grad_of_vmap():
    x = inputs(3, B)
    looped = [jnp.stack(g) for g in zip(*(gradients(*(p[i] for p in x)) for i in range(3)))]
    assert_all_close(jax.vmap(gradients)(*x), looped)
    assert_all_close(jax.grad(lambda *a: jnp.sum(jax.vmap(loss)(*a)), (0, 1, 2))(*x), looped)


def test_vmap_of_grad_with_unmapped_keys():
    q, k, v = inputs(3, B)
    k, v = k[0], v[0]
    dq, dk, dv = jax.vmap(gradients, (0, None, None))(q, k, v)
    looped = [jnp.stack(g) for g in zip(*(gradients(q[i], k, v) for i in range(3)))]
    assert_all_close((dq, dk, dv), looped)


def test_vmap_with_mapped_bias_and_its_gradient():
    x = inputs(B)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((3, N, 1, S)), jnp.float32)
    f = lambda bias: loss(*x, bias=bias, implementation="reference")  # noqa: E731
    looped = jnp.stack([jax.grad(f)(b) for b in bias])
    assert_all_close(jax.vmap(jax.grad(f))(bias), looped)


def test_jacrev():
    q, k, v = inputs(1)
    q, k, v = q[:, :2, :1], k[:, :3, :1], v[:, :3, :1]
    jacobian = jax.jacrev(attend)(q, k, v)
    for index in np.ndindex(2, 2):
        row = jax.grad(lambda q, i=index: attend(q, k, v)[0, i[0], 0, i[1]])(q)
        np.testing.assert_allclose(jacobian[0, index[0], 0, index[1]], row, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------ checkpointing


def compiled_calls(f, *args):
    """How often the compiled program runs each native operation."""
    return native_calls(jax.jit(f).lower(*args).compile().as_text())


def traced_calls(f, *args):
    """The same as traced, before XLA merges equal calls (whether it does depends on its version)."""
    called = []

    def visit(value):
        for eqn in getattr(getattr(value, "jaxpr", value), "eqns", ()):
            if eqn.primitive.name == "ffi_call":
                called.append(eqn.params["target_name"].removeprefix("sage_jax_"))
            for parameter in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                visit(parameter)

    visit(jax.make_jaxpr(f)(*args))
    return {name: called.count(name) for name in sorted(set(called))}


@needs_cpu
def test_checkpoint_runs_the_forward_kernel_again_only_without_the_policy():
    x = inputs(B)
    plain = dict(attend=1, attend_backward=1, quantize_kv=1, quantize_q=1)
    assert compiled_calls(gradients, *x) == plain

    def checkpointed(policy):
        block = jax.checkpoint(lambda *a: loss(*a), policy=policy)
        return jax.grad(lambda *a: jnp.sin(block(*a)), (0, 1, 2))

    saving = checkpointed(jax.checkpoint_policies.save_only_these_names(sage_jax.RESIDUALS))
    assert compiled_calls(saving, *x) == plain
    once = traced_calls(saving, *x)
    assert once == traced_calls(gradients, *x)
    twice = {name: n if name == "attend_backward" else 2 * n for name, n in once.items()}
    assert traced_calls(checkpointed(None), *x) == twice


def test_checkpoint_gradients():
    x = inputs(B)
    for policy in (None, jax.checkpoint_policies.save_only_these_names(sage_jax.RESIDUALS)):
        got = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))(*x)
        assert_all_close(got, gradients(*x))


TRAIN8 = sage_jax.recipes["train8"]
KEPT = [  # recipe, head dimension -> bytes kept, relative to a bf16 forward pass (docs/numerics.md)
    (TRAIN8, 64, 0.646),
    (TRAIN8, 128, 0.636),
    (TRAIN8, 256, 0.632),
    (TRAIN8, 80, 0.866),  # padded to 128
    (TRAIN8.replace(delta="exact"), 128, 0.636),
    (TRAIN8.replace(dp="bf16"), 64, 0.770),
    (TRAIN8.replace(dp="bf16"), 128, 0.761),
    (sage_jax.recipes["sagebwd"], 64, 0.770),
    (sage_jax.recipes["sagebwd"], 128, 0.761),
    (sage_jax.recipes["sagebwd"], 80, 1.065),
]


@pytest.mark.parametrize("recipe, head_dim, bound", KEPT, ids=lambda x: getattr(x, "name", x))
def test_bytes_kept_for_the_backward_pass(recipe, head_dim, bound):
    shape = 2, 1024, 4, head_dim
    q = k = v = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    _, pull = jax.vjp(functools.partial(attend, recipe=recipe), q, k, v)
    kept = {id(x): x.nbytes for x in jax.tree.leaves(pull) if hasattr(x, "nbytes")}
    bf16 = 4 * q.nbytes + 2 * 1024 * 4 * 4  # q, k, v, out, LSE
    assert bound - 0.002 < sum(kept.values()) / bf16 <= bound


# -------------------------------------------------------------------------- loops, devices, buffers


def test_scan_and_its_gradient():
    q, k, v = inputs(B)

    def scanned(q, k, v):
        step = lambda x, _: (attend(x, k, v), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, q, None, length=3)[0] ** 2)

    def unrolled(q, k, v):
        return jnp.sum(attend(attend(attend(q, k, v), k, v), k, v) ** 2)

    assert_all_close(
        jax.grad(scanned, (0, 1, 2))(q, k, v), jax.grad(unrolled, (0, 1, 2))(q, k, v), 1e-3
    )


def test_pmap():
    x = inputs(4, B)
    assert_all_close(jax.pmap(attend)(*x), jax.vmap(attend)(*x))
    assert_all_close(jax.pmap(gradients)(*x), jax.vmap(gradients)(*x))


@pytest.mark.parametrize("check", [True, False])
def test_shard_map(check):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("b", "h"))
    spec = P("b", None, "h")
    names = {"check_vma": check}
    x = inputs(B)
    names.update(mesh=mesh, in_specs=spec, out_specs=spec)
    f = lambda g: _compat.shard_map(g, **names)
    assert_all_close(jax.jit(f(attend))(*x), attend(*x))
    out = jax.grad(lambda *a: jnp.sum(jnp.sin(f(attend)(*a))), (0, 1, 2))(*x)
    assert_all_close(out, jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a))), (0, 1, 2))(*x))


def test_shard_map_sums_gradients_of_replicated_keys():
    """The silent failure this guards against: right outputs, but each device's own part of dK and
    dV.
    """
    mesh = Mesh(np.array(jax.devices()[:4]), ("b",))
    q, k, v = inputs(4, kv_heads=1)
    k, v = k[:1], v[:1]

    def local(q, k, v):
        k, v = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in (k, v))
        return attend(q, k, v)

    split = _compat.shard_map(local, mesh=mesh, in_specs=(P("b"), P(), P()), out_specs=P("b"))
    f = lambda g: jax.grad(lambda *a: jnp.sum(jnp.sin(g(*a))), (0, 1, 2))(q, k, v)  # noqa: E731
    assert_all_close(f(split), f(local))


def test_shard_map_query_heads_share_a_replicated_key_head():
    mesh = Mesh(np.array(jax.devices()[:4]), ("h",))
    q, k, v = inputs(B, kv_heads=1)
    heads = P(None, None, "h")
    split = _compat.shard_map(attend, mesh=mesh, in_specs=(heads, P(), P()), out_specs=heads)
    f = lambda g: jax.grad(lambda *a: jnp.sum(jnp.sin(g(*a))), (0, 1, 2))(q, k, v)  # noqa: E731
    # each device rounds dO and Q by its own heads' maxima, so agreement is that of two roundings
    assert_all_close(f(split), f(attend), 0.05)


def test_donation():
    q, k, v = inputs(B)
    expected = attend(q, k, v)
    given = q.copy()
    program = jax.jit(attend, donate_argnums=0).lower(given, k, v).compile()
    assert "input_output_alias" in program.as_text()  # the output takes the query's place
    assert_all_close(program(given, k, v), expected)
    assert given.is_deleted() and not q.is_deleted()


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("recipe", ["train8", "sagebwd"])
def test_x64_switched_on_between_calls(recipe, implementation):
    """What JAX has cached must not mix its 32-bit integers with 64-bit ones."""
    x = inputs(B)
    f = functools.partial(gradients, recipe=recipe, implementation=implementation)
    expected = f(*x)
    with jax.enable_x64(True):
        assert_all_close(f(*x), expected)
    assert_all_close(f(*x), expected)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("recipe", ["train8", "sagebwd"])
def test_without_implicit_rank_or_dtype_promotion(recipe, implementation):
    x = inputs(3)  # a batch that nothing else here has: nothing may come from a cache
    masks = dict(
        mask=jnp.ones((T, S), bool),
        bias=jnp.ones(S),
        key_value_seq_lengths=jnp.array([S, 5, 0]),
        query_segment_ids=jnp.zeros((3, T), jnp.int32),
        key_value_segment_ids=jnp.zeros((3, S), jnp.int32),
    )
    f = functools.partial(gradients, recipe=recipe, implementation=implementation, **masks)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        got = f(*x)
    assert_all_same(got, f(*x))


def test_eval_shape_runs_nothing():
    types = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs(B)]
    out = jax.eval_shape(gradients, *types)
    assert [x.shape for x in out] == [t.shape for t in types]
    assert all(x.dtype == jnp.bfloat16 for x in out)


# ------------------------------------------------------------------------------ refused derivatives


@pytest.mark.parametrize(
    "attempt",
    [
        lambda f, x: jax.jvp(f, x, x),
        lambda f, x: jax.jit(lambda *a: jax.jvp(f, a, a))(*x),
        lambda f, x: jax.jvp(jax.jit(f), x, x),
        lambda f, x: jax.jacfwd(f)(*x),
    ],
    ids=["jvp", "jit_jvp", "jvp_jit", "jacfwd"],
)
def test_forward_mode_says_what_to_do(attempt):
    with pytest.raises(TypeError, match="reverse mode only.*jax.nn.dot_product_attention"):
        attempt(attend, tuple(inputs(B)))


@pytest.mark.parametrize(
    "attempt",
    [
        lambda f, x: jax.grad(lambda q: jnp.sum(jax.grad(f)(q, *x[1:])))(x[0]),
        lambda f, x: jax.jit(jax.hessian(lambda q: f(q, *x[1:])))(x[0]),
        lambda f, x: jax.jvp(lambda q: jax.grad(f)(q, *x[1:]), x[:1], x[:1]),
    ],
    ids=["grad_of_grad", "hessian", "jvp_of_grad"],
)
def test_second_derivatives_say_what_to_do(attempt):
    with pytest.raises(TypeError, match="second derivative.*jax.nn.dot_product_attention"):
        attempt(loss, tuple(inputs(B)))


def test_inference_only_recipe_refuses_gradients():
    x = inputs(B)
    loss(*x, recipe="sage2")
    with pytest.raises(ValueError, match='recipe="train8".*replace\\(backward="train8"\\)'):
        jax.grad(loss)(*x, recipe="sage2")
    recipe = sage_jax.recipes["sage2"].replace(backward="train8")
    assert_all_close(jax.grad(loss, (0, 1, 2))(*x, recipe=recipe), gradients(*x))
