"""Block masks: an entry for each tile of 64 queries and 64 keys means what it means written out for every pair, bit for bit:
in the specification, in the CPU's handlers and in the CUDA kernels on the simulator.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_masks import CASES, with_block_mask
from cuda_sim import backward as sim_backward
from cuda_sim import fp4 as sim_fp4
from cuda_sim import library as sim
from metrics import assert_same_bits
from oracle import quantized_attention, window
from test_attention import BACKENDS
from test_cpu_fp4 import SAGE3
from test_cpu_fp4 import run as run_fp4
from test_cuda_sim_forward import RECIPES, arguments, quantize
from test_export import cuda_text

import sage_jax
from sage_jax import _workspace
from sage_jax.masking import TILE, Masks

simulated = pytest.mark.skipif(not shutil.which(sim.compiler() or ""), reason="no C++ compiler")
AXES = {"every": (1, 1, 1, 1), "of_heads": (0, 1, 1, 1), "one": (0, 0, 1, 1), "of_keys": (1, 0, 0, 1)}


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(
    "recipe, axes",
    [*(("train8", name) for name in AXES), ("sagebwd", "every"), ("sage3:backward=train8", "of_heads")],
)
def test_results_and_gradients_are_those_of_the_pairs(axes, recipe, implementation):
    case = CASES[0]
    (q, k, v, dout, _, masks), pairs = with_block_mask(case, AXES[axes])

    def run(**mask):
        attend = functools.partial(
            sage_jax.dot_product_attention, is_causal=True, recipe=recipe, implementation=implementation,
            return_residual=True, **mask,
        )  # fmt: skip
        results, pull = jax.vjp(attend, q, k, v)
        return *results, *pull((dout, jnp.ones_like(results[1])))

    for ours, expected in zip(run(block_mask=masks.mask), run(mask=pairs.mask), strict=True):
        assert_same_bits(ours, expected)


def test_mapped_and_jitted():
    (q, k, v, _, _, masks), _ = with_block_mask(CASES[0])
    attend = lambda q, k, v, mask: sage_jax.dot_product_attention(q, k, v, block_mask=mask)  # noqa: E731
    one = [attend(*(x[b : b + 1] for x in (q, k, v, masks.mask))) for b in range(2)]
    assert_same_bits(jax.jit(attend)(q, k, v, masks.mask), jnp.concatenate(one))
    mapped = jax.vmap(attend)(q, k, v, masks.mask)  # [T, N, H] each
    assert_same_bits(mapped, jnp.concatenate(one))
    shared = jax.vmap(attend, (0, 0, 0, None))(q, k, v, masks.mask[0])
    assert_same_bits(shared[0], one[0][0])


def test_tiles_that_nobody_sees_may_hold_anything():
    q, k, v = (jax.random.normal(jax.random.key(n), (1, 128, 1, 16)) for n in range(3))
    k, v = k.at[:, 64:].set(jnp.nan), v.at[:, 64:].set(jnp.inf)
    loss = lambda *x: jnp.sum(sage_jax.dot_product_attention(*x, block_mask=jnp.array([True, False])))  # noqa: E731
    for x in (loss(q, k, v), *jax.grad(loss, (0, 1, 2))(q, k, v)):
        assert jnp.isfinite(x).all()


def test_the_kernels_are_told_and_need_no_summary():
    q = jax.ShapeDtypeStruct((1, 200, 2, 16), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 2, 4, 4), jnp.bool_)
    loss = lambda q, mask: jnp.sum(sage_jax.dot_product_attention(q, q, q, block_mask=mask))  # noqa: E731
    text = cuda_text(jax.grad(loss), q, mask)
    for name in ("sage_jax_attend", "sage_jax_attend_backward"):
        call = next(x for x in text.splitlines() if f"@{name}(" in x)
        assert "mask_tile = 64 : i32" in call and "tensor<1x2x4x4xi1>" in call
    sizes = dict(pv=0, f16_accumulate=False, mask_shape=mask.shape, segments=False)
    assert _workspace.attend_bytes(1, 8, 8192, 2, 2, 64, **sizes, mask_tile=64) == 0
    assert _workspace.attend_bytes(1, 8, 8192, 2, 2, 64, **sizes) > 0


# ------------------------------------------------------------------------------------- the simulator


@simulated
@pytest.mark.parametrize("number, case", list(enumerate(CASES)), ids=str)
def test_the_forward_kernels(number, case):
    inputs, pairs = with_block_mask(case, list(AXES.values())[number % len(AXES)])
    recipe = RECIPES["bf16" if number % 3 == 2 else "sage2"]
    qq, kv = quantize(*inputs[:3], inputs[-1], recipe)
    kw = arguments(recipe, case, inputs[0].dtype)
    for architecture in (80, 90):
        sim.settings(architecture=architecture)
        ours = sim.attend(qq, kv, inputs[-1], **kw, mask_tile=TILE)
        for x, y in zip(ours, sim.attend(qq, kv, pairs, **kw), strict=True):
            assert_same_bits(x, y)
    sim.settings()


@simulated
@pytest.mark.parametrize("number, case", list(enumerate(CASES)), ids=str)
def test_the_backward_kernels(number, case):
    inputs, pairs = with_block_mask(case, list(AXES.values())[number % len(AXES)])
    q, k, v, dout, dlse, masks = inputs
    recipe = sage_jax.recipes["sagebwd" if number % 3 == 2 else "train8"]
    kw = dict(scale=case.H**-0.5, **window(case))
    qq, kv, out, _, m, l = quantized_attention(q, k, v, pairs, recipe, **kw)
    kw |= dict(backward=recipe.backward, dp=recipe.dp, exact_delta=number % 2 == 1, dtypes=(np.float32,) * 3)
    sim_backward.settings(architecture=80)
    ours, small = sim_backward.attend_backward(qq, kv, m, l, out, dout, dlse, masks, **kw, mask_tile=TILE)
    expected, large = sim_backward.attend_backward(qq, kv, m, l, out, dout, dlse, pairs, **kw)
    assert small < large
    for x, y in zip(ours, expected, strict=True):
        assert_same_bits(x, y)


@simulated
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_fp4_kernel(case):
    inputs, pairs = with_block_mask(case)
    sim_fp4.library()
    kw = dict(scale=case.H**-0.5, **window(case), head_dim=case.H, out_dtype=np.dtype(np.float32))
    qq, kv, _ = run_fp4(case, SAGE3, "reference", *inputs[:3], pairs)
    ours = sim_fp4.attend(qq, kv, inputs[-1], **kw, mask_tile=TILE)
    for x, y in zip(ours, sim_fp4.attend(qq, kv, pairs, **kw), strict=True):
        assert_same_bits(x, y)
    sim.settings()


def test_masks_of_pairs_have_no_tiles():
    masks = Masks(*(jnp.zeros((0,)) for _ in range(3)), jnp.ones((1, 1, 3, 3), bool), None)
    assert sage_jax.masking.of_pairs(masks, 1, 3, 3).mask is masks.mask
