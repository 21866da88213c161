"""The CUDA handlers in a program: repeated, replayed, on dirty memory, exported, refused.

Run with `pytest -m gpu` on a GPU machine.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metrics import assert_same_bits, relative_l2

import sage_jax
from sage_jax import _ffi
from sage_jax.recipe import PRESETS, Recipe

pytestmark = pytest.mark.gpu

RECIPES = [PRESETS["train8"], PRESETS["sagebwd"], PRESETS["train8"].replace(delta="exact")]
# and whether gradients have to repeat bit for bit; else dq may not
WAYS = [(recipe, True) for recipe in RECIPES] + [(RECIPES[0], False), (RECIPES[2], False)]
TENSORS = ("out", "lse", "dq", "dk", "dv")


def inputs(seed=0, batch=2, tokens=333, heads=4, kv_heads=2, head_dim=64, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(batch, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def step(recipe, deterministic=True):
    """(q, k, v, dout) -> out, lse, dq, dk, dv on the CUDA kernels."""

    def run(q, k, v, dout):
        def attend(q, k, v):
            return sage_jax.dot_product_attention(
                q, k, v, is_causal=True, recipe=recipe, implementation="cuda", return_residual=True,
                deterministic=deterministic,
            )  # fmt: skip

        (out, lse), pull = jax.vjp(attend, q, k, v)
        return out, lse, *pull((dout, jnp.cos(lse)))

    return run


def assert_all_same(actual, expected, deterministic=True):
    for name, x, y in zip(TENSORS, jax.device_get(actual), jax.device_get(expected), strict=True):
        if name == "dq" and not deterministic:  # sums of 16 bits in any order, then rounded to bfloat16
            assert relative_l2(np.asarray(x, np.float32), np.asarray(y, np.float32)) < 6e-3
        else:
            assert_same_bits(x, y, name)


both_ways = pytest.mark.parametrize(
    "recipe, deterministic",
    WAYS,
    ids=lambda x: x.name if isinstance(x, Recipe) else "deterministic" if x else "any order",
)


@both_ways
def test_repeated_runs_agree(recipe, deterministic):
    run, data = jax.jit(step(recipe, deterministic)), inputs(tokens=1500)
    first = jax.device_get(run(*data))
    for _ in range(5):
        assert_all_same(run(*data), first, deterministic)


@both_ways
def test_eager_and_compiled_calls_agree_for_changing_inputs(recipe, deterministic):
    eager, compiled = step(recipe, deterministic), jax.jit(step(recipe, deterministic))
    for seed in range(4):
        data = inputs(seed)
        assert_all_same(compiled(*data), eager(*data), deterministic)


@both_ways
def test_results_do_not_depend_on_what_memory_held(recipe, deterministic):
    """Outputs and workspaces come uninitialised; here they held NaNs (all bits set) before."""
    run, data = jax.jit(step(recipe, deterministic)), inputs()
    clean = jax.device_get(run(*data))
    for _ in range(3):
        dirt = [jnp.full((n,), -1, jnp.int32) for n in (2**k for k in range(10, 25))]
        jax.block_until_ready(dirt)
        for x in dirt:
            x.delete()
        assert_all_same(run(*data), clean, deterministic)


@both_ways
def test_results_written_into_donated_nan_buffers(recipe, deterministic):
    data = inputs()
    clean = jax.device_get(jax.jit(step(recipe, deterministic))(*data))
    nan = [jnp.full(x.shape, jnp.nan, x.dtype) for x in clean]
    into = jax.jit(lambda buffers, *data: step(recipe, deterministic)(*data), donate_argnums=0, keep_unused=True)
    results = into(nan, *data)
    assert all(x.is_deleted() for x in nan)  # every result took the place of a donated buffer
    assert_all_same(results, clean, deterministic)


@both_ways
def test_inputs_are_not_modified(recipe, deterministic):
    data = inputs()
    before = jax.device_get(data)
    jax.block_until_ready(jax.jit(step(recipe, deterministic))(*data))
    for x, y in zip(jax.device_get(data), before, strict=True):
        assert_same_bits(x, y)


def test_attention_inside_a_loop():
    """A compiled loop feeds each step with the results of the one before."""
    q, k, v, dout = inputs()
    run = step(PRESETS["train8"])

    def body(carry, _):
        out, _, dq, dk, dv = run(*carry, dout)
        return (out + dq, k + dk, v + dv), None

    looped, _ = jax.jit(lambda *x: jax.lax.scan(body, x, length=4))(q, k, v)
    carry = (q, k, v)
    for _ in range(4):
        carry, _ = jax.jit(body)(carry, None)
    for x, y in zip(jax.device_get(looped), jax.device_get(carry), strict=True):
        assert_same_bits(x, y)


# A process of its own, since XLA reads its flags once. It prints a digest of all results for each
# of several inputs, the first ones again at the end.
REPLAY = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import jax, numpy as np
from test_gpu_runtime import RECIPES, inputs, step
for recipe in RECIPES:
    run = jax.jit(lambda *x: step(recipe)(*step(recipe)(*x)[2:], x[3]))
    for seed in (0, 1, 2, 0, 3, 1, 0):
        results = jax.device_get(run(*inputs(seed, kv_heads=4)))
        digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in results))
        print(recipe.name, seed, digest.hexdigest())
run = jax.jit(step(RECIPES[0], deterministic=False))
for seed in (0, 1, 2, 0, 3, 1, 0):
    out, lse, _, dk, dv = run(*inputs(seed))
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in (out, lse, dk, dv)))
    print("any order", seed, digest.hexdigest())
"""


def test_replayed_command_buffers_follow_their_inputs():
    """The same digests whether XLA captures the calls in CUDA graphs or launches each."""

    def digests(kinds):
        flags = f"--xla_gpu_enable_command_buffer={kinds} --xla_gpu_graph_min_graph_size=1"
        env = {**os.environ, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda"}
        code = REPLAY.format(tests=os.path.dirname(os.path.abspath(__file__)))
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    captured = digests("FUSION,CUBLAS,CUSTOM_CALL")
    assert captured == digests("")
    by_input = {}
    for line in captured:
        recipe, seed, digest = line.rsplit(" ", 2)
        assert by_input.setdefault((recipe, seed), digest) == digest, "a replay kept old inputs"
    assert len(set(by_input.values())) == (len(RECIPES) + 1) * 4


def test_memory_is_linear_in_the_length():
    """Scratch memory of a training step at 16k tokens: far below one head's scores."""

    def scratch(tokens):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(tokens=64, head_dim=128)]
        shapes = [jax.ShapeDtypeStruct((1, tokens, *s.shape[2:]), s.dtype) for s in shapes]
        compiled = jax.jit(step(PRESETS["train8"])).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = scratch(8192), scratch(16384)
    assert long < 2.2 * short
    assert long < 16384 * 16384


def test_a_program_exported_for_cuda_runs():
    run, data = jax.jit(step(PRESETS["train8"])), inputs()
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(f"sage_jax_{name}") for name in _ffi.LAYOUTS
    ]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(*data)
    loaded = jax.export.deserialize(exported.serialize())
    assert_all_same(jax.jit(loaded.call)(*data), run(*data))


def test_programs_with_values_too_large_for_16_bit_sums_are_refused(monkeypatch):
    """Programs exported before `v_range` was 3.5 ask for 448."""
    monkeypatch.setattr(Recipe, "v_range", property(lambda self: 448.0))
    recipe = PRESETS["train8"].replace(name="too large")
    with pytest.raises(Exception, match="v_range is 448.*export the program again"):
        jax.block_until_ready(jax.jit(step(recipe))(*inputs(tokens=77)))


def test_bias_is_refused_before_anything_runs():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="bias is not supported by implementation='cuda'"):
        sage_jax.dot_product_attention(q, k, v, bias=jnp.zeros((333, 333)))


def test_arrays_on_the_host_are_refused_by_name():
    q, k, v, _ = (jax.device_put(x, jax.devices("cpu")[0]) for x in inputs())
    with pytest.raises(ValueError, match="implementation='cuda' was asked for"):
        sage_jax.dot_product_attention(q, k, v, implementation="cuda")


def test_the_default_implementation_is_cuda():
    q, k, v, _ = inputs()
    assert sage_jax.explain(q, k, v).backend == "cuda"
    default = sage_jax.dot_product_attention(q, k, v)
    asked = sage_jax.dot_product_attention(q, k, v, implementation="cuda", recipe="sage2")
    assert_same_bits(jax.device_get(default), jax.device_get(asked))


def test_the_build_has_this_gpu():
    """Code of one architecture runs on later ones of its major version."""
    built = _ffi.load("cuda").built_architectures()
    here = int(jax.devices()[0].compute_capability.replace(".", ""))
    numbers = [int(name.rstrip("af")) for name in built]
    assert any(n // 10 == here // 10 and n <= here for n in numbers), (built, here)
    assert np.all(np.array(numbers) >= 80)
