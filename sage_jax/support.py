"""What a call may ask for: one check, used by the function itself, by `supports` and by
`explain`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import _ffi, _vjp, masking
from sage_jax import recipe as recipes
from sage_jax.masking import OPEN
from sage_jax.recipe import MAX_HEAD_DIM, Recipe

DTYPES = ("bfloat16", "float16", "float32")
JAX_PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")
ALIGNMENTS = ("top_left", "bottom_right")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked call.

    Attributes:
      settings: the static part, for the operations.
      recipe: what computes the forward pass; its gradient, if it has one, is that of
        settings.recipe.
      fold_scale: the softmax scale is multiplied into float32 queries, because it is negative, zero
        or a traced value.
    """

    settings: _ffi.Settings
    recipe: Recipe
    fold_scale: bool


def plan(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation=None,
    return_residual=False,
    recipe=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    causal_alignment="top_left",
    deterministic=False,
    block_mask=None,
    platform=None,
) -> Plan:
    """Checks a call of `dot_product_attention` by shapes and dtypes only.

    Raises:
      ValueError, TypeError: one sentence: what was given, what is supported, what to do.
      ImportError: the native module that the call needs was not built.
    """
    check_names(implementation, platform, causal_alignment)
    query, key, value = map(_shaped, ("query", "key", "value"), (query, key, value))
    bias, mask = map(_optional, ("bias", "mask"), (bias, mask))
    block_mask = _optional("block_mask", block_mask)
    B, T, N, S, _, H = _check_shapes(query, key, value)
    dtype = _check_dtypes(query, key, value)
    _check_logit_array("bias", bias, (B, N, T, S))
    _check_logit_array("mask", mask, (B, N, T, S))
    blocks = (B, N, masking.tiles(T), masking.tiles(S))
    _check_logit_array("block_mask", block_mask, blocks, "[B, N, ceil(T/64), ceil(S/64)]")
    _check_bool("mask", mask, "pass an additive mask as bias")
    _check_bool("block_mask", block_mask, "compare scores of tiles with a threshold")
    if mask is not None and block_mask is not None:
        raise ValueError(
            "mask and block_mask were both given, but one of them is supported at a time; combine "
            "them in mask, or express mask by is_causal, windows, lengths or segment ids."
        )
    if bias is not None and not _is_real(bias.dtype):
        raise ValueError(
            f"bias has dtype {bias.dtype}, but only real numbers are supported; pass a boolean "
            "mask as mask=."
        )
    three = len(query.shape) == 3
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    for name, given in lengths.items():
        check_integers(name, given, [(B,)], "give one length for each batch row")
    segments = {"query_segment_ids": (query_segment_ids, T), "key_value_segment_ids": (key_value_segment_ids, S)}
    for name, (ids, tokens) in segments.items():
        check_integers(name, ids, [(B, tokens)] + [(tokens,)] * three, "give one id for each token")
        _check_range(name, ids)
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        given = "query_segment_ids" if key_value_segment_ids is None else "key_value_segment_ids"
        raise ValueError(
            f"only {given} was given; packed sequences need both query_segment_ids and key_value_segment_ids (the "
            "same array twice for self-attention)."
        )
    check_flag("is_causal", is_causal)
    check_flag("return_residual", return_residual)
    check_flag("deterministic", deterministic)
    left, right = window(local_window_size, is_causal)
    scale, fold_scale = _scale(scale, H)
    chosen = recipes.resolve(recipe)
    named = implementation in _ffi.PLATFORMS
    if chosen and named and not _ffi.has_kernels(implementation, chosen):
        raise ValueError(_ffi.no_fp4(implementation, chosen))
    _check_implementation(implementation, bias is not None, platform or jax.default_backend())
    settings = _ffi.Settings(
        recipe=chosen or recipes.DEFAULT_TRAINING,
        scale=scale,
        window_left=left,
        window_right=right,
        head_dim=H,
        dtype=np.dtype(jnp.float32) if fold_scale else dtype,
        implementation=implementation,
        lse=bool(return_residual),
        deterministic=bool(deterministic),
        mask_tile=1 if block_mask is None else masking.TILE,
    )
    return Plan(settings, chosen or recipes.DEFAULT_INFERENCE, fold_scale)


def _shaped(name, x):
    """x, or the shape and dtype of the array that JAX makes of a number, list or NumPy array."""
    if hasattr(x, "shape") and not isinstance(x, (np.ndarray, np.generic)):
        return x
    try:
        array = masking.as_array(x)
        if array.dtype.kind in "OSU":
            raise TypeError
        return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} should be an array or a list of numbers, but got {type(x).__name__}."
        ) from None


def _optional(name, x):
    return None if x is None else _shaped(name, x)


def _check_shapes(query, key, value):
    """(B, T, N, S, K, H)"""
    for name, x, letters in (("query", query, "T, N"), ("key", key, "S, K"), ("value", value, "S, K")):
        if len(x.shape) not in (3, 4):
            raise ValueError(
                f"{name} has shape {x.shape}; supported are [B, {letters}, H] and [{letters}, H]: "
                f"add or merge axes."
            )
    q, k, v = (((1,) * (4 - len(x.shape))) + tuple(x.shape) for x in (query, key, value))
    if k != v:
        advice = "pad the narrower head dimension" if k[:3] == v[:3] else "give one value for each key"
        raise ValueError(
            f"key and value must have the same shape, but got {key.shape} and {value.shape}; {advice}."
        )
    (B, T, N, H), (_, S, K, _) = q, k
    if (k[0], k[3]) != (B, H):
        mixed = len(query.shape) != len(key.shape)
        raise ValueError(
            f"query and key must agree in batch and head dimension, but got query {query.shape} "
            f"and key {key.shape}{'; give both a batch axis, or neither' if mixed else ''}."
        )
    if K == 0 or N == 0 or N % K:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key/value heads, but "
            f"got {N} and {K}."
        )
    if not 1 <= H <= MAX_HEAD_DIM:
        raise ValueError(
            f"head dimension {H} is not supported; it must lie between 1 and {MAX_HEAD_DIM}: use more, smaller "
            "heads, or jax.nn.dot_product_attention."
        )
    return B, T, N, S, K, H


def _check_dtypes(query, key, value):
    names = {name: str(x.dtype) for name, x in (("query", query), ("key", key), ("value", value))}
    given = ", ".join(f"{name} {dtype}" for name, dtype in names.items())
    if len(set(names.values())) > 1:
        raise ValueError(
            f"query, key and value must have one dtype, but got {given}; cast them to one."
        )
    if names["query"] not in DTYPES:
        raise ValueError(
            f"dtype is not supported: got {given}; supported are {', '.join(DTYPES)}: cast with "
            f".astype(jnp.bfloat16)."
        )
    return np.dtype(query.dtype)


def _check_logit_array(name, x, full, letters="[B, N, T, S]"):
    if x is None:
        return
    shape = (1,) * (4 - len(x.shape)) + tuple(x.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name} has shape {x.shape}, which does not broadcast to {letters} = {full}; "
            f"every axis must be 1 or full."
        )


def _check_bool(name, x, otherwise):
    if x is not None and x.dtype != np.bool_:
        raise ValueError(
            f"{name} has dtype {x.dtype}, but only bool is supported (True = attend); cast it "
            f"with .astype(bool), or {otherwise}."
        )


def _is_real(dtype):
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_integers(name, x, shapes, advice):
    """Raises ValueError unless x is None, or an integer array or list of one of the shapes."""
    if x is None:
        return
    given = type(x).__name__
    try:
        x = _shaped(name, x)
        given = f"{x.dtype} {tuple(x.shape)}"
    except TypeError:  # no numbers, or lists of several lengths
        x = None
    if x is None or tuple(x.shape) not in shapes or not jnp.issubdtype(x.dtype, jnp.integer):
        wanted = " or ".join(str(s) for s in dict.fromkeys(shapes))
        raise ValueError(f"{name} should be an integer array of shape {wanted}, but got {given}; {advice}.")


def check_flag(name, flag):
    """Raises TypeError for what is neither True nor False."""
    if not isinstance(flag, (bool, np.bool_)):
        raise TypeError(f"{name} should be True or False, but got {flag!r}.")


def _check_range(name, ids):
    """Segment ids are compared as int32: the values of a NumPy array or a list have to fit, and the
    type of any other array.
    """
    if ids is None:
        return
    ids = ids if hasattr(ids, "dtype") else masking.as_array(ids)
    if not isinstance(ids, (np.ndarray, np.generic)):
        fits, given = np.can_cast(ids.dtype, np.int32), f"dtype {ids.dtype}"
    else:
        least, most = np.min(ids, initial=0), np.max(ids, initial=0)
        fits, given = -(2**31) <= least and most < 2**31, f"values from {least} to {most}"
    if not fits:
        raise ValueError(
            f"{name} has {given}, but ids are compared as int32; number the segments from 0 and "
            "cast with .astype(jnp.int32)."
        )


def window(size, is_causal):
    """(left, right) window edges; OPEN where nothing is excluded."""
    pair = (None, None) if size is None else size
    try:
        pair = (operator.index(pair),) * 2 if not isinstance(pair, (tuple, list)) else tuple(pair)
        left, right = (OPEN if edge is None else operator.index(edge) for edge in pair)
    except (TypeError, ValueError):
        raise ValueError(
            f"local_window_size={size!r} is not supported; give one int, or (left, right) where "
            f"None leaves a side open."
        ) from None
    if is_causal:
        right = min(right, 0)
    return min(max(left, -OPEN), OPEN), min(max(right, -OPEN), OPEN)


def _scale(scale, head_dim):
    """(static softmax scale, whether the given one must be multiplied into the queries instead)"""
    if scale is None:
        return 1.0 / math.sqrt(head_dim), False
    check_scale(scale)
    if not _is_static(scale) or not np.float32(scale) > 0:
        return 1.0, True
    return float(scale), False


def _is_static(scale):
    return isinstance(scale, (numbers.Real, np.ndarray)) and not isinstance(scale, jax.Array)


def check_scale(scale):
    """Raises for what is no scalar real number, and for a number, not one in a JAX array, that is not finite."""
    dtype = getattr(scale, "dtype", None)
    real = isinstance(scale, numbers.Real) if dtype is None else _is_real(dtype)
    if isinstance(scale, bool) or not real:
        given = repr(scale) if dtype is None else f"an array of {dtype}"
        raise TypeError(f"scale should be a number or a scalar array of real numbers, but got {given}.")
    if hasattr(scale, "shape") and tuple(scale.shape) != ():
        raise ValueError(
            f"scale should be a scalar, but got an array of shape {tuple(scale.shape)}; multiply the queries by it "
            "where it differs among them."
        )
    if not _is_static(scale):
        return
    try:
        # The softmax works with powers of two.
        finite = abs(float(scale)) * math.log2(math.e) <= float(np.finfo(np.float32).max)
    except OverflowError:  # of a huge int
        finite = False
    if not finite:
        raise ValueError(
            f"scale={scale!r} times log2(e) is not finite in float32, the type of the softmax; leave "
            "it out for 1/sqrt(head dimension)."
        )


def check_names(implementation, platform=None, causal_alignment=ALIGNMENTS[0]):
    """Raises for an implementation, a platform or an alignment that does not exist."""
    if not isinstance(implementation, (str, type(None))):
        raise TypeError(
            f"implementation should be a name or None, but got {implementation!r}; choose one of "
            f"{_names(_ffi.IMPLEMENTATIONS)}."
        )
    if implementation in ("xla", "cudnn"):
        raise ValueError(
            f"implementation={implementation!r} names an exact kernel of JAX, not an 8-bit one; call "
            f"jax.nn.dot_product_attention(..., implementation={implementation!r}) for it."
        )
    if implementation not in (None, *_ffi.IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose one of "
            f"{_names(_ffi.IMPLEMENTATIONS)}, or None for the platform's own."
        )
    if platform is not None and platform not in JAX_PLATFORMS:
        if not isinstance(platform, str) or platform != jax.default_backend():
            raise ValueError(
                f"platform={platform!r} is unknown; choose one of {_names(JAX_PLATFORMS)}, or None "
                "for JAX's default one."
            )
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(
            f"causal_alignment={causal_alignment!r} is not supported; choose 'top_left' (as jax.nn does) or "
            "'bottom_right'."
        )


def _names(choices):
    return ", ".join(map(repr, choices))


def _check_implementation(implementation, has_bias, platform):
    on_gpu = platform in ("gpu", "cuda")
    if has_bias and (implementation == "cuda" or (implementation is None and on_gpu)):
        raise ValueError(_ffi.NO_BIAS_ON_CUDA)
    if on_gpu and implementation in (None, "cuda") and _ffi.load("cuda") is None:
        raise ImportError(
            "JAX runs on a GPU, but this installation of sage_jax has no CUDA kernels; reinstall it with nvcc in "
            "reach (set SAGE_JAX_CUDA=ON to see what is missing), or choose implementation='cpu' or 'reference', or "
            "start JAX with JAX_PLATFORMS=cpu."
        )
    if implementation == "cpu" and _ffi.load("cpu") is None:
        raise ImportError(
            "implementation='cpu' needs sage_jax's native CPU module, which this installation lacks; install the "
            "package with pip (a C++17 compiler is enough), or use implementation='reference'."
        )


def _plan_for(platform, args, kwargs):
    """The plan of a call that is to run on this platform, JAX's default one if None."""
    try:
        _CALL.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"dot_product_attention: {error}; help(sage_jax.dot_product_attention) explains its "
            "arguments."
        ) from None
    planned = plan(*args, platform=platform, **kwargs)
    chosen = planned.settings.implementation
    if chosen in _ffi.PLATFORMS and chosen != _native_platform(platform):
        raise ValueError(_ffi.other_platform(chosen))
    return planned


_CALL = inspect.signature(plan)
_CALL = _CALL.replace(parameters=[p for p in _CALL.parameters.values() if p.name != "platform"])


def _native_platform(platform=None):
    """The name by which native implementations call a platform, JAX's default one if none given."""
    platform = platform or jax.default_backend()
    return "cuda" if platform == "gpu" else platform


def supports(*args, differentiate: bool = False, platform: str | None = None, **kwargs) -> str | None:
    """Whether `dot_product_attention(*args, **kwargs)` would run.

    Args:
      *args, **kwargs: those of the function; arrays may be `jax.ShapeDtypeStruct`.
      differentiate: whether gradients will be taken.
      platform: "cpu", "cuda", "gpu", "rocm" or "tpu": the one to compile for, here or elsewhere; by
        default that of JAX's default backend. An implementation of another platform is refused.

    Returns:
      None if it would, otherwise the sentence that the function would raise.
    """
    try:
        planned = _plan_for(platform, args, kwargs)
        if differentiate:
            _vjp.check_differentiable(planned.settings.recipe)
    except (ValueError, TypeError, ImportError) as error:
        return str(error)
    return None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would use; print it.

    Attributes:
      platform: the platform explained. backend: "cpu", "cuda" or "reference". reason: why this
        backend.
      recipe: of the forward pass. training_recipe: under differentiation, or None if that raises.
      kernels: the operations, in order, of the forward pass and then of the backward pass. Where `attend_queries` is
        among them, differentiation takes the next two in its place.
      head_dim: (given, stored): quantized tensors pad the head dimension.
      architectures: those that the CUDA kernels here were built for. Which kernel serves a call is
        decided when it runs, by the GPU.
    """

    platform: str
    backend: str
    reason: str
    recipe: Recipe
    training_recipe: Recipe | None
    kernels: tuple[str, ...]
    head_dim: tuple[int, int]
    architectures: tuple[str, ...] = ()

    def __str__(self):
        lines = [
            ("backend", f"{self.backend} ({self.reason})"),
            ("recipe", str(self.recipe)),
            ("gradients", str(self.training_recipe or "none: this recipe is for inference only")),
            ("kernels", " -> ".join(self.kernels)),
            ("head dim", f"{self.head_dim[0]}, stored as {self.head_dim[1]}"),
        ]
        if self.backend == "cuda":
            built = ", ".join(f"sm_{name}" for name in self.architectures) or "not built here"
            lines.append(("built for", f"{built}; the GPU decides at run time"))
        return "\n".join(f"{name:>9}: {text}" for name, text in lines)


def explain(*args, platform: str | None = None, **kwargs) -> Explanation:
    """Which backend, kernels and recipe `dot_product_attention(*args, **kwargs)` would use.

    Takes what `supports` takes and raises what the function would raise.
    """
    planned = _plan_for(platform, args, kwargs)
    settings = planned.settings
    platform = _native_platform(platform)
    if settings.implementation is not None:
        backend, reason = settings.implementation, "asked for"
    elif platform not in _ffi.PLATFORMS:
        backend, reason = "reference", f"no native kernels for platform {platform!r}"
    elif _ffi.load(platform) is None:
        backend, reason = "reference", f"the native {platform} module was not built"
    else:
        backend, reason = platform, f"the platform is {platform}"
    trains = settings.recipe.backward is not None
    names = ("quantize_kv", "quantize_q", "attend")
    differentiated = _operations(backend, (*names, "attend_backward")) if trains else ()
    if planned.recipe.fp4:
        eight_bit = differentiated
        if backend != "reference" and not _ffi.has_kernels(backend, planned.recipe):
            lacking = f"no {planned.recipe.qk} kernels for {platform} in this build"
            backend, reason = "reference", lacking
        kernels = _operations(backend, tuple(f"{name}_fp4" for name in names)) + eight_bit
    elif backend == "cuda" and settings.recipe.q_block == 1 and not settings.lse:
        kernels = _operations(backend, ("quantize_kv", "attend_queries")) + differentiated[1:]
    else:
        kernels = differentiated or _operations(backend, names)
    return Explanation(
        platform,
        backend,
        reason,
        planned.recipe,
        settings.recipe if trains else None,
        kernels,
        (settings.head_dim, recipes.padded_head_dim(settings.head_dim)),
        _built_architectures() if backend == "cuda" else (),
    )


def _operations(backend, names):
    """The operations' names where they run: those of native code are those of its custom calls."""
    return names if backend == "reference" else tuple(f"sage_jax_{name}" for name in names)


def _built_architectures():
    module = _ffi.load("cuda")
    return tuple(module.built_architectures()) if module else ()
