"""Attention over several devices: split over batch and heads, without communication, with the
gradients of one device.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from metrics import relative_l2

import sage_jax

B, T, S, N, K, H = 4, 24, 40, 8, 4, 16
BATCH, HEADS = P("b"), P(None, None, "h")
BOTH = P("b", None, "h")
COLLECTIVE = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
attend = functools.partial(sage_jax.dot_product_attention, is_causal=True)


def make_mesh(kind):
    return jax.make_mesh((2, 4), ("b", "h"), axis_types=(getattr(AxisType, kind),) * 2)


def inputs(heads=N, kv_heads=K, batch=B):
    rng = np.random.default_rng(0)
    shapes = ((T, heads), (S, kv_heads), (S, kv_heads))
    return [jnp.asarray(rng.standard_normal((batch, *s, H)), jnp.float32) for s in shapes]


def put(mesh, specs, arrays):
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


def results(q, k, v, dout, **kwargs):
    """out, lse, dq, dk, dv"""
    f = lambda *a: attend(*a, return_residual=True, **kwargs)  # noqa: E731
    (out, lse), vjp = jax.vjp(f, q, k, v)
    return out, lse, *vjp((dout, jnp.cos(lse)))


def compiled(f, *args):
    program = jax.jit(f).lower(*args).compile()
    return program, COLLECTIVE.findall(program.as_text())


def check(mesh, specs, arrays, *, collectives=False, bound=1e-5, **kwargs):
    """Same numbers as on one device; communication as expected, where `collectives` says so."""
    q_spec, k_spec, v_spec = specs
    dout = jnp.sin(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    expected = results(*arrays, dout, **kwargs)
    placed = put(mesh, (q_spec, k_spec, v_spec, q_spec), (*arrays, dout))
    program, found = compiled(functools.partial(results, **kwargs), *placed)
    assert collectives is None or bool(found) == collectives, found
    got = program(*placed)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert relative_l2(x, y) < bound, name
    return got


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [BATCH, HEADS, BOTH], ids=["batch", "heads", "both"])
def test_no_collective(kind, spec):
    mesh = make_mesh(kind)
    out, lse, dq, dk, dv = check(mesh, (spec,) * 3, inputs())
    for x in (out, dq, dk, dv):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_masks_of_every_kind(kind):
    mesh = make_mesh(kind)
    rng = np.random.default_rng(1)
    placed = lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    ids = jnp.asarray(rng.integers(0, 2, (B, S)), jnp.int32)
    masks = dict(
        mask=jnp.asarray(rng.random((B, N, T, S)) < 0.8),
        key_value_seq_lengths=jnp.asarray(rng.integers(1, S, B), jnp.int32),
        query_segment_ids=ids[:, :T],
        key_value_segment_ids=ids,
    )
    specs = dict(
        mask=P("b", "h"),
        key_value_seq_lengths=P("b"),
        query_segment_ids=P("b"),
        key_value_segment_ids=P("b"),
    )
    x = inputs()
    expected = attend(*x, **masks)
    names = tuple(masks)
    f = lambda q, k, v, *m: attend(q, k, v, **dict(zip(names, m, strict=True)))  # noqa: E731
    args = (*put(mesh, (BOTH,) * 3, x), *(placed(specs[n], masks[n]) for n in names))
    program, found = compiled(f, *args)
    assert not found
    assert relative_l2(program(*args), expected) < 1e-5


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(
    "specs",
    [(P("b"), None), (None, P("b")), (P("b"), P("b")), (P(), P("b")), (P("h"), P("b"))],
    ids=str,
)
def test_lengths_under_set_mesh(kind, alignment, specs):
    """One array of lengths or two, placed like the batch or otherwise."""
    mesh = make_mesh(kind)
    lengths = jnp.array([3, 24, 17, 9], jnp.int32)
    names = "query_seq_lengths", "key_value_seq_lengths"
    masks = {name: lengths for name, spec in zip(names, specs, strict=True) if spec is not None}
    specs = {name: spec for name, spec in zip(names, specs, strict=True) if spec is not None}

    def f(q, k, v, dout, masks):  # without the LSE, −inf in rows that see nothing
        out, _, *gradients = results(q, k, v, dout, causal_alignment=alignment, **masks)
        return out, *gradients

    x = inputs()
    x.append(jnp.cos(x[0]))
    expected = f(*x, masks)
    with jax.set_mesh(mesh):
        placed = put(mesh, (BOTH,) * 4, x)
        masks = {name: jax.device_put(lengths, NamedSharding(mesh, specs[name])) for name in specs}
        for run in (f, jax.jit(f)):
            for got, wanted in zip(run(*placed, masks), expected, strict=True):
                assert relative_l2(got, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_broadcast_mask_over_batch_and_heads(kind):
    mesh = make_mesh(kind)
    mask = jnp.asarray(np.random.default_rng(1).random((T, S)) < 0.8)
    x = inputs()
    placed = put(mesh, (BOTH,) * 3 + (P(),), (*x, mask))
    program, found = compiled(lambda q, k, v, m: attend(q, k, v, mask=m), *placed)
    assert not found
    assert relative_l2(program(*placed), attend(*x, mask=mask)) < 1e-5


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_replicated_keys_get_the_whole_gradient(kind):
    """The silent failure this guards against: right outputs, but one device's part of dK and dV."""
    mesh = make_mesh(kind)
    # whether the gradients are gathered is the compiler's choice on Auto axes
    *_, dk, dv = check(mesh, (BOTH, P(), P()), inputs(), collectives=None)
    if kind == "Explicit":
        assert dk.sharding.is_fully_replicated and dv.sharding.is_fully_replicated


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_split_query_heads_share_one_key_head(kind):
    """Multi-query attention: every device keeps the key head; its gradient is summed over
    devices.
    """
    mesh = make_mesh(kind)
    x = inputs(kv_heads=1)
    specs = (BOTH, BATCH, BATCH)
    # each device rounds dO and Q by its own heads' maxima: gradients agree as two roundings do
    check(mesh, specs, x, collectives=True, bound=0.08)
    _, found = compiled(attend, *put(mesh, specs, x))
    assert not found  # the forward pass needs no communication


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_heads_that_do_not_divide_stay_whole(kind):
    check(make_mesh(kind), (BOTH, BATCH, BATCH), inputs(kv_heads=2), collectives=True)


def test_auto_split_sequences_are_gathered():
    mesh = make_mesh("Auto")
    sequence = P("b", "h")
    check(mesh, (sequence, sequence, sequence), inputs(), collectives=True)


def test_explicit_split_sequences_are_refused():
    mesh = make_mesh("Explicit")
    q, k, v = put(mesh, (P("b", "h"), BATCH, BATCH), inputs())
    with pytest.raises(
        ValueError, match="query .* is sharded over mesh axis 'h' along array axis 1.*reshard"
    ):
        attend(q, k, v)


def test_explicit_works_eagerly_and_under_vmap():
    mesh = make_mesh("Explicit")
    x = inputs()
    placed = put(mesh, (BOTH,) * 3, x)
    assert relative_l2(attend(*placed), attend(*x)) < 1e-5
    stacked = [jnp.stack([a, a * 0.5]) for a in x]
    together = put(mesh, (P(None, *BOTH),) * 3, stacked)
    assert relative_l2(jax.vmap(attend)(*together), jax.vmap(attend)(*stacked)) < 1e-5


def check_function(f, placed, plain, *, collectives=False, reference=None):
    """f and its gradients: the numbers of one device, with communication as expected."""
    reference = reference or f
    loss = lambda f: lambda *a: jnp.sum(jnp.sin(f(*a)))  # noqa: E731
    for run, want in (
        (lambda *a: (f(*a),), (reference(*plain),)),
        (jax.grad(loss(f), (0, 1, 2)), jax.grad(loss(reference), (0, 1, 2))(*plain)),
    ):
        program, found = compiled(run, *placed)
        assert collectives or not found
        for x, y in zip(program(*placed), want, strict=True):
            assert relative_l2(x, y) < 1e-3  # other shapes may sum in another order


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [P(None, *BOTH), P("b", None, None, "h")], ids=["rows", "mapped"])
def test_vmap_needs_no_communication(kind, spec):
    """Whichever axis is split: the batch rows or the mapped one."""
    if kind == "Explicit" and spec[0] and jax.__version_info__ < (0, 9, 1):
        pytest.skip("refused with a sentence")
    stacked = [jnp.stack([a, a * 0.5]) for a in inputs()]
    check_function(jax.vmap(attend), put(make_mesh(kind), (spec,) * 3, stacked), stacked)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_nested_vmap_with_operands_that_are_not_mapped(kind):
    q, k, v = inputs()
    q = jnp.stack([jnp.stack([q * (i + j) for i in (1, 2)]) for j in (0.5, 1, 2)])
    v = jnp.stack([v, -v, 2 * v])
    f = jax.vmap(jax.vmap(attend, (0, None, None)), (0, None, 0))
    specs = P(None, None, *BOTH), BOTH, P(None, *BOTH)
    check_function(f, put(make_mesh(kind), specs, (q, k, v)), (q, k, v))


def scanned(f):
    """Two layers of f, as a loop; keys and values are the loop's constants."""
    return lambda q, k, v: jax.lax.scan(lambda x, _: (f(x, k, v), None), q, None, length=2)[0]


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit", "Manual"])
def test_gradient_of_scan(kind, remat):
    """No residual of the loop may be a zero-size array at the edge of a `shard_map`: XLA crashes."""
    mesh, f = make_mesh("Auto" if kind == "Manual" else kind), attend
    if kind == "Manual":
        f = jax.shard_map(attend, mesh=mesh, in_specs=BOTH, out_specs=BOTH)
    f = jax.checkpoint(f) if remat else f
    x = inputs()
    check_function(scanned(f), put(mesh, (BOTH,) * 3, x), x, reference=scanned(attend))


@pytest.mark.parametrize("names", ["b", "h"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shard_map_over_one_of_two_axes(kind, names):
    mesh = make_mesh(kind)
    only = P(*(entry if entry == names else None for entry in BOTH))
    f = jax.shard_map(attend, mesh=mesh, in_specs=only, out_specs=only, axis_names={names})
    x = inputs()
    placed = put(mesh, (BOTH,) * 3, x)
    # Auto axes are gathered inside: there the compiler does not say how they are split. Before JAX 0.11 explicit
    # axes that are left become such ones.
    gathered = kind == "Auto" or jax.__version_info__ < (0, 11)
    check_function(f, placed, x, collectives=gathered, reference=attend)


@pytest.mark.parametrize("kinds", [("Auto", "Explicit"), ("Explicit", "Auto")])
def test_axes_of_two_types(kinds):
    """Attention is split over the explicit axis; over the other one it is gathered."""
    types = tuple(getattr(AxisType, kind) for kind in kinds)
    mesh = jax.make_mesh((2, 4), ("b", "h"), axis_types=types)
    x = inputs()
    check_function(attend, put(mesh, (BOTH,) * 3, x), x, collectives=True)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_checkpoint_on_a_mesh(kind):
    mesh = make_mesh(kind)
    policy = jax.checkpoint_policies.save_only_these_names(sage_jax.RESIDUALS)
    x = inputs()
    loss = lambda f: lambda *a: jnp.sum(jnp.sin(f(*a)))  # noqa: E731
    got = jax.jit(jax.grad(loss(jax.checkpoint(attend, policy=policy)), (0, 1, 2)))(
        *put(mesh, (BOTH,) * 3, x)
    )
    for a, b in zip(got, jax.grad(loss(attend), (0, 1, 2))(*x), strict=True):
        assert relative_l2(a, b) < 1e-5


def test_rank_three_on_an_explicit_mesh():
    mesh = make_mesh("Explicit")
    x = [a[0] for a in inputs()]
    placed = put(mesh, (P(None, "h"),) * 3, x)
    assert relative_l2(jax.jit(attend)(*placed), attend(*x)) < 1e-5
