"""The FP4 kernels on a GPU against the specification, which runs on the host: codes in every bit, attention within
rounding. Where the GPU has no FP4 products the kernels emulate them, bit for bit but for the order of summation.
"""

import functools

import jax
import numpy as np
import pytest
from cases import CASES
from fp4_problems import SEEDS, random_problem
from metrics import assert_same_bits, relative_l2
from test_cpu_fp4 import RECIPES, SAGE3, compare, problem, run
from test_nvfp4 import TABLE, table_problem

import sage_jax

pytestmark = pytest.mark.gpu

PUBLISHED = RECIPES[1]
by_name = {case.name: case for case in CASES}


@functools.lru_cache(maxsize=None)
def expected(case, recipe, bad):
    """Operands and results of the specification, as NumPy arrays."""
    with jax.default_device(jax.devices("cpu")[0]):
        given = problem(case, bad)
        return jax.tree.map(np.asarray, (given, run(case, recipe, "reference", *given)))


def check(case, recipe, bad=False):
    given, wanted = expected(case, recipe, bad)
    compare(run(case, recipe, "cuda", *given, quantized=wanted[:2]), wanted, out_bound=5e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case):
    check(case, SAGE3)


@pytest.mark.parametrize("recipe", RECIPES[1:], ids=lambda r: r.name)
@pytest.mark.parametrize("name", ["everything", "gqa"])
def test_recipes(name, recipe):
    check(by_name[name], recipe)


@pytest.mark.parametrize("name", ["gqa", "segments", "bf16"])
def test_bad_tokens(name):
    check(by_name[name], SAGE3, bad=True)


def test_repeated_runs_agree_in_every_bit():
    given, wanted = expected(by_name["everything"], SAGE3, False)
    runs = [run(by_name["everything"], SAGE3, "cuda", *given) for _ in range(3)]
    for other in runs[1:]:
        for x, y in zip(jax.tree.leaves(runs[0]), jax.tree.leaves(other), strict=True):
            assert_same_bits(x, y)


@pytest.mark.parametrize("kind", TABLE)
def test_accuracy_table_of_the_public_function(kind):
    """Relative L2 error of O, head dimension 128, 2048 tokens (docs/nvfp4.md, "Accuracy")."""
    with jax.default_device(jax.devices("cpu")[0]):
        q, k, v, _, exact = jax.device_get(table_problem(kind))
    errors = {}
    for recipe in (SAGE3, PUBLISHED):
        attend = functools.partial(sage_jax.dot_product_attention, recipe=recipe, implementation="cuda")
        errors[recipe.name] = relative_l2(np.asarray(jax.jit(attend)(q, k, v)), exact)
    published, ours = TABLE[kind]
    assert errors[PUBLISHED.name] == pytest.approx(published, rel=0.02)
    assert errors[SAGE3.name] <= ours


@pytest.mark.parametrize("seed", SEEDS)
def test_no_further_from_exact_attention_than_the_specification(seed):
    with jax.default_device(jax.devices("cpu")[0]):
        case, q, k, v, masks, exact = random_problem(seed)
        wanted = np.asarray(run(case, SAGE3, "reference", q, k, v, masks)[2][0])
        given = jax.tree.map(np.asarray, (q, k, v, masks))
    got = np.asarray(run(case, SAGE3, "cuda", *given)[2][0])
    assert relative_l2(got, exact) <= 1.02 * relative_l2(wanted, exact) + 1e-6


def test_gradients_and_the_kernels_named():
    q, k, v = (np.random.default_rng(n).standard_normal((1, 200, 2, 64), np.float32) for n in range(3))
    recipe = SAGE3.replace(backward="train8")
    loss = lambda *x: sage_jax.dot_product_attention(*x, recipe=recipe, is_causal=True).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() and np.any(g) for g in gradients)
    explained = sage_jax.explain(q, k, v, recipe="sage3")
    assert (explained.platform, explained.backend) == ("cuda", "cuda")
    assert explained.kernels == tuple(
        f"sage_jax_{name}" for name in ("quantize_kv_fp4", "quantize_q_fp4", "attend_fp4")
    )
