"""Runs the specification end to end: quantize, attend, and the backward pass, for one case or one recipe."""

import functools

import jax
import jax.numpy as jnp

from sage_jax import reference
from sage_jax.masking import OPEN


def window(case):
    return dict(window_left=case.left, window_right=case.right)


@functools.partial(
    jax.jit, static_argnames=("recipe", "scale", "window_left", "window_right", "out_dtype")
)
def quantized_attention(
    q, k, v, masks, recipe, *, scale=None, window_left=OPEN, window_right=OPEN, out_dtype=None
):
    """(qq, kv, out, lse, m, l) of the specification."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kv = reference.quantize_kv(
        k, v, masks.bounds, pv=recipe.pv, v_range=recipe.v_range, smooth_k=recipe.smooth_k,
        smooth_v=recipe.smooth_v, dp=recipe.dp_format,
    )  # fmt: skip
    qq = reference.quantize_q(q, kv.k_mean, masks.bounds, q_block=recipe.q_block, scale=scale)
    result = reference.attend(
        qq, kv, masks, pv=recipe.pv, f16_accumulate=recipe.f16_accumulate, scale=scale,
        window_left=window_left, window_right=window_right, head_dim=q.shape[-1],
        out_dtype=out_dtype or q.dtype,
    )  # fmt: skip
    return qq, kv, *result


@functools.partial(
    jax.jit, static_argnames=("recipe", "scale", "window_left", "window_right", "with_dlogits")
)
def gradients(
    q, k, v, dout, dlse, masks, recipe, *, scale=None, window_left=OPEN, window_right=OPEN,
    with_dlogits=False,
):  # fmt: skip
    """(out, lse, dq, dk, dv, dlogits) of the specification, all float32 but for out's rounding to q's dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kw = dict(scale=scale, window_left=window_left, window_right=window_right)
    qq, kv, out, lse, m, l = quantized_attention(q, k, v, masks, recipe, **kw)
    grads = reference.attend_backward(
        qq, kv, m, l, out, dout, dlse, masks, backward=recipe.backward, dp=recipe.dp,
        exact_delta=recipe.delta == "exact", dtypes=(jnp.float32,) * 3, with_dlogits=with_dlogits,
        **kw,
    )  # fmt: skip
    return out, lse, *grads


@functools.partial(jax.jit, static_argnames=("window_left", "window_right"))
def exact_forward(q, k, v, masks, *, window_left=OPEN, window_right=OPEN):
    """(out, lse) of exact float32 attention."""
    window = dict(window_left=window_left, window_right=window_right)
    return reference.exact_attention(q, k, v, masks, scale=q.shape[-1] ** -0.5, **window)


@functools.partial(jax.jit, static_argnames=("scale", "window_left", "window_right"))
def exact_gradients(
    q, k, v, dout, dlse, masks, *, scale=None, window_left=OPEN, window_right=OPEN
):
    """(out, lse, dq, dk, dv, dbias) of exact float32 attention, by JAX's own differentiation."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    f32 = jnp.float32

    def f(q, k, v, bias):
        return reference.exact_attention(
            q, k, v, masks._replace(bias=bias), scale=scale, window_left=window_left,
            window_right=window_right,
        )  # fmt: skip

    (out, lse), vjp = jax.vjp(f, q.astype(f32), k.astype(f32), v.astype(f32), masks.bias)
    return out, lse, *vjp((dout.astype(f32), jnp.where(jnp.isfinite(lse), dlse, 0.0)))
