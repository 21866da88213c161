"""`attend_queries`, the operation that quantizes queries and attends: its output is that of the two that do so in turn."""

import types

import jax
import numpy as np
import pytest
from cases import BIAS_CASES, CASES, make_inputs
from metrics import assert_same_bits
from test_gpu import TRAIN8, attend_operands, by_name, present, settings_of

import sage_jax
from sage_jax import _ffi
from sage_jax._ffi import operation
from sage_jax.quantization import QuantizedKV, QuantizedQ
from sage_jax.recipe import PRESETS


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("case", (*CASES[:8], *CASES[-3:], *BIAS_CASES), ids=by_name)
def test_output_is_that_of_codes(case, implementation):
    q, k, v, _, _, masks = make_inputs(case)
    run = lambda name, *operands: operation(name, settings_of(case, TRAIN8, implementation))(*present(operands))  # noqa: E731
    kv = QuantizedKV(*run("quantize_kv", k, v, masks.bounds))
    operands = attend_operands(QuantizedQ(*run("quantize_q", q, kv.k_mean, masks.bounds)), kv, masks)
    (out,) = run("attend_queries", q, *operands[3:])
    assert_same_bits(out, run("attend", *operands)[0], "out")


@pytest.mark.parametrize("recipe", ["train8", "sage1", "sage3"])
def test_the_lse_changes_nothing_else(recipe):
    q, k, v, *_ = make_inputs(CASES[1])

    def call(*operands, **options):
        return sage_jax.dot_product_attention(*operands, recipe=recipe, is_causal=True, **options)

    out, lse = call(q, k, v, return_residual=True)
    assert lse.shape == out.shape[:3]
    assert_same_bits(call(q, k, v), out, "out")
    if PRESETS[recipe].backward is not None:
        with_lse = jax.grad(lambda *x: call(*x, return_residual=True)[0].sum(), (0, 1, 2))(q, k, v)
        for ours, expected in zip(jax.grad(lambda *x: call(*x).sum(), (0, 1, 2))(q, k, v), with_lse, strict=True):
            assert_same_bits(ours, expected, "gradient")


def test_no_queries_and_no_keys():
    q, k, v, *_ = make_inputs(CASES[0])
    assert sage_jax.dot_product_attention(q[:, :0], k, v).shape == (2, 0, 2, 64)
    assert not np.asarray(sage_jax.dot_product_attention(q, k[:, :0], v[:, :0])).any()


def test_explain_names_the_operations_on_a_gpu(monkeypatch):
    built = types.SimpleNamespace(built_architectures=lambda: ["90a"])
    monkeypatch.setattr(_ffi, "load", lambda implementation: built)
    q, k, v, *_ = make_inputs(CASES[0])

    def named(**options):
        names = sage_jax.explain(q, k, v, platform="cuda", **options).kernels
        return [name.removeprefix("sage_jax_") for name in names]

    forward, training = ["quantize_kv", "attend_queries"], ["quantize_q", "attend", "attend_backward"]
    assert named(recipe="sage2") == forward
    assert named(recipe="sage2", return_residual=True) == ["quantize_kv", "quantize_q", "attend"]
    assert named(recipe="sage1") == ["quantize_kv", "quantize_q", "attend"]
    assert named(recipe="train8") == forward + training
    assert named(recipe="train8", return_residual=True) == ["quantize_kv"] + training
