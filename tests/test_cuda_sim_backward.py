"""The CUDA backward kernels on the host simulator, against the specification.

The very `.cu` files that nvcc compiles run here with every thread as a fiber (`tests/cuda_sim`). Both sides take the same
quantized operands, so they differ by the order of float32 sums and, rarely, by one rounding step of an e4m3 code where
such a sum came out on the other side of a tie. One flipped code in a problem of a hundred rows is worth about 1e-3, a
wrong rule 1e-2: hence the bound.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, make_inputs
from cuda_sim import backward as sim
from cuda_sim import library
from metrics import assert_same_bits, relative_l2
from oracle import quantized_attention, window

from sage_jax import _workspace, reference
from sage_jax.masking import full_bounds, no_masks
from sage_jax.recipe import PRESETS, padded_head_dim

pytestmark = pytest.mark.skipif(not shutil.which(library.compiler() or ""), reason="no C++ compiler")
BOUND = 2e-3  # a code of G that rounds the other way is 1.2e-3 of a sum over 70 queries
ARCHITECTURES = (80, 89, 90)  # e4m3 by bit operations, by the matrix unit, by conversion to f16
TRAIN8 = PRESETS["train8"]
RECIPES = (
    TRAIN8,
    TRAIN8.replace(dp="bf16"),
    TRAIN8.replace(delta="exact"),
    PRESETS["sagebwd"],
)
BY_NAME = {case.name: case for case in CASES}


def operands(case, recipe, inputs):
    """(arguments, keywords) of `attend_backward` for a case."""
    q, k, v, dout, dlse, masks = inputs
    kw = dict(scale=case.H**-0.5, **window(case))
    qq, kv, out, _, m, l = quantized_attention(q, k, v, masks, recipe, **kw)
    kw |= dict(backward=recipe.backward, dp=recipe.dp, exact_delta=recipe.delta == "exact")
    return (qq, kv, m, l, out, dout, dlse, masks), kw


def run(case, recipe, inputs, *, architecture=80, schedule=0, dtype=np.float32):
    args, kw = operands(case, recipe, inputs)
    sim.settings(architecture=architecture, schedule=schedule)
    return sim.attend_backward(*args, **kw, dtypes=(dtype,) * 3)


def check(case, recipe, architecture):
    inputs = make_inputs(case)
    args, kw = operands(case, recipe, inputs)
    specified = jax.jit(functools.partial(reference.attend_backward, **kw, dtypes=(jnp.float32,) * 3))
    expected = specified(*args)[:3]
    sim.settings(architecture=architecture)
    actual, workspace = sim.attend_backward(*args, **kw, dtypes=(np.float32,) * 3)
    for name, x, y in zip(("dq", "dk", "dv"), actual, expected):
        y = np.asarray(y)
        assert np.array_equal(x[y == 0], y[y == 0]) or relative_l2(x, y) < BOUND, name
        if np.abs(y).max() > 1e-6:  # where one key gets all the weight, gradients are rounding noise
            assert relative_l2(x, y) < BOUND, name
    planned = _workspace.attend_backward_bytes(
        case.B, case.T, case.S, case.N, case.K, padded_head_dim(case.H),
        backward=recipe.backward_code, dp=recipe.dp_code, mask_shape=inputs[-1].mask.shape,
        segments=case.segments,
    )  # fmt: skip
    assert workspace <= planned < workspace + 3 * 256  # rows of mask summaries are rounded up


@pytest.mark.parametrize("number, case", list(enumerate(CASES)), ids=str)
def test_every_mask_and_shape(number, case):
    check(case, RECIPES[number % len(RECIPES)], ARCHITECTURES[number % len(ARCHITECTURES)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_kernel(recipe, head_dim, architecture):
    if recipe.backward == "sagebwd" and architecture != 80:
        pytest.skip("sagebwd has one kernel for all architectures")
    check(Case("kernel", B=1, T=70, S=130, N=2, K=1, H=head_dim, right=50), recipe, architecture)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_results_do_not_depend_on_the_order_of_threads(recipe):
    case = Case("order", B=1, T=130, S=100, N=2, K=1, right=0)
    inputs = make_inputs(case)
    first, _ = run(case, recipe, inputs, schedule=0)
    for schedule in (1, 7):
        again, _ = run(case, recipe, inputs, schedule=schedule)
        for name, x, y in zip(("dq", "dk", "dv"), again, first):
            assert_same_bits(x, y, name)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_gradient_dtypes(dtype):
    case = Case("dtypes", B=1, T=70, S=70, H=33, N=2, K=1, dtype=dtype)
    inputs = make_inputs(case)
    wide, _ = run(case, TRAIN8, inputs)
    narrow, _ = run(case, TRAIN8, inputs, dtype=jnp.dtype(dtype))
    for name, x, y in zip(("dq", "dk", "dv"), narrow, wide):
        assert_same_bits(x, np.asarray(jnp.asarray(y).astype(dtype)), name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("poison", ("query", "key", "dout"))
def test_a_bad_token_poisons_what_sees_it_and_nothing_else(poison, architecture):
    case = Case("poison", B=1, T=140, S=140, N=1, K=1, left=4, right=0)
    q, k, v, dout, dlse, masks = make_inputs(case)
    token, channel = 67, 5
    if poison == "query":
        q = q.at[0, token, 0, channel].set(np.nan)
    elif poison == "key":
        k = k.at[0, token, 0, channel].set(np.inf)
    else:
        dout = dout.at[0, token, 0, channel].set(np.nan)
    (dq, dk, dv), _ = run(case, TRAIN8, (q, k, v, dout, dlse, masks), architecture=architecture)
    rows = np.arange(140)
    # The query itself, or the five queries that see the key; the keys that those queries see.
    bad_rows = (rows >= token) & (rows <= token + (4 if poison == "key" else 0))
    bad_keys = (rows >= token - 4) & (rows <= token + (4 if poison == "key" else 0))
    if poison == "key":
        bad_keys &= rows != token  # dropped from every product: its own gradients are zero
        assert np.all(dk[0, token] == 0) and np.all(dv[0, token] == 0)
    assert np.array_equal(np.isnan(dq[0, :, 0]).all(axis=-1), bad_rows)
    assert np.array_equal(np.isnan(dq[0, :, 0]).any(axis=-1), bad_rows)
    for gradient in (dk, dv):
        assert np.array_equal(np.isnan(gradient[0, :, 0]).all(axis=-1), bad_keys)
        assert np.array_equal(np.isnan(gradient[0, :, 0]).any(axis=-1), bad_keys)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))  # four and two queries of a thread
def test_squares_of_tiny_and_huge_gradients_neither_vanish_nor_overflow(dtype):
    """dQ of a query depends on no other query's dO, and is proportional to it."""
    case = Case("extreme", B=1, T=70, S=70, N=2, K=1, dtype=dtype)
    q, k, v, dout, dlse, masks = make_inputs(case)
    dlse, powers = jnp.zeros_like(dlse), np.ones((1, case.T, 1, 1), np.float32)
    powers[0, [3, 19, 50], 0, 0] = 2.0**-80, 2.0**70, 2.0**-55
    plain, scaled = (
        run(case, TRAIN8, (q, k, v, (dout * x).astype(dtype), dlse, masks))[0][0] for x in (1, powers)
    )
    for token in range(case.T):
        ours, expected = (x.astype(np.float64)[0, token] for x in (scaled / powers, plain))
        assert relative_l2(ours, expected) < BOUND, token
    assert np.abs(plain[0, 3]).max() > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_gradients_of_huge_values_are_proportional_to_them(recipe):
    """D sums products of P and dO·Vᵀ: on the way, too, they must stay in float32's range."""
    case, power = Case("huge_values", B=1, T=70, S=140, N=2, K=1), 2.0**112
    q, k, v, dout, dlse, masks = make_inputs(case)
    dlse = jnp.zeros_like(dlse)
    plain, scaled = (run(case, recipe, (q, k, v * by, dout, dlse, masks))[0] for by in (1, power))
    for name, x, y, by in zip(("dq", "dk", "dv"), scaled, plain, (power, power, 1)):
        assert relative_l2(x.astype(np.float64) / by, y) < BOUND, name


def test_no_queries():
    T, S = 0, 70  # without keys the package launches nothing: sage_jax/_ffi.py
    case = Case("empty", B=1, T=T, S=S, N=1, K=1)
    q, k, v, dout, dlse, _ = make_inputs(BY_NAME["plain"])
    inputs = (
        q[:1, :T, :1], k[:1, :S, :1], v[:1, :S, :1], dout[:1, :T, :1], dlse[:1, :1, :T],
        no_masks(1, T, S)._replace(bounds=full_bounds(1, T, S)),
    )  # fmt: skip
    gradients, _ = run(case, TRAIN8, inputs)
    for gradient in gradients:
        assert np.all(gradient == 0)
