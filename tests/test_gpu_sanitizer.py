"""Every CUDA kernel on problems small enough for `compute-sanitizer` (`tools/gpu_check.sh sanitize`); `pytest -m gpu` runs them
without it as well.
"""

import dataclasses

import jax
import numpy as np
import pytest
from cases import Case, make_inputs
from test_cpu_fp4 import SAGE3, run
from test_gpu import OTHERS, TRAIN8, WIDELY_TESTED, by_name, gradients_on_gpu, present, settings_of

from sage_jax import _vjp
from sage_jax.masking import Masks
from sage_jax.recipe import PRESETS

pytestmark = pytest.mark.gpu


def assert_no_nan(results):
    for x in jax.device_get(results):
        assert not np.isnan(np.asarray(x, np.float32)).any()


@pytest.mark.parametrize("recipe", [*WIDELY_TESTED, PRESETS["sage2pp"], *OTHERS[:2]], ids=by_name)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 200])
def test_small_problems(recipe, head_dim):
    """Every kernel once, ragged and masked."""
    case = Case(
        "sanitizer", B=1, T=70, S=134, N=2, K=1, H=head_dim, right=40, lengths=True, segments=True,
        mask=(1, 0, 1, 1), dtype="bfloat16",
    )  # fmt: skip
    q, k, v, dout, dlse, masks = make_inputs(case)
    if recipe.backward:
        results = gradients_on_gpu(case, recipe, q, k, v, dout, dlse, masks)
    else:
        settings = settings_of(case, recipe, "cuda")
        results = _vjp.attention(settings, q, k, v, Masks(*present(masks)))
    assert_no_nan(results)


@pytest.mark.parametrize("recipe", [TRAIN8, OTHERS[0]], ids=by_name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [dict(H=64), dict(H=104), dict(H=64, N=280), dict(H=128, N=280)], ids=str)
def test_queries_that_the_kernel_quantizes(sizes, dtype, recipe):
    """With many heads by its three warps, and not under racecheck: see tools/gpu_check.sh."""
    sizes = dict(B=1, T=70, S=134, N=2, K=1, right=40, lengths=True) | sizes
    case = Case("sanitizer", dtype=dtype, **sizes)
    q, k, v, _, _, masks = make_inputs(case)
    settings = dataclasses.replace(settings_of(case, recipe, "cuda"), lse=False, for_backward=False)
    assert_no_nan(_vjp.attention(settings, q, k, v, Masks(*present(masks)))[:1])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_that_stay(head_dim, deterministic):
    """More blocks of rows than multiprocessors: each takes one after the other, and places in shared memory take turns. Not under
    racecheck: see tools/gpu_check.sh.
    """
    case = Case("sanitizer", B=1, T=70, S=134, N=280, K=140, H=head_dim, right=40, lengths=True, dtype="bfloat16")
    recipe = TRAIN8.replace(delta="exact")
    assert_no_nan(gradients_on_gpu(case, recipe, *make_inputs(case), deterministic=deterministic))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_few_queries(head_dim):
    case = Case("decode", B=1, T=2, S=1100, N=4, K=2, H=head_dim, left=900, right=0, bottom_right=True, dtype="bfloat16")
    q, k, v, _, _, masks = make_inputs(case)
    settings = settings_of(case, PRESETS["sage2"], "cuda")
    assert_no_nan(_vjp.attention(settings, q, k, v, Masks(*present(masks))))


@pytest.mark.parametrize(
    "sizes", [dict(H=40, N=2), dict(H=128, N=2), dict(H=200, N=2), dict(H=64, N=210, S=700, T=260)], ids=str
)
def test_fp4(sizes):
    """Every kernel once, ragged and masked; with many heads blocks persist over several row blocks, and
    tiles of keys take turns in shared memory."""
    sizes = dict(B=1, T=150, S=334, K=1, right=90, lengths=True, segments=True, mask=(1, 0, 1, 1)) | sizes
    case = Case("sanitizer", dtype="bfloat16", **sizes)
    q, k, v, _, _, masks = make_inputs(case)
    assert_no_nan(run(case, SAGE3, "cuda", q, k, v, masks)[2])
