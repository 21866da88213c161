"""Queries that a kernel quantizes itself come out as those that an operation of its own quantized: `pytest -m gpu`.

Bit for bit, but for Hopper's kernel with e4m3, which then interpolates half of its exponentials: it follows the specification
that does so, and is near the output of codes.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, make_inputs
from metrics import assert_same_bits
from test_gpu import (
    SOME_CASES,
    TRAIN8,
    assert_agree,
    attend_operands,
    bound_of,
    by_name,
    largest_unit,
    on_gpu,
    on_warpgroups,
    output_on_host,
)

import sage_jax
from sage_jax.quantization import QuantizedKV, QuantizedQ
from sage_jax.recipe import PRESETS

pytestmark = pytest.mark.gpu

OTHERS = (TRAIN8.replace(pv="bf16"), TRAIN8.replace(pv="f16"), PRESETS["sage2pp"])  # the last has no kernel that does so
TABLE = (
    *((case, TRAIN8, dtype) for case in CASES for dtype in ("bfloat16", "float16")),
    *((case, TRAIN8, "float32") for case in SOME_CASES),  # nor have queries of 32 bits
    *((case, recipe, "bfloat16") for case in SOME_CASES for recipe in OTHERS),
)
MANY = (  # several row blocks for each block of a kernel, of equal and of unequal length, and parts of row blocks
    Case("many", B=3, T=1000, S=500, N=36, K=12, H=128),
    Case("many_causal", B=2, T=1500, S=1500, N=40, K=40, H=64, right=0),
    Case("ragged_causal", B=3, T=777, S=901, N=32, K=8, H=72, right=0, lengths=True),
)


# One in fifteen of the interpolated exponentials comes out as another code: .022 rms of these, .016 of all probabilities.
INTERPOLATED = 0.025


def interpolates(case, recipe):
    return on_warpgroups(case, recipe) and recipe.pv == "e4m3" and case.dtype != "float32" and case.H % 16 == 0


def quantized(case, recipe, q, k, v, masks):
    kv = QuantizedKV(*on_gpu("quantize_kv", case, recipe, k, v, masks.bounds))
    return QuantizedQ(*on_gpu("quantize_q", case, recipe, q, kv.k_mean, masks.bounds)), kv


def both(case, recipe, q, k, v, masks):
    """out of queries as they are, and of their codes."""
    operands = attend_operands(*quantized(case, recipe, q, k, v, masks), masks)
    return on_gpu("attend_queries", case, recipe, q, *operands[3:])[0], on_gpu("attend", case, recipe, *operands)[0]


def assert_like_codes(ours, codes, case, recipe):
    if interpolates(case, recipe):
        assert_agree(ours, codes, INTERPOLATED, "out")
    else:
        assert_same_bits(ours, codes, "out")


@pytest.mark.parametrize("case, recipe, dtype", TABLE, ids=lambda x: getattr(x, "name", x))
def test_output_is_that_of_codes(case, recipe, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    q, k, v, _, _, masks = make_inputs(case)
    ours, codes = both(case, recipe, q, k, v, masks)
    if not interpolates(case, recipe):
        assert_same_bits(ours, codes, "out")
        return
    qq, kv = quantized(case, recipe, q, k, v, masks)
    expected = output_on_host(case, recipe, qq, kv, masks, interpolated=True)
    assert_agree(ours, expected, bound_of(recipe, dtype) + 20 * largest_unit(case, qq, kv), "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", MANY, ids=by_name)
def test_output_of_many_row_blocks_is_that_of_codes(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    q, k, v, _, _, masks = make_inputs(case)
    ours, codes = both(case, TRAIN8, q, k, v, masks)
    assert_like_codes(ours, codes, case, TRAIN8)
    assert_same_bits(both(case, TRAIN8, q, k, v, masks)[0], ours, "out of a second run")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 3e38, 1e-40])
def test_queries_that_are_special(value, dtype):
    """One that is not finite has no finite output; the others' outputs stay as they are."""
    case = Case("special", B=1, T=300, S=200, N=2, K=1, H=64, dtype=dtype)
    q, k, v, _, _, masks = make_inputs(case)
    plain, _ = both(case, TRAIN8, q, k, v, masks)
    token = q[0, 77, 1] * 0 if value == 0.0 else q[0, 77, 1].at[5].set(value)
    q = q.at[0, 77, 1].set(token)
    ours, codes = both(case, TRAIN8, q, k, v, masks)
    assert_like_codes(ours, codes, case, TRAIN8)
    assert np.isfinite(np.float32(ours[0, 77, 1])).all() == bool(jnp.isfinite(token).all())
    others = np.ones(ours.shape, bool)
    others[0, 77, 1] = False
    assert_same_bits(ours[others], plain[others], "out of other queries")


def test_a_call_without_the_lse_has_the_output_of_one_with_it():
    case = Case("call", B=2, T=700, S=700, N=4, K=2, H=64, dtype="bfloat16")
    q, k, v, *_ = make_inputs(case)
    for options in ({"is_causal": True}, {"query_seq_lengths": [3, 500], "key_value_seq_lengths": [700, 1]}):
        out, _ = sage_jax.dot_product_attention(q, k, v, return_residual=True, **options)
        assert_like_codes(sage_jax.dot_product_attention(q, k, v, **options), out, case, TRAIN8)
