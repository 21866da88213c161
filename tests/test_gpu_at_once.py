"""All three gradients in one walk over the scores, dQ added up in memory in 16 bits and any order: what Hopper's kernels do
for inputs of 16 bits and head dimensions 64 and 128 unless `deterministic` is asked for. Other GPUs run the same tests on
the kernels that they have. `pytest -m gpu` on a GPU machine.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs
from metrics import assert_same_bits, relative_l2
from test_gpu import (
    TRAIN8,
    assert_agree,
    backward_operands,
    by_name,
    forward_on_host,
    gradient_bound,
    gradients_on_gpu,
    host,
    on_gpu,
    on_host,
)

from sage_jax import accuracy, dot_product_attention
from sage_jax.recipe import resolve

pytestmark = pytest.mark.gpu

EXACT_DELTA = resolve("train8:delta=exact")
LONG_MASK = dict(B=2, lengths=True, empty_rows=True)
CASES = [
    Case("causal_gqa", T=1300, S=1300, N=6, K=2, right=0),
    Case("gqa", T=1000, S=1500, N=6, K=2),
    Case("short", T=1, S=70),
    Case("one_tile", T=64, S=128),
    Case("three_tiles", T=130, S=500, N=3, K=1),
    Case("window", T=900, S=900, left=100, right=30),
    Case("bottom_right", T=200, S=900, right=0, bottom_right=True, **LONG_MASK),
    Case("tall", T=900, S=200, right=0, bottom_right=True, **LONG_MASK),
    Case("segments", T=700, S=700, right=0, segments=True),
    Case("mask", T=300, S=400, N=4, K=2, mask=(1, 1, 1, 1), empty_rows=True),
    # more blocks of keys than two turns of a GPU: dQ of most heads is cleared while that of others is added up
    Case("many_heads", B=2, T=390, S=400, N=80, K=80),
    Case("many_heads_causal", B=3, T=700, S=700, N=48, K=24, right=0),
    Case("many_heads_tall", B=4, T=1000, S=130, N=80, K=80),
    Case("everything", T=390, S=370, N=4, K=2, segments=True, mask=(1, 0, 1, 1), left=90, right=0, **LONG_MASK),
]
CASES = [
    dataclasses.replace(case, H=head_dim, dtype=dtype, name=f"{case.name}_{head_dim}")
    for case in CASES
    for head_dim, dtype in ((64, "float16"), (128, "bfloat16"))
]
# Two ways to add up the same codes, both rounded to bfloat16: half a unit in the last place each. Where softmax gives
# nearly all to one key the gradient is what is left of a difference.
ROUNDED = 6e-3
REPEATED = 5e-3  # two runs


@pytest.mark.parametrize("recipe", [TRAIN8, EXACT_DELTA], ids=by_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_follow_the_specification(case, recipe):
    """Which tests/test_cpu.py holds the CPU's kernels to; they need not be compiled for each size."""
    inputs = make_inputs(case)
    *_, dout, dlse, masks = inputs
    operands = backward_operands(*forward_on_host(case, recipe, inputs, "cpu"), dout, dlse, masks)
    expected = on_host("attend_backward", case, recipe, *operands, implementation="cpu")
    ours = on_gpu("attend_backward", case, recipe, *operands)
    for name, actual, one in zip(("dq", "dk", "dv"), ours[:3], expected[:3], strict=True):
        assert_agree(actual, one, gradient_bound(recipe, case.dtype), name)


def gradients(case, inputs, deterministic):
    """lse, dq, dk, dv"""
    results = gradients_on_gpu(case, TRAIN8, *inputs, deterministic=deterministic)
    return [np.asarray(x, np.float32) for x in results[1:]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ways_agree(case):
    inputs = make_inputs(case)
    q, k, v, dout, dlse, masks = inputs
    row = case.T // 2
    bad = dout.at[0, row, 1, 3].set(jnp.nan)  # one query's gradient, and those of the keys that it sees
    for given in (inputs, (q, k, v, bad, dlse, masks)):
        apart, at_once = (gradients(case, given, deterministic) for deterministic in (True, False))
        poisoned = np.zeros(q.shape, bool)
        poisoned[0, row, 1] = given is not inputs and np.isfinite(apart[0][0, 1, row])  # if it sees a key
        assert_same_bits(at_once[0], apart[0], "lse")
        for name, x, y in zip(("dq", "dk", "dv"), at_once[1:], apart[1:], strict=True):
            assert (np.isnan(x) == np.isnan(y)).all(), name
            assert name != "dq" or (np.isnan(x) == poisoned).all()
            x, y = np.nan_to_num(x), np.nan_to_num(y)
            assert np.linalg.norm(x - y) <= ROUNDED * np.linalg.norm(y) + 1e-6, name


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name.startswith(("causal_gqa", "gqa", "bottom_right", "tall", "many_heads_causal"))], ids=str
)
def test_runs_differ_in_the_rounding_of_dq_alone(case):
    inputs = make_inputs(case)
    first = gradients(case, inputs, False)
    for _ in range(4):
        _, dq, dk, dv = gradients(case, inputs, False)
        assert_same_bits(dk, first[2], "dk")
        assert_same_bits(dv, first[3], "dv")
        assert np.linalg.norm(dq - first[1]) <= REPEATED * np.linalg.norm(first[1])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", [200, 4096, 70000])
@pytest.mark.parametrize("cosine", [1.0, 0.25])
def test_sums_that_add_up_coherently_stay_finite(cosine, keys, head_dim):
    """All scores are zero, and no two terms of dQ cancel: dP − D has the sign of the key. With dO along the values all codes
    of G are 224, and those of z the largest that there are."""
    rng = np.random.default_rng(7)
    signs = rng.choice([-1.0, 1.0], (1, keys, 1, 1))
    u, w = rng.standard_normal((2, head_dim))
    w -= u * (w @ u) / (u @ u)
    along = cosine * u + np.sqrt(1 - cosine**2) * np.linalg.norm(u) / np.linalg.norm(w) * w
    k = jnp.asarray(4 * signs * np.ones((1, 1, 1, head_dim)), jnp.bfloat16)
    v, dout = jnp.asarray(signs * u, jnp.bfloat16), jnp.asarray(np.tile(along, (1, 70, 1, 1)), jnp.bfloat16)

    def dq(deterministic):
        attend = functools.partial(dot_product_attention, recipe="train8", deterministic=deterministic)
        pulled = jax.vjp(lambda q: attend(q, k, v), jnp.zeros_like(dout))[1](dout)
        return np.asarray(pulled[0], np.float32)

    at_once, apart = dq(False), dq(True)
    assert np.isfinite(at_once).all() and np.isfinite(apart).all() and apart.all()
    # All values are the same one, and all terms: what rounds, rounds the same way everywhere. bfloat16 2^-8 on either side;
    # the matrix unit, whose sums are cut off, .01; the n-th of n additions in 16 bits by 2^-12·n of a term, of all of them
    # together 2^-13·n·(1 + 1/4 + 1/16 + …).
    additions = keys / 128
    assert relative_l2(at_once, apart) < 2**-7 + 0.01 + 4 / 3 * additions / 2**13
    with host():
        exact = accuracy.exact(*map(np.asarray, (jnp.zeros_like(dout), k, v, dout)))["dq"]
    assert relative_l2(at_once, exact) < 0.08 + 4 / 3 * additions / 2**13
    assert relative_l2(apart, exact) < 0.08


@pytest.mark.parametrize("tensors", [("dq",), ("dk", "dv")], ids="-".join)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_sequences_do_not_wear_the_sums_out(head_dim, tensors):
    """dQ of 128 times as many keys is as accurate, and so are dK and dV of as many queries."""

    def errors(tokens):
        draw = jax.random.split(jax.random.key(5), 4)
        queries, keys = (256, tokens) if "dq" in tensors else (tokens, 256)
        shapes = [(1, n, 1, head_dim) for n in (queries, keys, keys, queries)]
        q, k, v, dout = (jax.random.normal(a, s).astype(jnp.bfloat16) for a, s in zip(draw, shapes, strict=True))
        found = accuracy.compare(q, k, v, dout=dout, recipes=["train8"], implementation="cuda").errors["train8"]
        return np.array([found[tensor].rel_l2 for tensor in tensors])

    assert (errors(65536) < 1.15 * errors(512)).all()
