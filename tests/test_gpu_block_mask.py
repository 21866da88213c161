"""Block masks on a GPU: `pytest -m gpu` on a GPU machine. With an entry for each tile the kernels give the bits that they give
with an entry for each pair; what is not seen costs no time.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_masks import CASES, with_block_mask
from cases import Case, make_inputs
from metrics import assert_same_bits, relative_l2
from test_gpu import (
    EARLY_TILES,
    TRAIN8,
    assert_agree,
    attend_operands,
    backward_operands,
    forward_on_host,
    gradient_bound,
    on_gpu,
    on_host,
)
from test_gpu_at_once import EXACT_DELTA
from test_sparge import lost, walk

import sage_jax
from sage_jax import sparge
from sage_jax.masking import TILE, of_pairs

pytestmark = pytest.mark.gpu

LARGE = [
    Case("large_64", B=2, T=1500, S=1400, N=6, K=2, H=64, dtype="bfloat16"),
    Case("large_128", B=1, T=1500, S=1500, N=4, K=2, H=128, right=0, dtype="bfloat16"),
    Case("large_window", B=1, T=1500, S=1500, N=4, K=4, H=128, left=300, right=40, dtype="float16"),
    Case("large_segments", B=2, T=1200, S=1200, N=4, K=1, H=64, right=0, segments=True, dtype="bfloat16"),
]


def call(case, inputs, masks, recipe, mask_name):
    """(out, lse, dq, dk, dv), or without gradients (out, lse), by the public function with the case's masks."""
    q, k, v, dout, dlse, _ = inputs
    bounds = np.asarray(masks.bounds)
    kwargs = dict(
        query_seq_lengths=bounds[:, 0], key_value_seq_lengths=bounds[:, 1], recipe=recipe, return_residual=True,
        deterministic=True, causal_alignment="bottom_right" if case.bottom_right else "top_left",
        local_window_size=tuple(None if n >= 2**30 else n for n in (case.left, case.right)),
    )  # fmt: skip
    if case.segments:
        kwargs |= dict(query_segment_ids=masks.q_seg, key_value_segment_ids=masks.kv_seg)

    @jax.jit
    def run(q, k, v, dout, dlse, mask):
        attend = lambda *x: sage_jax.dot_product_attention(*x, **kwargs, **{mask_name: mask})  # noqa: E731
        if sage_jax.recipe.resolve(recipe).backward is None:
            return attend(q, k, v)
        results, pull = jax.vjp(attend, q, k, v)
        return *results, *pull((dout.astype(results[0].dtype), jnp.swapaxes(dlse, 1, 2)))

    return run(q, k, v, dout, dlse, masks.mask)


@pytest.mark.parametrize("recipe", ["train8", "train8:delta=exact", "sage2:pv=bf16", "sagebwd", "sage3"])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_tiles_and_pairs_give_the_same_bits(case, recipe):
    for axes in ((1, 1, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1)):
        inputs, pairs = with_block_mask(case, axes)
        ours = call(case, inputs, inputs[-1], recipe, "block_mask")
        for x, y in zip(ours, call(case, inputs, pairs, recipe, "mask"), strict=True):
            assert_same_bits(np.asarray(x), np.asarray(y))


def stretches(tiles):
    """bool [tiles, tiles]: one row of tiles sees the first four fifths, the next the last tenth, the third two tiles in six, the
    fourth nothing. So of the rows of a block some see nothing for long while others do, at its beginning or its end.
    """
    row, column = np.arange(tiles)[:, None], np.arange(tiles)[None]
    seen = [column < tiles * 4 // 5, column >= tiles - tiles // 10, column % 6 < 2, column < 0]
    return np.select([row % 4 == i for i in range(4)], seen, False)


@pytest.mark.parametrize("recipe", [TRAIN8, EXACT_DELTA, TRAIN8.replace(pv="bf16")], ids=["train8", "delta=exact", "pv=bf16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_that_see_nothing_beside_others_that_do(head_dim, recipe):
    """A warpgroup passes over tiles of which none of its 64 rows, or keys, sees anything: before its sums are first moved to
    exact ones (2048 keys, 1024 queries), after, and for good. Against the CPU's kernels, which know no such thing.
    """
    case = Case("stretches", B=1, T=2500, S=2500, N=2, K=1, H=head_dim, dtype="bfloat16")
    *inputs, masks = make_inputs(case)
    rows = stretches(40)
    masks = of_pairs(masks._replace(mask=jnp.asarray(np.stack([rows, rows.T])[None])), TILE, case.T, case.S)
    dout, dlse = inputs[3:]
    qq, kv, expected = forward_on_host(case, recipe, (*inputs, masks), "cpu")
    out, lse, _, _ = on_gpu("attend", case, recipe, *attend_operands(qq, kv, masks))
    assert_agree(out, expected[0], EARLY_TILES, "out")
    np.testing.assert_allclose(lse, expected[1], rtol=1e-3, atol=1e-3)
    operands = backward_operands(qq, kv, expected, dout, dlse, masks)
    gradients = on_host("attend_backward", case, recipe, *operands, implementation="cpu")
    for deterministic in (False, True):
        ours = on_gpu("attend_backward", case, recipe, *operands, deterministic=deterministic)
        for name, x, y in zip(("dq", "dk", "dv"), ours[:3], gradients[:3], strict=True):
            assert_agree(x, y, gradient_bound(recipe, case.dtype), name)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_added_up_in_any_order(head_dim):
    """`deterministic=False`, whose dQ is added up in memory by blocks of keys that a block mask leaves out here and there."""
    case = Case("at_once", B=1, T=2000, S=2000, N=4, K=2, H=head_dim, right=0, dtype="bfloat16")
    (q, k, v, dout, _, masks), _ = with_block_mask(case, density=0.3)

    def gradients(deterministic):
        attend = lambda *x: sage_jax.dot_product_attention(  # noqa: E731
            *x, is_causal=True, recipe="train8", deterministic=deterministic, block_mask=masks.mask
        )
        return jax.jit(lambda *x: jax.vjp(attend, *x)[1](dout))(q, k, v)

    for x, y in zip(gradients(False), gradients(True), strict=True):
        assert relative_l2(np.asarray(x, np.float32), np.asarray(y, np.float32)) < 6e-3


def test_chosen_tiles_hold_the_mass():
    q, k, v = walk(4096)
    choose = jax.jit(lambda q, k: sparge.block_mask(q, k, is_causal=True))
    mask = np.asarray(choose(q, k))
    assert lost(np.asarray(q), np.asarray(k), mask, causal=True) < 0.03 and mask.mean() < 0.4
    sparse = sage_jax.dot_product_attention(q, k, v, is_causal=True, block_mask=mask)
    dense = sage_jax.dot_product_attention(q, k, v, is_causal=True)
    assert relative_l2(np.asarray(sparse), np.asarray(dense)) < 0.1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scattered", [False, True])
def test_what_is_not_seen_takes_no_time(head_dim, scattered):
    """A quarter of the blocks in less than six tenths of the time, forward and backward together; where each tile of 64 x 64 is
    for itself, in less than all of it.
    """
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 16384, 16, head_dim)), jnp.bfloat16) for _ in range(3))
    size_q, size_k = (TILE, TILE) if scattered else sparge.Selection().sizes(head_dim)
    blocks = rng.random((1, 16, -(-16384 // size_q), 16384 // size_k)) < 0.25
    mask = np.repeat(np.repeat(blocks, size_q // TILE, axis=2)[:, :, :256], size_k // TILE, axis=3)

    @jax.jit
    def step(q, k, v, mask):
        loss = lambda *x: jnp.sum(sage_jax.dot_product_attention(*x, block_mask=mask).astype(jnp.float32))  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    def seconds(mask):
        jax.block_until_ready(step(q, k, v, mask))
        best = np.inf
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(step(q, k, v, mask))
            best = min(best, time.perf_counter() - begin)
        return best

    assert seconds(jnp.asarray(mask)) < (0.95 if scattered else 0.6) * seconds(jnp.ones_like(mask))
