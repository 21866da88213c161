"""Errors that must wait: code that may be traced and transposed, but raises one sentence when
compiled or run.

Tracing happens before the platform is known, and before it is known whether a tangent will be
transposed (reverse mode) or evaluated (forward mode). What cannot work on one platform, or in
forward mode, is therefore recorded in the program and raises when that part of the program is
lowered; where it is never lowered it costs nothing.
"""

from __future__ import annotations

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

NO_DERIVATIVE = (
    "sage_jax.dot_product_attention has first derivatives in reverse mode only: JAX can't apply "
    "forward-mode differentiation (jvp, jacfwd) or a second derivative to its 8-bit kernels; "
    "use jax.grad, "
    "jax.vjp or jax.jacrev once, or jax.nn.dot_product_attention in the part that needs the others."
)

_refuse_p = Primitive("sage_jax_refuse")
_refuse_p.multiple_results = True


def refuse(error: type[Exception], sentence: str, operands, results):
    """Values of the types `results` whose computation raises error(sentence) when it is lowered or
    run.
    """
    return tuple(_refuse_p.bind(*operands, error=error, sentence=sentence, results=tuple(results)))


@_refuse_p.def_abstract_eval
def _(*operands, error, sentence, results):
    del operands, error, sentence
    return results


@_refuse_p.def_impl
def _(*operands, error, sentence, results):
    del operands, results
    raise error(sentence)


def _lower(context, *operands, error, sentence, results):
    del context, operands, results
    raise error(sentence)


mlir.register_lowering(_refuse_p, _lower)


def _transpose(cotangents, *tangents, **_):
    """Only tangents are transposed, and for them the operation stands for the identity."""
    del tangents
    return cotangents


def _batch(operands, axes, *, error, sentence, results):
    """Only tangents are mapped over: what is never computed may keep its operands' batch axes."""
    results = tuple(jax.typeof(x) for x in operands)
    return _refuse_p.bind(*operands, error=error, sentence=sentence, results=results), axes


ad.primitive_transposes[_refuse_p] = _transpose
batching.primitive_batchers[_refuse_p] = _batch


@jax.custom_jvp
def reverse_mode_only(x):
    """x; its tangent can be transposed, but evaluating it raises TypeError(NO_DERIVATIVE)."""
    return x


def _tangent(primals, tangents):
    (x,), (tangent,) = primals, tangents
    if isinstance(tangent, jax.custom_derivatives.SymbolicZero):
        return x, tangent
    return x, refuse(TypeError, NO_DERIVATIVE, (tangent,), (jax.typeof(tangent),))[0]


reverse_mode_only.defjvp(_tangent, symbolic_zeros=True)


def undifferentiable(fun):
    """fun(*arrays) whose derivative, where one is asked for, raises TypeError(NO_DERIVATIVE)."""
    wrapped = jax.custom_jvp(fun)

    @wrapped.defjvp
    def _(primals, tangents):
        raise TypeError(NO_DERIVATIVE)

    return wrapped
