"""The CUDA handlers on two GPUs at once: split by jit over batch or heads, by shard_map and by pmap, and a training step
whose gradients are summed over them. `pytest -m gpu tests/test_gpu_devices.py` on a machine with two GPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from metrics import relative_l2
from test_gpu import by_name
from test_gpu_runtime import RECIPES, assert_all_same, both_ways, inputs, step
from test_sharding import COLLECTIVE

import sage_jax

pytestmark = pytest.mark.gpu

SPECS = {"batch": P("x"), "heads": P(None, None, "x")}
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=by_name)


@pytest.fixture(scope="module")
def gpus():
    found = jax.devices("cuda")[:2]
    if len(found) < 2:
        pytest.skip("needs two GPUs")
    return found


def make_mesh(gpus, kind="Auto"):
    return Mesh(np.array(gpus), ("x",), axis_types=(getattr(AxisType, kind),))


def on_one(gpu, recipe, arrays, **how):
    return jax.jit(step(recipe, **how))(*jax.device_put(arrays, gpu))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("split", SPECS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@each_recipe
def test_jit_splits_without_communication(gpus, recipe, head_dim, split, kind):
    arrays = inputs(tokens=700, head_dim=head_dim)
    expected = on_one(gpus[0], recipe, arrays)
    mesh = make_mesh(gpus, kind)
    placed = jax.device_put(arrays, NamedSharding(mesh, SPECS[split]))
    with jax.set_mesh(mesh):
        program = jax.jit(step(recipe)).lower(*placed).compile()
        got = program(*placed)
    assert not COLLECTIVE.findall(program.as_text())
    assert all(len(x.sharding.device_set) == 2 for x in got)
    assert_all_same(got, expected)


@both_ways
def test_many_steps_on_both_at_once(gpus, recipe, deterministic):
    """Rows enough that every multiprocessor has several, and calls that overlap: neither GPU takes the other's counters."""
    arrays = inputs(batch=4, tokens=2000, heads=16, kv_heads=8, head_dim=128)
    halves = [[x[:2] for x in arrays], [x[2:] for x in arrays]]
    how = dict(deterministic=deterministic)
    expected = [on_one(gpu, recipe, half, **how) for gpu, half in zip(gpus, halves, strict=True)]
    sharding = NamedSharding(make_mesh(gpus), SPECS["batch"])
    run, placed = jax.jit(step(recipe, **how)), jax.device_put(arrays, sharding)
    whole = [np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*expected, strict=True)]
    for got in [run(*placed) for _ in range(5)]:
        assert_all_same(got, whole, deterministic)


@each_recipe
def test_shard_map_and_pmap(gpus, recipe):
    arrays = inputs(head_dim=128)
    expected = on_one(gpus[0], recipe, arrays)
    mesh = make_mesh(gpus)
    heads = SPECS["heads"]
    mapped = jax.shard_map(step(recipe), mesh=mesh, in_specs=(heads,) * 4, out_specs=(heads,) * 5)
    assert_all_same(jax.jit(mapped)(*jax.device_put(arrays, NamedSharding(mesh, P()))), expected)
    parallel = jax.pmap(step(recipe), devices=gpus)(*[x.reshape(2, 1, *x.shape[1:]) for x in arrays])
    assert_all_same([x.reshape(2, *x.shape[2:]) for x in parallel], expected)


@pytest.mark.parametrize("recipe", ["train8", "train8:delta=exact"])
def test_a_training_step_sums_its_gradients_over_both(gpus, recipe):
    """Data parallel: weights on both, rows of the batch split; and the same step on one."""
    width, heads = 256, 2
    keys = jax.random.split(jax.random.key(3), 5)
    x = jax.random.normal(keys[0], (4, 500, width), jnp.bfloat16)
    weights = {
        name: jax.random.normal(key, (width, heads, 128), jnp.bfloat16) * width**-0.5
        for name, key in zip("qkvo", keys[1:], strict=True)
    }

    def loss(weights, x):
        q, k, v = (jnp.einsum("btc,cnh->btnh", x, weights[name]) for name in "qkv")
        attend = functools.partial(sage_jax.dot_product_attention, is_causal=True, recipe=recipe, deterministic=True)
        out = jnp.einsum("btnh,cnh->btc", attend(q, k, v), weights["o"])
        return jnp.mean(jnp.square((out - x).astype(jnp.float32)))

    run = jax.jit(jax.value_and_grad(loss))
    mesh = make_mesh(gpus)
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))
    value, grads = run(jax.device_put(weights, whole), jax.device_put(x, rows))
    one, expected = run(*jax.device_put((weights, x), gpus[0]))
    assert relative_l2(value, one) < 1e-3
    for name, grad in grads.items():
        assert np.asarray(grad, np.float32).any() and grad.sharding.is_fully_replicated
        # bfloat16 rounds the two halves' gradients before they are added, and their sum
        assert relative_l2(grad.astype(jnp.float32), expected[name].astype(jnp.float32)) < 1e-2, name
