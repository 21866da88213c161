"""A machine without a GPU lowers and exports the CUDA program; a CPU program survives
serialization.
"""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from metrics import relative_l2

import sage_jax
import sage_jax.flax
from sage_jax import _ffi, _workspace

attend = functools.partial(sage_jax.dot_product_attention, is_causal=True)
TARGETS = tuple(f"sage_jax_{name}" for name in _ffi.LAYOUTS if not name.endswith("_fp4"))
FORWARD = {"sage_jax_quantize_kv", "sage_jax_attend_queries"}
WITH_LSE = {f"sage_jax_{name}" for name in ("quantize_kv", "quantize_q", "attend")}
TRAINING = WITH_LSE | {"sage_jax_attend_backward"}
FP4 = tuple(f"sage_jax_{name}" for name in _ffi.LAYOUTS if name.endswith("_fp4"))
ALLOWED = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (*TARGETS, *FP4)]
B, T, S, N, K, H = 2, 24, 40, 4, 2, 16


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal(s), dtype)
        for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    ]


def loss(q, k, v, **kwargs):
    return jnp.sum(jnp.sin(attend(q, k, v, **kwargs)))


gradients = jax.grad(loss, (0, 1, 2))


def cuda_text(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def called(text):
    return set(re.findall(r"custom_call @(sage_jax_\w+)", text))


def test_cuda_program_calls_the_kernels():
    assert called(cuda_text(attend, *inputs())) == FORWARD
    assert called(cuda_text(functools.partial(attend, return_residual=True), *inputs())) == WITH_LSE
    assert called(cuda_text(functools.partial(attend, recipe="sage1"), *inputs())) == WITH_LSE  # a scale for 128 tokens
    assert called(cuda_text(gradients, *inputs())) == TRAINING
    assert called(cuda_text(functools.partial(attend, implementation="cuda"), *inputs())) == FORWARD
    reference = functools.partial(attend, implementation="reference")
    assert not called(cuda_text(reference, *inputs()))


def test_cuda_calls_have_the_operands_and_attributes_of_the_contract():
    text = cuda_text(gradients, *inputs(jnp.bfloat16))
    names = [f"sage_jax_{name}" for name in ("quantize_kv", "attend", "attend_backward")]
    quantize, forward, backward = (next(x for x in text.splitlines() if f"@{name}(" in x) for name in names)
    assert "dp = 1 : i32" in quantize and "v_range = 3.500000e+00 : f32" in quantize
    assert "smooth_k = 1 : i32" in quantize and "smooth_v = 1 : i32" in quantize
    channels = "tensor<2x2x64xf32>"  # means of K and V, scale of V, largest |K̂|
    counts = [line.count(channels) for line in (quantize, forward, backward)]
    assert counts == [4, 2, 3]
    assert quantize.count("tensor<2x2xf32>") == backward.count("tensor<2x2xf32>") == 1  # v_norm
    assert "window_right = 0 : i64" in forward and "f16_accumulate = 0 : i32" in forward
    scale = float(re.search(r"scale = ([\d.e+-]+) : f32", backward).group(1))
    assert scale == pytest.approx(H**-0.5)
    assert "tensor<2x4x24x64xi8>" in forward and "tensor<2x24x4x16xbf16>" in forward
    size = _workspace.attend_backward_bytes(
        B, T, S, N, K, 64, backward=0, dp=1, mask_shape=(0, 0, 0, 0), segments=False
    )
    assert backward.rstrip().endswith(f"tensor<{size}xui8>)")


def test_the_call_that_quantizes_queries_has_the_operands_of_the_contract():
    text = cuda_text(attend, *inputs(jnp.bfloat16))
    line = next(x for x in text.splitlines() if "@sage_jax_attend_queries(" in x)
    operands, results = line.rsplit("->", 1)
    assert operands.count("tensor<2x24x4x16xbf16>") == 1 and "tensor<2x2x40x64xi8>" in operands
    assert "pv = 0 : i32" in operands and "window_right = 0 : i64" in operands and "q_block" not in operands
    size = _workspace.attend_queries_bytes(
        B, T, S, N, K, 64, pv=0, f16_accumulate=False, mask_shape=(0, 0, 0, 0), segments=False
    )
    assert results.strip() == f"(tensor<2x24x4x16xbf16>, tensor<{size}xui8>)"


@pytest.mark.parametrize("f", [attend, gradients], ids=["forward", "gradients"])
def test_export_to_cuda(f):
    types = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in inputs()]
    exported = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=ALLOWED)(*types)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert called(str(again.mlir_module())) == (FORWARD if f is attend else TRAINING)
    with pytest.raises(ValueError, match="platform"):
        again.call(*inputs(jnp.bfloat16))  # this machine is not what it was exported for


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda"]], ids=["cpu", "cpu_and_cuda"])
def test_round_trip_runs_here(platforms):
    x = inputs()
    exported = jax.export.export(jax.jit(gradients), platforms=platforms, disabled_checks=ALLOWED)(
        *x
    )
    again = jax.export.deserialize(exported.serialize())
    for got, want in zip(again.call(*x), gradients(*x), strict=True):
        assert relative_l2(got, want) < 1e-6


SAGE3 = sage_jax.recipes["sage3"]
fp4_gradients = functools.partial(gradients, recipe=SAGE3.replace(backward="train8"))


def test_fp4_calls_have_the_operands_and_attributes_of_the_contract():
    text = cuda_text(functools.partial(attend, recipe="sage3"), *inputs(jnp.bfloat16))
    assert called(text) == set(FP4)
    lines = {name: next(x for x in text.splitlines() if f"@{name}(" in x) for name in FP4}
    quantize_kv, quantize_q, forward = (lines[name] for name in FP4)
    assert all(f"{flag} = 1 : i32" in quantize_kv for flag in ("four_or_six", "smooth_k", "smooth_v"))
    assert all(f"{flag} = 1 : i32" in quantize_q for flag in ("four_or_six", "smooth_q"))
    codes, delta = "tensor<2x2x40x32xui8>", "tensor<2x4x1x40xf32>"  # of K; ΔS
    assert codes in quantize_kv and codes in forward and delta in quantize_q and delta in forward
    assert "window_right = 0 : i64" in forward and "tensor<2x24x4x16xbf16>" in forward
    for name, line in lines.items():
        masking = dict(mask_shape=(0, 0, 0, 0), segments=False)
        size = _workspace.fp4_bytes(name.removeprefix("sage_jax_"), B, T, S, N, K, 64, masking)
        assert line.rstrip().endswith(f"tensor<{size}xui8>)")


@pytest.mark.parametrize("f", [functools.partial(attend, recipe="sage3"), fp4_gradients], ids=["forward", "gradients"])
def test_fp4_survives_export(f):
    x = inputs()
    exported = jax.export.export(jax.jit(f), platforms=["cpu", "cuda"], disabled_checks=ALLOWED)(*x)
    again = jax.export.deserialize(exported.serialize())
    assert called(str(again.mlir_module())) == set(FP4) | (TRAINING if f is fp4_gradients else set())
    for got, want in zip(jax.tree.leaves(again.call(*x)), jax.tree.leaves(f(*x)), strict=True):
        assert relative_l2(got, want) < 1e-6


def test_symbolic_batch():
    x = inputs()
    (b,) = jax.export.symbolic_shape("b")
    types = [jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype) for a in x]
    exported = jax.export.export(
        jax.jit(functools.partial(attend, implementation="reference")), disabled_checks=ALLOWED
    )(*types)
    assert relative_l2(exported.call(*x), attend(*x, implementation="reference")) < 1e-6


def test_symbolic_batch_of_the_platform_own_kernels():
    """For CUDA scratch memory is planned by sizes: there such a program says so."""
    x = inputs()
    (b,) = jax.export.symbolic_shape("b")
    types = [jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype) for a in x]
    exported = jax.export.export(jax.jit(attend), platforms=["cpu"], disabled_checks=ALLOWED)(*types)
    assert relative_l2(exported.call(*x), attend(*x)) < 1e-6


@pytest.mark.parametrize("asked", [True, False])
def test_a_wish_for_gradients_that_repeat_reaches_the_kernels(asked):
    by_flax = sage_jax.flax.attention_fn(deterministic_gradients=asked)
    calls = (
        functools.partial(gradients, deterministic=asked),
        jax.grad(lambda *x: jnp.sum(by_flax(*x)), (0, 1, 2)),
    )
    for call in calls:
        text = cuda_text(call, *inputs(jnp.bfloat16))
        backward = next(x for x in text.splitlines() if "@sage_jax_attend_backward(" in x)
        assert f"deterministic = {int(asked)} : i32" in backward


def test_bias_is_refused_where_a_cuda_program_is_made():
    bias = jnp.ones((T, S))
    with pytest.raises(
        ValueError, match="bias is not supported by implementation='cuda'.*boolean mask"
    ):
        cuda_text(functools.partial(attend, bias=bias), *inputs())
    with pytest.raises(ValueError, match="bias is not supported by implementation='cuda'"):
        cuda_text(jax.grad(functools.partial(loss, bias=bias)), *inputs())


def test_a_platform_without_kernels_gets_the_specification():
    text = jax.jit(attend).trace(*inputs()).lower(lowering_platforms=("tpu",)).as_text()
    assert not called(text) and "stablehlo.dot_general" in text


def test_an_implementation_is_never_replaced():
    f = functools.partial(attend, implementation="cuda")
    with pytest.raises(ValueError, match="implementation='cuda' was asked for"):
        jax.jit(f).trace(*inputs()).lower(lowering_platforms=("cpu",))
