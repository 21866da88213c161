"""The attention functions that `attention.py` times: our recipes and their peers.

A contender takes bfloat16 q, k, v [B, T, N, H] and returns bfloat16 out [B, T, N, H]; whatever it
does to the operands in between (quantization, casts to FP8) belongs to its time. The exception is
one that says how its operands are prepared beforehand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import sage_jax
from sage_jax import _vjp
from sage_jax._ffi import Settings
from sage_jax.masking import OPEN, full_bounds
from sage_jax.recipe import Recipe

Array = jax.Array


class Contender(NamedTuple):
    """One implementation of attention.

    Attributes:
      impl, recipe: as in the results file; the recipe of a peer is None.
      call: (q, k, v, causal) -> out.
      quantize: (q, k, v) -> the quantized operands, where that is a step of its own.
      differentiable: whether the backward pass is timed as well.
      prepare: (q, k, v) -> the operands of `call`, which are made before the clock starts. Only the
        forward pass of such a contender is timed, and its accuracy is not measured.
      largest_scores: B·N·T·S beyond which it is left out, because it keeps them all in memory.
    """

    impl: str
    recipe: str | None
    call: Callable[[Array, Array, Array, bool], Array]
    quantize: Callable[[Array, Array, Array], object] | None = None
    differentiable: bool = True
    prepare: Callable[[Array, Array, Array], tuple[Array, Array, Array]] | None = None
    largest_scores: float = float("inf")

    @property
    def label(self) -> str:
        return self.impl if self.recipe is None else f"{self.impl} {self.recipe}"


def ours(recipe: Recipe, implementation: str | None) -> Contender:
    """A recipe of sage_jax. The implementation is explicit, so that nothing else is measured."""

    def call(q, k, v, causal):
        return sage_jax.dot_product_attention(
            q, k, v, is_causal=causal, recipe=recipe, implementation=implementation
        )

    def quantize(q, k, v):
        (batch, queries, _, head_dim), keys = q.shape, k.shape[1]
        trains = recipe.backward is not None
        settings = Settings(
            recipe, head_dim**-0.5, OPEN, OPEN, head_dim, q.dtype, implementation, trains
        )
        bounds = full_bounds(batch, queries, keys)
        kv = _vjp.quantize_kv(settings, k, v, bounds)
        return kv, _vjp.quantize_q(settings, q, kv.k_mean, bounds)

    return Contender("sage_jax", recipe.name, call, quantize, recipe.backward is not None)


def xla() -> Contender:
    def call(q, k, v, causal):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")

    return Contender("xla", None, call, largest_scores=2.0**31)


def cudnn_bf16() -> Contender:
    def call(q, k, v, causal):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    return Contender("cudnn_bf16", None, call)


def cudnn_fp8() -> Contender:
    """cuDNN's FP8 attention with unit scales.

    The casts of bfloat16 operands to e4m3 and of the results back are part of the call. It trains
    with head dimension 128 only; other calls raise, and the benchmark leaves them out.
    """
    attend = _cudnn_e4m3()

    def call(q, k, v, causal):
        return attend(*_to_e4m3(q, k, v), causal).astype(jnp.bfloat16)

    return Contender("cudnn_fp8", None, call)


def cudnn_fp8_ready() -> Contender:
    """The same without the casts: operands that are in e4m3 already, and a result that stays in it."""
    return Contender("cudnn_fp8_ready", None, _cudnn_e4m3(), differentiable=False, prepare=_to_e4m3)


def _cudnn_e4m3():
    """(q, k, v, causal) -> out, all in e4m3, through JAX's private entry."""
    private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    scales = {name: jnp.ones((1, 1, 1, 1), jnp.float32) for name in private.fp8_params_keys}
    mask = {False: private.MaskType.NO_MASK, True: private.MaskType.CAUSAL}

    def attend(q, k, v, causal):
        out, _, _ = private.dot_product_attention(
            q,
            k,
            v,
            fp8_params=scales,
            scale=q.shape[-1] ** -0.5,
            mask_type=mask[causal],
            use_fp8=True,
        )
        return out

    return attend


def _to_e4m3(*operands: Array) -> tuple[Array, ...]:
    return tuple(x.astype(jnp.float8_e4m3fn) for x in operands)


def fa3_bf16() -> Contender:
    """FlashAttention-3 from one of its JAX wheels, that with all head dimensions if possible."""
    for name in ("dew_flash_attn", "flash_attn3_jax"):
        try:
            module = importlib.import_module(name)
            break
        except ImportError:
            continue
    else:
        raise ImportError("neither dew_flash_attn nor flash_attn3_jax is installed")

    def call(q, k, v, causal):  # causal masks of the wheels are bottom-right: the same for T = S
        return module.flash_mha(q, k, v, is_causal=causal)

    return Contender("fa3_bf16", None, call)


PEERS = {
    "cudnn_bf16": cudnn_bf16,
    "cudnn_fp8": cudnn_fp8,
    "cudnn_fp8_ready": cudnn_fp8_ready,
    "fa3_bf16": fa3_bf16,
    "xla": xla,
}
