"""Queries that a kernel quantizes itself come out as those that an operation of its own quantized: `pytest -m gpu`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, make_inputs
from metrics import assert_same_bits
from test_gpu import SOME_CASES, TRAIN8, attend_operands, by_name, on_gpu

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


def both(case, recipe, q, k, v, masks):
    """out of queries as they are, and of their codes."""
    kv = QuantizedKV(*on_gpu("quantize_kv", case, recipe, k, v, masks.bounds))
    qq = QuantizedQ(*on_gpu("quantize_q", case, recipe, q, kv.k_mean, masks.bounds))
    operands = attend_operands(qq, kv, masks)
    return on_gpu("attend_queries", case, recipe, q, *operands[3:])[0], on_gpu("attend", case, recipe, *operands)[0]


@pytest.mark.parametrize("case, recipe, dtype", TABLE, ids=lambda x: getattr(x, "name", x))
def test_output_is_that_of_codes(case, recipe, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    q, k, v, _, _, masks = make_inputs(case)
    assert_same_bits(*both(case, recipe, q, k, v, masks), "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", MANY, ids=by_name)
def test_output_of_many_row_blocks_is_that_of_codes(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    q, k, v, _, _, masks = make_inputs(case)
    ours, expected = both(case, TRAIN8, q, k, v, masks)
    assert_same_bits(ours, expected, "out")
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
    ours, expected = both(case, TRAIN8, q, k, v, masks)
    assert_same_bits(ours, expected, "out")
    assert np.isfinite(np.float32(ours[0, 77, 1])).all() == bool(jnp.isfinite(token).all())
    others = np.ones(ours.shape, bool)
    others[0, 77, 1] = False
    assert_same_bits(ours[others], plain[others], "out of other queries")


def test_a_call_without_the_lse_has_the_output_of_one_with_it():
    q, k, v, *_ = make_inputs(Case("call", B=2, T=700, S=700, N=4, K=2, H=64, dtype="bfloat16"))
    for options in ({"is_causal": True}, {"query_seq_lengths": [3, 500], "key_value_seq_lengths": [700, 1]}):
        out, _ = sage_jax.dot_product_attention(q, k, v, return_residual=True, **options)
        assert_same_bits(sage_jax.dot_product_attention(q, k, v, **options), out, "out")
