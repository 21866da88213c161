"""Which tiles `sparge.block_mask` keeps: against masses that are worked out pair by pair, and what it must never leave out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from metrics import relative_l2

import sage_jax
from sage_jax.sparge import Selection, block_mask

TILES = Selection(blocks=(64, 64))
TRUSTING = dataclasses.replace(TILES, similarity_threshold=-1)


def walk(tokens=1024, heads=2, head_dim=64, size=1.0, seed=0, kv_heads=None):
    """q, k that wander slowly, so that neighbours are alike, and v [1, tokens, heads, head_dim]."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.standard_normal((1, tokens, heads, head_dim)), axis=1)
    path *= size / path.std()
    noisy = lambda x: jnp.asarray(x + 0.3 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    kv = path[:, :, : kv_heads or heads]
    return noisy(path), noisy(kv), jnp.asarray(rng.standard_normal(kv.shape), jnp.float32)


def lost(q, k, mask, causal=False):
    """The mean share of a row's probability that the mask leaves out."""
    s = np.einsum("bthd,bshd->bhts", q, np.repeat(k, q.shape[2] // k.shape[2], axis=2)) * q.shape[-1] ** -0.5
    s = np.where(np.tril(np.ones(s.shape[2:], bool)), s, -np.inf) if causal else s
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    kept = np.repeat(np.repeat(mask, 64, axis=2), 64, axis=3)[:, :, : s.shape[2], : s.shape[3]]
    return 1 - np.mean(np.sum(p * kept, axis=-1) / np.sum(p, axis=-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (192, 128), None])
@pytest.mark.parametrize("threshold", [0.98, 0.9])
def test_what_is_left_out_is_what_was_allowed(threshold, blocks, causal):
    """By the means; the softmax of pairs is a little wider. And not everything is kept."""
    q, k, _ = walk()
    mask = block_mask(q, k, Selection(cdf_threshold=threshold, blocks=blocks), is_causal=causal)
    assert mask.shape == (1, 2, 16, 16) and mask.dtype == bool
    assert lost(q, k, mask, causal) < 1.25 * (1 - threshold)
    seen = np.tril(np.ones((16, 16), bool)) if causal else np.ones((16, 16), bool)
    assert np.mean(mask[..., seen]) < 0.85
    if blocks in (None, (192, 128)) and not causal:
        assert np.array_equal(mask[:, :, 0], mask[:, :, 2]) and np.array_equal(mask[..., 0], mask[..., 1])


def test_attention_over_what_is_left_is_near_exact_attention():
    q, k, v = walk()
    exact = jax.nn.dot_product_attention(q, k, v)
    dense, sparse = (sage_jax.dot_product_attention(q, k, v, block_mask=m) for m in (None, block_mask(q, k, TILES)))
    assert relative_l2(sparse, exact) < relative_l2(dense, exact) + 0.03


def test_a_share_of_the_blocks():
    q, k, _ = walk()
    for causal in (False, True):
        mask = np.asarray(block_mask(q, k, dataclasses.replace(TRUSTING, top_k=0.25), is_causal=causal))
        visible = np.arange(16) + 1 if causal else np.full(16, 16)
        assert np.array_equal(mask.sum(axis=-1), np.broadcast_to(np.ceil(visible / 4), (1, 2, 16)))
    assert np.all(block_mask(q, k, dataclasses.replace(TILES, top_k=1.0)))


def test_grouped_heads_are_those_of_repeated_keys():
    q, k, _ = walk(heads=4, kv_heads=2)
    assert np.array_equal(block_mask(q, k, TILES), block_mask(q, jnp.repeat(k, 2, axis=2), TILES))


def test_tiles_without_a_mean_that_stands_for_them_stay():
    q, k, _ = walk()
    rng = np.random.default_rng(1)
    noise = lambda x: jnp.asarray(3 * rng.standard_normal((64, x.shape[-1])), jnp.float32)  # noqa: E731
    mixed_q, mixed_k = q.at[0, 128:192, 0].set(noise(q)), k.at[0, 320:384, 1].set(noise(k))
    mask = np.asarray(block_mask(mixed_q, mixed_k, TILES))
    assert mask[0, 0, 2].all() and mask[0, 1, :, 5].all()
    assert not mask[0, 1, 2].all() and not mask[0, 0, :, 5].all()
    few = dataclasses.replace(TRUSTING, top_k=0.25)
    assert not np.asarray(block_mask(mixed_q, mixed_k, few))[0, 0, 2].all()
    for bad in (jnp.nan, jnp.inf):
        mask = np.asarray(block_mask(q.at[0, 130, 0, 3].set(bad), k.at[0, 330, 1, 0].set(bad), few))
        assert mask[0, 0, 2].all() and mask[0, 1, :, 5].all() and not mask.all()
    # a block goes by the worst of its tiles
    assert np.asarray(block_mask(mixed_q, k, Selection(blocks=(128, 128))))[0, 0, 2:4].all()


@pytest.mark.parametrize("tokens, keys", [(1, 1), (70, 1), (100, 330), (65, 64), (330, 100)])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_ragged_lengths(alignment, tokens, keys):
    q, k, v = (x[:, :n] for x, n in zip(walk(400), (tokens, keys, keys)))
    mask = block_mask(q, k, Selection(cdf_threshold=1.0), is_causal=True, causal_alignment=alignment)
    assert mask.shape == (1, 2, -(-tokens // 64), -(-keys // 64))
    causal = dict(is_causal=True, causal_alignment=alignment)
    full = sage_jax.dot_product_attention(q, k, v, **causal)
    assert relative_l2(sage_jax.dot_product_attention(q, k, v, **causal, block_mask=mask) + 1e-30, full + 1e-30) < 1e-2


def test_the_first_block_can_be_kept():
    q, k, _ = walk()
    sink = np.asarray(block_mask(q, k, dataclasses.replace(TILES, attention_sink=True), is_causal=True))
    assert sink[..., 0].all() and not np.asarray(block_mask(q, k, TILES, is_causal=True))[..., 0].all()
    assert not np.triu(sink, 1).any()


def test_it_compiles_and_has_no_gradient():
    q, k, v = walk(256)

    @jax.jit
    def loss(q, k, v):
        return jnp.sum(sage_jax.dot_product_attention(q, k, v, block_mask=block_mask(q, k, TILES)) ** 2)

    def fixed(q, k, v, mask=block_mask(q, k, TILES)):
        return jnp.sum(sage_jax.dot_product_attention(q, k, v, block_mask=mask) ** 2)

    for ours, expected in zip(jax.grad(loss, (0, 1, 2))(q, k, v), jax.grad(fixed, (0, 1, 2))(q, k, v), strict=True):
        assert relative_l2(ours, expected) < 1e-6


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (dict(cdf_threshold=0.0), "cdf_threshold=0.0 is not supported; it is a share"),
        (dict(top_k=30), "top_k=30 is not supported; it is a share"),
        (dict(similarity_threshold=2), "similarity_threshold=2 is not supported; it is a cosine"),
        (dict(blocks=(100, 64)), r"blocks=\(100, 64\) is not supported; give \(queries, keys\), multiples of 64"),
        (dict(blocks=64), "blocks=64 is not supported"),
    ],
)
def test_fields_that_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        Selection(**fields)


def test_calls_that_are_refused():
    q, k, _ = walk(64)
    with pytest.raises(ValueError, match="block_mask supports .B, T, N, H.: add a batch axis"):
        block_mask(q[0], k[0])
    with pytest.raises(ValueError, match="multiple of the number of key/value heads"):
        block_mask(q[:, :, :1], k)


def test_in_flax():
    q, k, v = walk(256)
    ours = sage_jax.flax.attention_fn(sparge=TILES)(q[0], k[0], v[0])
    assert np.array_equal(ours, sage_jax.dot_product_attention(q, k, v, block_mask=block_mask(q, k, TILES))[0])
    causal = sage_jax.flax.attention_fn("exact", is_causal=True, sparge=TILES)(q, k, v)
    mask = block_mask(q, k, TILES, is_causal=True)
    assert relative_l2(causal, sage_jax.dot_product_attention(q, k, v, is_causal=True, block_mask=mask)) < 0.06
    assert sage_jax.flax.attention_fn(sparge=TILES) is sage_jax.flax.attention_fn(sparge=Selection(blocks=(64, 64)))
    x = jax.random.normal(jax.random.key(0), (1, 256, 32))
    make = dict(num_heads=2, recipe="sage2", is_causal=True)
    dense, sparse = (
        sage_jax.flax.nnx.SageAttention(in_features=32, sparge=chosen, rngs=nnx.Rngs(0), **make)(x)
        for chosen in (None, dataclasses.replace(TRUSTING, top_k=0.3))
    )
    assert 0 < relative_l2(sparse, dense) < 1
    twin = sage_jax.flax.linen.SageAttention(sparge=dataclasses.replace(TRUSTING, top_k=1.0), **make)
    params = twin.init(jax.random.key(0), x)
    plain = sage_jax.flax.linen.SageAttention(**make).apply(params, x)
    assert np.array_equal(twin.apply(params, x), plain)
    with pytest.raises(ValueError, match="mask and block_mask were both given"):
        sage_jax.flax.attention_fn(sparge=TILES)(q, k, v, mask=jnp.ones((256, 256), bool))
    with pytest.raises(TypeError, match="sparge should be a sage_jax.sparge.Selection or None, but got float"):
        sage_jax.flax.attention_fn(sparge=0.5)
