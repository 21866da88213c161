"""Attention with its reverse-mode derivative: the forward pass keeps the 8-bit tensors, not the
inputs.

Residuals are q8, k8 and V in the format of dO·Vᵀ with their scales, the means of K and V, the largest |K̂| of each channel
and the largest norm of V's rows, the row values m and l, the output, and the masks: about 64% of the bytes that a bf16 forward pass keeps. Each array
made here carries the checkpoint name `RESIDUALS`.

An FP4 recipe has a backward pass in 8 bits. It computes the probabilities again from INT8 scores, so
m, l and the output that it takes must be those of INT8 scores too: under differentiation the 8-bit
forward pass runs beside the FP4 one and leaves the residuals, and the FP4 one gives the value. The
gradients are then those of the 8-bit recipe, bit for bit, at the cotangents of the FP4 output.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sage_jax._ffi import Settings, operation
from sage_jax.masking import Masks
from sage_jax.quantization import QuantizedKV, QuantizedQ
from sage_jax.recipe import Recipe

RESIDUALS = "sage_jax_residuals"


def check_differentiable(recipe: Recipe):
    """Raises ValueError for a recipe without a backward pass."""
    if recipe.backward is None:
        raise ValueError(
            f"recipe {recipe.name!r} is for inference only and has no gradient; under jax.grad "
            f'use recipe="train8" (or leave '
            'recipe out), or add a backward pass with recipe.replace(backward="train8").'
        )


def quantize_kv(settings: Settings, k, v, bounds) -> QuantizedKV:
    return QuantizedKV(*operation("quantize_kv", settings)(k, v, bounds))


def quantize_q(settings: Settings, q, k_mean, bounds) -> QuantizedQ:
    return QuantizedQ(*operation("quantize_q", settings)(q, k_mean, bounds))


def attend_quantized(settings: Settings, qq: QuantizedQ, kv: QuantizedKV, masks: Masks):
    """out [B, T, N, H], lse, m, l [B, N, T]."""
    values = kv.k8, kv.k_scale, kv.v_pv, kv.v_scale, kv.v_mean
    return operation("attend", settings)(*qq, *values, *masks)


def attend_queries(settings: Settings, q, kv: QuantizedKV, masks: Masks):
    """out [B, T, N, H] of queries with a scale for each token: one operation quantizes them and attends."""
    values = kv.k8, kv.k_scale, kv.v_pv, kv.v_scale, kv.v_mean
    return operation("attend_queries", settings)(q, *values, *masks)[0]


def _forward(settings, q, k, v, masks):
    kv = quantize_kv(settings, k, v, masks.bounds)
    qq = quantize_q(settings, q, kv.k_mean, masks.bounds)
    return qq, kv, attend_quantized(settings, qq, kv, masks)


def attend_fp4(settings: Settings, q, k, v, masks: Masks):
    """out [B, T, N, H] and lse [B, N, T] of an FP4 recipe."""
    bounds = masks.bounds
    k4, k_scale, k_tensor, k_mean, *values = operation("quantize_kv_fp4", settings)(k, v, bounds)
    queries = operation("quantize_q_fp4", settings)(q, k, k_mean, k_tensor, bounds)
    return operation("attend_fp4", settings)(*queries, k4, k_scale, k_tensor, *values, *masks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(settings: Settings, q, k, v, masks: Masks):
    """out [B, T, N, H] in settings.dtype and lse float32 [B, N, T] of q [B, T, N, H] and
    k, v [B, S, K, H]; lse is None unless settings.lse.

    Masks that were not given are None here.
    """
    if settings.recipe.fp4:
        return _wanted(settings, *attend_fp4(settings, q, k, v, masks))
    if settings.recipe.q_block == 1 and not settings.lse:
        return attend_queries(settings, q, quantize_kv(settings, k, v, masks.bounds), masks), None
    return _wanted(settings, *_forward(settings, q, k, v, masks)[2][:2])


def _wanted(settings: Settings, out, lse):
    return out, lse if settings.lse else None


def _attention_fwd(settings, q, k, v, masks):
    check_differentiable(settings.recipe)
    qq, kv, (out, lse, m, l) = _forward(_for_backward(settings), q, k, v, masks)
    values = kv.v_dp, kv.v_dp_scale, kv.k_max, kv.v_norm, kv.v_mean
    kept = qq.q8, qq.q_scale, kv.k8, kv.k_scale, kv.k_mean, *values, m, l, out
    kept = jax.tree.map(lambda x: checkpoint_name(x, RESIDUALS), kept)
    if settings.recipe.fp4:
        out, lse = attend_fp4(settings, q, k, v, masks)
        results = checkpoint_name(out, RESIDUALS), checkpoint_name(lse, RESIDUALS)
    else:
        results = kept[-1], checkpoint_name(lse, RESIDUALS)
    return _wanted(settings, *results), (kept, masks)


def _for_backward(settings):
    """The settings of the 8-bit operations under differentiation."""
    return dataclasses.replace(settings, recipe=settings.recipe.eight_bit, for_backward=True)


def _attention_bwd(settings, residuals, cotangents):
    kept, masks = residuals
    dout, dlse = cotangents
    if dlse is None:
        dlse = jnp.zeros(kept[-2].shape, jnp.float32)
    settings = _for_backward(settings)
    dq, dk, dv, dlogits = operation("attend_backward", settings)(*kept, dout, dlse, *masks)
    dbias = None
    if masks.bias is not None:
        shape = masks.bias.shape
        broadcast = tuple(a for a in range(4) if shape[a] == 1 != dlogits.shape[a])
        dbias = jnp.sum(dlogits, axis=broadcast, keepdims=True)
    return dq, dk, dv, Masks(None, None, None, None, dbias)


attention.defvjp(_attention_fwd, _attention_bwd)
