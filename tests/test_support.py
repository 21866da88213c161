"""What is refused, in one sentence, and what `supports` and `explain` say of a call before it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metrics import assert_same_bits
from test_attention import B, H, K, N, S, T, attend, inputs

import sage_jax
from sage_jax import _ffi

q0, k0, v0 = (
    jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


ERRORS = {
    "rank": ((array(N, H), k0, v0), {}, "query has shape .* supported are"),
    "key_value": ((q0, k0, array(B, S, K, H + 1)), {}, "key and value must have the same shape"),
    "values": ((q0, k0, array(B, S + 1, K, H)), {}, "give one value for each key"),
    "batch": ((array(3, T, N, H), k0, v0), {}, "agree in batch and head dimension"),
    "mixed_rank": ((q0, array(S, K, H), array(S, K, H)), {}, "give both a batch axis, or neither"),
    "heads": ((array(B, T, 5, H), k0, v0), {}, "multiple of the number of key/value heads, but got 5 and 2"),
    "head_dim": ((array(B, T, N, 257), *[array(B, S, K, 257)] * 2), {}, "head dimension 257 .* between 1 and 256"),
    "mixed": ((q0, array(B, S, K, H, dtype=jnp.float32), v0), {}, "one dtype, but got query bfloat16, key float32|same"),
    "int8": ([array(*x.shape, dtype=jnp.int8) for x in (q0, k0, v0)], {}, "supported are bfloat16, float16, float32"),
    "f64": ([array(*x.shape, dtype=np.float64) for x in (q0, k0, v0)], {}, "float64; supported are"),
    "mask_dtype": ((q0, k0, v0), dict(mask=array(T, S, dtype=jnp.float32)), "mask has dtype float32.*astype\\(bool\\)"),
    "mask_shape": ((q0, k0, v0), dict(mask=array(K, T, S, dtype=bool)), "mask has shape .* does not broadcast"),
    "bias_shape": ((q0, k0, v0), dict(bias=array(T + 1, S)), "bias has shape .* does not broadcast"),
    "bias_bool": ((q0, k0, v0), dict(bias=array(T, S, dtype=bool)), "pass a boolean mask as mask="),
    "bias_complex": ((q0, k0, v0), dict(bias=array(T, S, dtype=jnp.complex64)), "complex64, but only real numbers"),
    "lengths": ((q0, k0, v0), dict(query_seq_lengths=array(3, dtype=jnp.int32)), "query_seq_lengths should be"),
    "lengths_float": ((q0, k0, v0), dict(key_value_seq_lengths=array(B)), "key_value_seq_lengths should be an integer"),
    "one_segment": ((q0, k0, v0), dict(query_segment_ids=array(B, T, dtype=jnp.int32)), "only query_segment_ids"),
    "alignment": ((q0, k0, v0), dict(causal_alignment="left"), "causal_alignment='left' .* 'bottom_right'"),
    "window": ((q0, k0, v0), dict(local_window_size=(1, 2, 3)), "local_window_size=\\(1, 2, 3\\)"),
    "window_float": ((q0, k0, v0), dict(local_window_size=1.5), "local_window_size=1.5"),
    "scale": ((q0, k0, v0), dict(scale=float("nan")), "scale=nan times log2\\(e\\) is not finite"),
    "scale_float32": ((q0, k0, v0), dict(scale=1e300), "scale=1e\\+300 times log2\\(e\\) is not finite in float32"),
    "scale_log2": ((q0, k0, v0), dict(scale=2.4e38), "scale=2.4e\\+38 times log2\\(e\\) is not finite in float32"),
    "scale_type": ((q0, k0, v0), dict(scale="big"), "scale should be a number"),
    "scale_complex": ((q0, k0, v0), dict(scale=np.complex64(1j)), "real numbers, but got an array of complex64"),
    "scale_bool": ((q0, k0, v0), dict(scale=np.True_), "real numbers, but got an array of bool"),
    "residual": ((q0, k0, v0), dict(return_residual="no"), "return_residual should be True or False, but got 'no'"),
    "block_mask_shape": (
        (q0, k0, v0), dict(block_mask=array(B, N, T, S, dtype=bool)),
        "block_mask has shape .* does not broadcast to \\[B, N, ceil\\(T/64\\), ceil\\(S/64\\)\\]",
    ),
    "block_mask_dtype": ((q0, k0, v0), dict(block_mask=array(1, 1, dtype=jnp.float32)), "block_mask has dtype float32, but only bool"),
    "two_masks": (
        (q0, k0, v0), dict(mask=array(T, S, dtype=bool), block_mask=array(1, 1, dtype=bool)),
        "mask and block_mask were both given",
    ),
    "causal": ((q0, k0, v0), dict(is_causal=1), "is_causal should be True or False"),
    "xla": ((q0, k0, v0), dict(implementation="xla"), "call jax.nn.dot_product_attention"),
    "cudnn": ((q0, k0, v0), dict(implementation="cudnn"), "call jax.nn.dot_product_attention"),
    "implementation": ((q0, k0, v0), dict(implementation="tpu"), "choose one of 'cpu', 'cuda', 'reference'"),
    "implementation_list": ((q0, k0, v0), dict(implementation=["cpu"]), "should be a name or None, but got \\['cpu'\\]"),
    "wide_ids": ((q0, k0, v0), dict(query_segment_ids=np.full((B, T), 2**33), key_value_segment_ids=np.zeros((B, S), int)),
                 "query_segment_ids has values from 0 to 8589934592, but ids are compared as int32"),
    "recipe": ((q0, k0, v0), dict(recipe="sage9"), "recipe='sage9' is unknown; choose one of sage1"),
    "cuda_bias": ((q0, k0, v0), dict(bias=array(T, S), implementation="cuda"), "bias is not supported by"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_sentence_and_supports_gives_the_same(name):
    args, kwargs, pattern = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=pattern) as raised:
        sage_jax.explain(*args, **kwargs)
    sentence = str(raised.value)
    assert sage_jax.supports(*args, **kwargs) == sentence
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 250
    if name == "f64":
        return  # without x64 a float64 array cannot be made
    with pytest.raises((ValueError, TypeError)) as raised:
        jax.eval_shape(lambda *a: attend(*a, **kwargs) if not abstract(kwargs) else None, *args)
        with_arrays = {
            n: jnp.zeros(x.shape, x.dtype) if hasattr(x, "dtype") else x for n, x in kwargs.items()
        }
        attend(*(jnp.zeros(x.shape, x.dtype) for x in args), **with_arrays)
    assert str(raised.value).splitlines()[0] == sentence


def abstract(kwargs):
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in kwargs.values())


def test_supports():
    assert sage_jax.supports(q0, k0, v0, is_causal=True) is None
    assert sage_jax.supports(q0, k0, v0, recipe="sage2") is None
    assert "inference only" in sage_jax.supports(q0, k0, v0, recipe="sage2", differentiate=True)
    assert sage_jax.supports(q0, k0, v0, recipe="train8", differentiate=True) is None
    assert "bias" in sage_jax.supports(q0, k0, v0, array(T, S), platform="cuda")


@pytest.mark.parametrize("query", [None, "text", [[1, 2], [3]]], ids=str)
def test_what_is_no_array_gets_one_sentence(query):
    with pytest.raises(TypeError, match="^query should be an array or a list of numbers") as raised:
        attend(query, k0, v0)
    assert sage_jax.supports(query, k0, v0) == str(raised.value)


def test_supports_takes_the_lists_and_numpy_arrays_that_the_function_takes():
    x = inputs()
    plain = [np.asarray(a, np.float64) for a in x]  # which JAX makes float32
    masks = dict(query_seq_lengths=[3, 4], mask=[[True] * S] * T)
    assert sage_jax.supports(*plain, **masks) is None
    assert sage_jax.explain(*plain, **masks).recipe.name == "sage2"
    assert_same_bits(attend(*plain, **masks), attend(*x, **masks))
    assert "integer array of shape (2,)" in sage_jax.supports(*x, query_seq_lengths=[1.5, 2.5])
    assert "got list; give one length" in sage_jax.supports(*x, query_seq_lengths=[[1], [2, 3]])


def test_lists_may_hold_traced_numbers():
    x = inputs()
    masks = lambda n: dict(query_seq_lengths=[n, 4], key_value_seq_lengths=[5, n])
    out = jax.jit(lambda n: attend(*x, **masks(n), implementation="reference"))(3)
    assert_same_bits(out, attend(*x, **masks(3), implementation="reference"))


def test_segment_ids_of_wide_types_are_refused_and_small_ones_in_numpy_taken():
    attend_x64 = functools.partial(attend, *inputs())
    ids = np.arange(S) // 20 * np.ones((B, 1), int)  # int64, with values that fit
    segments = dict(query_segment_ids=ids[:, :T], key_value_segment_ids=ids)
    expected = attend_x64(**segments)
    with jax.enable_x64(True):
        assert_same_bits(attend_x64(**segments), expected)
        segments["key_value_segment_ids"] = jnp.asarray(ids)
        with pytest.raises(ValueError, match="key_value_segment_ids has dtype int64"):
            attend_x64(**segments)


@pytest.mark.parametrize(
    "args,kwargs,sentence",
    [
        ((q0, k0, v0), dict(dropout=1), "unexpected keyword argument 'dropout'"),
        ((q0, k0), {}, "missing a required argument: 'value'"),
        ((q0, k0, v0, None, None, 0.1), {}, "too many positional arguments"),
    ],
)
def test_arguments_that_do_not_exist(args, kwargs, sentence):
    said = sage_jax.supports(*args, **kwargs)
    assert said.startswith("dot_product_attention: ") and sentence in said and said.endswith(".")
    with pytest.raises(TypeError):
        attend(*args, **kwargs)


def test_a_gpu_without_cuda_kernels_is_an_error_before_anything_runs(monkeypatch):
    monkeypatch.setattr(_ffi, "load", lambda implementation: None)
    sentence = sage_jax.supports(q0, k0, v0, platform="gpu")
    assert "no CUDA kernels" in sentence and "implementation=" in sentence
    assert sage_jax.supports(q0, k0, v0, platform="gpu", implementation="reference") is None
    assert "native CPU module" in sage_jax.supports(q0, k0, v0, implementation="cpu")


def test_an_implementation_for_another_platform_is_refused_when_compiled():
    with pytest.raises(
        ValueError, match="implementation='cuda' was asked for, but .* another platform"
    ) as raised:
        attend(*inputs(), implementation="cuda")
    sentence = str(raised.value).splitlines()[0]
    assert sage_jax.supports(q0, k0, v0, implementation="cuda") == sentence
    with pytest.raises(ValueError, match="another platform"):
        sage_jax.explain(q0, k0, v0, implementation="cuda")


@pytest.mark.parametrize(
    "implementation,platform", [("cpu", "cuda"), ("cpu", "gpu"), ("cuda", "tpu"), ("cuda", "cpu")]
)
def test_an_implementation_and_the_platform_asked_about_have_to_agree(implementation, platform):
    call = dict(implementation=implementation, platform=platform)
    assert "compiled for another platform" in sage_jax.supports(q0, k0, v0, **call)
    with pytest.raises(ValueError, match="compiled for another platform"):
        sage_jax.explain(q0, k0, v0, **call)
    assert sage_jax.supports(q0, k0, v0, implementation="reference", platform=platform) is None


@pytest.mark.parametrize("platform", ["nonsense", 3, ["cpu"], ""])
def test_platforms_that_do_not_exist(platform):
    said = sage_jax.supports(q0, k0, v0, platform=platform)
    assert said.startswith(f"platform={platform!r} is unknown; choose one of 'cpu', 'cuda'")


def test_another_platform_may_be_asked_about(monkeypatch):
    """As when a program is exported from here."""

    class Module:
        built_architectures = staticmethod(lambda: ["80", "90a"])

    monkeypatch.setattr(_ffi, "load", lambda implementation: Module)
    call = dict(platform="cuda", implementation="cuda")
    assert sage_jax.supports(q0, k0, v0, **call) is None
    said = sage_jax.explain(q0, k0, v0, **call)
    assert said.backend == "cuda" and said.architectures == ("80", "90a")
    assert "sm_80, sm_90a; the GPU decides at run time" in str(said)


def test_explain():
    said = sage_jax.explain(q0, k0, v0, implementation="reference")
    assert (said.backend, said.recipe.name, said.training_recipe.name) == (
        "reference",
        "sage2",
        "train8",
    )
    assert said.head_dim == (H, 64)
    assert "asked for" in str(said) and "sage2" in str(said)
    assert sage_jax.explain(q0, k0, v0, recipe="sage1").training_recipe is None
    assert sage_jax.explain(q0, k0, v0, platform="tpu").backend == "reference"


def test_import_registers_nothing_and_starts_no_backend():
    import subprocess
    import sys

    code = (
        "import sage_jax, sys; from jax._src import xla_bridge as b; assert not b._backends; "
        "assert not [m for m in sys.modules if m.startswith(('sage_jax._native', 'sage_jax.flax', 'flax'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
