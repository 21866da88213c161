"""The operations of `docs/abi.md` and `docs/nvfp4.md`, on whichever backend runs them.

An operation is a function of arrays under static `Settings`. `operation(name, settings)` gives it
with everything JAX may do to it: compiled once, `vmap` folded into the batch, split over devices,
the backend chosen when the program is compiled for a platform, and a clear error for derivatives
(`_vjp.py` defines those that exist). Native modules are loaded and registered at the first call
that may need them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import _batching, _compat, _refusal, _sharding, _workspace, nvfp4, reference
from sage_jax.masking import TILE, Masks, no_masks, of_pairs, tiles
from sage_jax.quantization import QuantizedKV, QuantizedQ
from sage_jax.recipe import Recipe, padded_head_dim

IMPLEMENTATIONS = ("cpu", "cuda", "reference")
PLATFORMS = {
    "cpu": "cpu",
    "cuda": "CUDA",
}  # of a native implementation: the name XLA registers it under

LAYOUTS = {  # operands, results: see _batching.py
    "quantize_kv": ("B.K. B.K. B.", "BK.. BK. BK. BK.. BK. BK. BK.. BK. BK. BK"),
    "quantize_q": ("B.N. BK. B.", "BN.. BN. BN."),
    "attend": (
        "BN.. BN. BN. BK.. BK. BK.. BK. BK. B. B. B. bn.. bn..",
        "B.N. BN. BN. BN.",
    ),
    "attend_queries": (
        "B.N. BK.. BK. BK.. BK. BK. B. B. B. bn.. bn..",
        "B.N.",
    ),
    "attend_backward": (
        "BN.. BN. BK.. BK. BK. BK.. BK. BK. BK BK. BN. BN. B.N. B.N. BN. B. B. B. bn.. bn..",
        "B.N. B.K. B.K. BN..",
    ),
    **nvfp4.LAYOUTS,
}

NO_BIAS_ON_CUDA = (
    "bias is not supported by implementation='cuda'; pass a boolean mask instead, or use "
    "implementation='reference' here or "
    "jax.nn.dot_product_attention."
)

NO_SYMBOLS_ON_CUDA = (
    "the program was exported with symbolic sizes, which implementation='cuda' does not support: "
    "scratch memory is planned before it runs; export it for each size."
)


def has_kernels(implementation, recipe: Recipe) -> bool:
    """Whether a native implementation, where it was built, has the recipe's forward pass."""
    return not recipe.fp4 or (implementation in PLATFORMS and recipe.qk == "nvfp4")


def no_fp4(implementation, recipe: Recipe):
    return (
        f"recipe {recipe.name!r} multiplies {recipe.qk} operands, for which "
        f"implementation={implementation!r} has no kernels in this build; use "
        "implementation='reference' (plain JAX, O(T·S) memory), or an 8-bit recipe."
    )


def other_platform(implementation):
    return (
        f"implementation={implementation!r} was asked for, but the program is compiled for another "
        f"platform; place the arrays on a {implementation} device, or use implementation=None or "
        "'reference'."
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static part of a call.

    Attributes:
      recipe: all numerics.
      scale: softmax scale, positive.
      window_left, window_right: window edges of `docs/abi.md`.
      head_dim: H before padding.
      dtype: of query, key, value, out and their gradients.
      implementation: "cpu" | "cuda" | "reference", or None: chosen by platform.
      for_backward: also quantize V for the backward pass.
      lse: whether the LSE is a result of attention.
      deterministic: gradients repeat bit for bit.
      mask_tile: queries and keys that an entry of the mask stands for: 1, or 64 for a block mask.
    """

    recipe: Recipe
    scale: float
    window_left: int
    window_right: int
    head_dim: int
    dtype: np.dtype
    implementation: str | None = None
    for_backward: bool = False
    lse: bool = True
    deterministic: bool = False
    mask_tile: int = 1

    @property
    def dp(self) -> str | None:
        return self.recipe.dp_format if self.for_backward else None


# ----------------------------------------------------------------------------------- native modules


@functools.cache
def load(implementation: str):
    """The native module of "cpu" or "cuda" with its operations registered, or None if it was not
    built.

    Raises:
      ImportError: it was built for a newer JAX than the installed one.
    """
    name = f"sage_jax._native_{implementation}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    offered = _compat.ffi_api_minor()
    if module.api_minor > offered:
        raise ImportError(
            f"sage_jax's {implementation} module was built against XLA FFI 0.{module.api_minor}, "
            f"but the installed jaxlib "
            f"offers 0.{offered}: upgrade jax, or rebuild sage_jax in this environment."
        )
    for target, capsule in module.registrations().items():
        jax.ffi.register_ffi_target(target, capsule, platform=PLATFORMS[implementation])
    return module


def _result_types(name, settings: Settings, operands):
    """Shapes and dtypes of an operation's results (`docs/abi.md`)."""
    if name in nvfp4.LAYOUTS:
        return nvfp4.result_types(
            name, operands, settings.recipe.qk, settings.head_dim, settings.dtype
        )
    recipe, none = settings.recipe, (0,)
    padded = padded_head_dim(settings.head_dim)
    if name == "quantize_kv":
        B, S, K, _ = operands[0].shape
        count = tiles(S)
        plain, turned = (B, K, S, padded), (B, K, padded, count * TILE)
        v_pv = {
            "e4m3": (turned, jnp.float8_e4m3fn),
            "f16": (plain, jnp.float16),
            "bf16": (plain, jnp.bfloat16),
            "int8": (turned, jnp.int8),
        }[recipe.pv]
        v_dp = {None: (none, jnp.int8), "int8": (plain, jnp.int8), "bf16": (plain, jnp.bfloat16)}
        return (
            (plain, jnp.int8),
            ((B, K, count), jnp.float32),
            ((B, K, padded), jnp.float32),
            v_pv,
            ((B, K, count) if recipe.pv == "int8" else (B, K, padded), jnp.float32),
            ((B, K, padded), jnp.float32),
            v_dp[settings.dp],
            ((B, K, count) if settings.dp == "int8" else none, jnp.float32),
            ((B, K, padded) if settings.dp else none, jnp.float32),
            ((B, K) if settings.dp else none, jnp.float32),
        )
    if name == "quantize_q":
        B, T, N, _ = operands[0].shape
        return ((B, N, T, padded), jnp.int8), ((B, N, T), jnp.float32), ((B, N, T), jnp.float32)
    if name == "attend_queries":
        return ((operands[0].shape, settings.dtype),)
    B, N, T, _ = operands[0].shape
    rows = ((B, N, T), jnp.float32)
    if name == "attend":
        return ((B, T, N, settings.head_dim), settings.dtype), rows, rows, rows
    _, K, S, _ = operands[2].shape
    dq, dkv = ((B, T, N, settings.head_dim), (B, S, K, settings.head_dim))
    with_bias = operands[-1].size > 0
    return (
        (dq, settings.dtype),
        (dkv, settings.dtype),
        (dkv, settings.dtype),
        ((B, N, T, S) if with_bias else (0, 0, 0, 0), jnp.float32),
    )


def _attributes(name, settings: Settings):
    """Attributes of the custom call, in exactly the integer and float types that the handlers
    declare.
    """
    recipe, i32, i64, f32 = settings.recipe, np.int32, np.int64, np.float32
    scale = {"scale": f32(settings.scale)}
    window = {
        "window_left": i64(settings.window_left),
        "window_right": i64(settings.window_right),
        "mask_tile": i32(settings.mask_tile),
    }
    dp = {None: 0, "int8": 1, "bf16": 2}[settings.dp]
    if name == "attend_queries":
        name = "attend"
    return {
        "quantize_kv": lambda: {
            "pv": i32(recipe.pv_code),
            "v_range": f32(recipe.v_range),
            "smooth_k": i32(recipe.smooth_k),
            "smooth_v": i32(recipe.smooth_v),
            "dp": i32(dp),
        },
        "quantize_q": lambda: {"q_block": i64(recipe.q_block), **scale},
        "quantize_kv_fp4": lambda: {
            "four_or_six": i32(recipe.four_or_six),
            "smooth_k": i32(recipe.smooth_k),
            "smooth_v": i32(recipe.smooth_v),
        },
        "quantize_q_fp4": lambda: {
            "four_or_six": i32(recipe.four_or_six),
            "smooth_q": i32(recipe.smooth_q),
            **scale,
        },
        "attend_fp4": lambda: {**scale, **window},
        "attend": lambda: {
            "pv": i32(recipe.pv_code),
            "f16_accumulate": i32(recipe.f16_accumulate),
            **scale,
            **window,
        },
        "attend_backward": lambda: {
            "backward": i32(recipe.backward_code),
            "dp": i32(recipe.dp_code),
            "exact_delta": i32(recipe.delta == "exact"),
            "deterministic": i32(settings.deterministic),
            **scale,
            **window,
        },
    }[name]()


def _workspace_bytes(name, settings: Settings, operands) -> int | None:
    """Length of the scratch result that a CUDA handler takes, or None where it takes none."""
    padded = padded_head_dim(settings.head_dim)
    if name == "quantize_q":
        return None
    if name == "quantize_kv":
        B, S, K, _ = operands[0].shape
        return _workspace.quantize_kv_bytes(B, S, K, padded)
    if name == "quantize_kv_fp4":
        B, S, K, _ = operands[0].shape
        return _workspace.fp4_bytes(name, B, 0, S, 0, K, padded, {})
    if name == "quantize_q_fp4":
        (B, T, N, _), (_, S, K, _) = operands[0].shape, operands[1].shape
        return _workspace.fp4_bytes(name, B, T, S, N, K, padded, {})
    masks = Masks(*operands[-5:])
    masking = {
        "mask_shape": masks.mask.shape,
        "mask_tile": settings.mask_tile,
        "segments": masks.q_seg.size > 0,
    }
    if name == "attend_fp4":
        (B, N, T, _), (K, S) = operands[0].shape, operands[5].shape[1:3]
        return _workspace.fp4_bytes(name, B, T, S, N, K, padded, masking)
    recipe = settings.recipe
    formats = {"pv": recipe.pv_code, "f16_accumulate": recipe.f16_accumulate}
    if name == "attend_queries":
        (B, T, N, _), (_, K, S, _) = operands[0].shape, operands[1].shape
        return _workspace.attend_queries_bytes(B, T, S, N, K, padded, **formats, **masking)
    B, N, T, _ = operands[0].shape
    _, K, S, _ = operands[3 if name == "attend" else 2].shape
    if name == "attend":
        return _workspace.attend_bytes(B, T, S, N, K, padded, **formats, **masking)
    codes = {"backward": recipe.backward_code, "dp": recipe.dp_code}
    return _workspace.attend_backward_bytes(B, T, S, N, K, padded, **codes, **masking)


def _native(implementation, name, settings, *operands):
    """The custom call into a native module."""
    if name == "attend_queries" and implementation != "cuda":
        return _attend_queries(functools.partial(_native, implementation), settings, *operands)
    results = _result_types(name, settings, operands)
    scratch = ()
    if implementation == "cuda":
        size = _workspace_bytes(name, settings, operands)
        scratch = () if size is None else (((size,), jnp.uint8),)
    types = [_compat.result_type(operands[0], *t) for t in (*results, *scratch)]
    call = jax.ffi.ffi_call(f"sage_jax_{name}", types)
    return tuple(call(*operands, **_attributes(name, settings))[: len(results)])


def _attend_queries(run, settings: Settings, q, *keys_and_masks):
    """`attend_queries` by the two operations that it stands for; run(name, settings, *operands) does one of them."""
    k8, bounds = keys_and_masks[0], keys_and_masks[-5]
    no_mean = jnp.zeros((k8.shape[0], k8.shape[1], k8.shape[3]), jnp.float32)  # the LSE is not wanted
    codes = run("quantize_q", settings, q, no_mean, bounds)
    return tuple(run("attend", settings, *codes, *keys_and_masks))[:1]


def _reference(name, settings: Settings, *operands):
    """The specification, with the operands and results of the custom calls."""
    if name == "attend_queries":
        return _attend_queries(_reference, settings, *operands)
    recipe = settings.recipe
    window = {"window_left": settings.window_left, "window_right": settings.window_right}
    if name in nvfp4.LAYOUTS:
        return nvfp4.operation(name, settings, *operands)
    if name == "quantize_kv":
        return tuple(
            reference.quantize_kv(
                *operands,
                pv=recipe.pv,
                v_range=recipe.v_range,
                smooth_k=recipe.smooth_k,
                smooth_v=recipe.smooth_v,
                dp=settings.dp,
            )
        )
    if name == "quantize_q":
        return tuple(reference.quantize_q(*operands, q_block=recipe.q_block, scale=settings.scale))
    masks = of_pairs(
        Masks(*operands[-5:]),
        settings.mask_tile,
        queries=operands[0].shape[2],
        keys=operands[3 if name == "attend" else 2].shape[2],
    )
    if name == "attend":
        q8, q_scale, lse_shift, k8, k_scale, v_pv, v_scale, v_mean = operands[:8]
        return reference.attend(
            QuantizedQ(q8, q_scale, lse_shift),
            QuantizedKV(k8, k_scale, None, v_pv, v_scale, v_mean, None, None, None, None),
            masks,
            pv=recipe.pv,
            f16_accumulate=recipe.f16_accumulate,
            scale=settings.scale,
            **window,
            head_dim=settings.head_dim,
            out_dtype=settings.dtype,
        )
    q8, q_scale, k8, k_scale, k_mean, v_dp, v_dp_scale, k_max, v_norm, v_mean, *rows = operands[:-5]
    return reference.attend_backward(
        QuantizedQ(q8, q_scale, None),
        QuantizedKV(k8, k_scale, k_mean, None, None, v_mean, v_dp, v_dp_scale, k_max, v_norm),
        *rows,
        masks,
        backward=recipe.backward,
        dp=recipe.dp,
        exact_delta=recipe.delta == "exact",
        scale=settings.scale,
        **window,
        dtypes=(settings.dtype,) * 3,
        with_dlogits=masks.bias.size > 0,
    )


# ----------------------------------------------------------------------------------------- dispatch


def _empty(name, settings, operands):
    """Results where batch, queries or keys are missing altogether: rows that see nothing."""
    fill = {"attend": (0, -jnp.inf, -jnp.inf, 0), "attend_fp4": (0, -jnp.inf)}.get(name)
    types = _result_types(name, settings, operands)
    fills = fill or (0,) * len(types)
    return tuple(
        jnp.full(*shape_dtype[:1], f, shape_dtype[1]) for shape_dtype, f in zip(types, fills)
    )


def _dispatch(name, settings: Settings, *operands):
    """One operation on unsharded, unbatched operands."""
    axis = 1 if LAYOUTS[name][0].startswith("B.") else 2
    keys_at = {"attend": 3, "attend_queries": 1, "attend_backward": 2, "quantize_q_fp4": 1, "attend_fp4": 5}
    keys = operands[keys_at.get(name, 0)]
    if 0 in (operands[0].shape[0], operands[0].shape[axis], keys.shape[axis]):
        results = _empty(name, settings, operands)
    else:
        results = _by_platform(name, settings, *operands)
    axes = frozenset().union(*(_compat.varying(x) for x in operands))
    return tuple(_compat.vary_over(x, axes) for x in results)


def _by_platform(name, settings: Settings, *operands):
    run = functools.partial
    has_bias = len(operands) > 5 and operands[-1].size > 0

    def types():
        like = operands[0]
        return [_compat.result_type(like, *t) for t in _result_types(name, settings, operands)]

    def refuse(sentence):
        return lambda *xs: _refusal.refuse(ValueError, sentence, xs, types())

    @jax.jit  # keeps array constants inside: custom_partitioning takes none
    def specification(*xs):
        axes = _compat.varying(xs[0])
        return tuple(_compat.vary_over(x, axes) for x in _reference(name, settings, *xs))

    native = {kind: run(_native, kind, name, settings) for kind in PLATFORMS}
    if not all(isinstance(n, int) for x in operands for n in x.shape):
        native["cuda"] = refuse(NO_SYMBOLS_ON_CUDA)
    if has_bias:
        native["cuda"] = refuse(NO_BIAS_ON_CUDA)
    if name in nvfp4.LAYOUTS:  # a call that names an implementation without them was refused
        lacking = (kind for kind in PLATFORMS if not has_kernels(kind, settings.recipe))
        native.update(dict.fromkeys(lacking, specification))
    chosen = settings.implementation
    if chosen == "reference":
        return specification(*operands)
    for kind in PLATFORMS:
        available = load(kind) if chosen in (None, kind) else None
        if chosen is None and kind == "cpu" and available is None:
            native["cpu"] = specification
    if chosen is None:
        return jax.lax.platform_dependent(*operands, **native, default=specification)
    return jax.lax.platform_dependent(
        *operands, **{chosen: native[chosen]}, default=refuse(other_platform(chosen))
    )


def _given_results(name, settings: Settings, given):
    """Which results an operation with these operands has; the others are zero-size."""
    if name == "quantize_kv":
        kept = settings.dp is not None
        return (True,) * 6 + (kept, settings.dp == "int8", kept, kept)
    if name == "attend_backward":
        return True, True, True, given[-1]
    return (True,) * len(LAYOUTS[name][1].split())


@functools.lru_cache(maxsize=1024)
def _on(name: str, settings: Settings, given: tuple[bool, ...]):
    """An operation as a function of the operands that are given, a tuple of the results that exist.

    Zero-size arrays stand for the others inside only: outside they could be residuals, and XLA
    crashes on zero-size arrays at the edge of a `shard_map`.
    """
    kept = _given_results(name, settings, given)
    ins, outs = (tuple(layouts.split()) for layouts in LAYOUTS[name])

    @jax.jit  # keeps the arrays made here inside
    def run(*operands):
        operands = iter(operands)
        absent = dict(enumerate(no_masks(0, 0, 0), start=len(given) - 5))
        absent.setdefault(6, jnp.zeros(0, jnp.float32))  # v_dp_scale, where V is kept in bf16
        every = (next(operands) if there else absent[i] for i, there in enumerate(given))
        return tuple(_only(kept, _dispatch(name, settings, *every)))

    run.__name__ = run.__qualname__ = name
    splittable = _batching.foldable(run, _sharding.split, _only(given, ins), _only(kept, outs))
    complete = _refusal.undifferentiable(splittable)

    def entry(*operands):
        results = iter(complete(*operands))
        return tuple(next(results) if there else None for there in kept)

    entry.__name__ = entry.__qualname__ = name  # seen in profiles and program texts
    return jax.jit(entry)


def _only(given, values):
    return tuple(x for there, x in zip(given, values, strict=True) if there)


def operation(name: str, settings: Settings):
    """An operation of `docs/abi.md` as a function of its operands, giving a tuple of its results;
    absent operands and results are None.
    """

    def call(*operands):
        given = tuple(x is not None for x in operands)
        with jax.disable_jit(False):  # the operation itself stays compiled inside jax.disable_jit()
            return _on(name, settings, given)(*_only(given, operands))

    return call
