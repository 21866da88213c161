"""One table of problems that drives the tests of the reference, the CPU handler, the simulator and the GPU."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sage_jax.masking import OPEN, Masks


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem: sizes, masks and dtype. Letters: B T S N K H."""

    name: str
    B: int = 2
    T: int = 100
    S: int = 100
    N: int = 2
    K: int = 2
    H: int = 64
    dtype: str = "float32"
    left: int = OPEN
    right: int = OPEN
    bottom_right: bool = False
    lengths: bool = False
    segments: bool = False
    mask: tuple[int, int, int, int] | None = None  # 1 = full size on that axis (B, N, T, S), 0 = broadcast
    bias: tuple[int, int, int, int] | None = None
    empty_rows: bool = False  # some queries see nothing

    def __str__(self):
        return self.name


CASES = (
    Case("plain", T=64, S=128),
    Case("ragged", T=65, S=131, H=40),
    Case("one_query", T=1, S=77),
    Case("one_query_16", T=1, S=77, dtype="bfloat16"),  # Q less its mean over a block is zero: FP4
    Case("one_more_query", T=129, S=90, H=128, dtype="bfloat16"),
    Case("one_key", T=70, S=1),
    Case("causal", T=130, S=130, right=0),
    Case("causal_short", T=30, S=130, right=0, bottom_right=True),
    Case("causal_tall", T=130, S=40, right=0, bottom_right=True, empty_rows=True),
    Case("window", T=200, S=200, left=20, right=30),
    Case("window_left", T=150, S=150, left=70, right=0, H=128),
    Case("lengths", T=100, S=140, lengths=True, empty_rows=True),
    Case("lengths_causal", T=100, S=140, lengths=True, right=0, bottom_right=True, empty_rows=True),
    Case("many_keys", T=40, S=1300, lengths=True, empty_rows=True),  # of which K's mean takes a sample
    Case("segments", T=150, S=150, segments=True, right=0),
    Case("mask_full", mask=(1, 1, 1, 1), empty_rows=True),
    Case("mask_2d", T=90, S=70, mask=(0, 0, 1, 1)),
    Case("mask_keys", T=90, S=140, mask=(1, 0, 0, 1), right=0),
    Case("gqa", N=6, K=2, right=0),
    Case("mqa", N=4, K=1, T=33, S=190, H=80),
    Case("d128", H=128, T=140, S=90),
    Case("d256", H=200, N=2, K=1, T=70, S=70, B=1),
    Case("d1", H=1, T=20, S=20),
    Case("bf16", dtype="bfloat16", right=0),
    Case("f16", dtype="float16", T=70, S=150),
    Case("everything", T=190, S=170, N=4, K=2, lengths=True, segments=True, mask=(1, 0, 1, 1), left=90,
         right=0, bottom_right=True, empty_rows=True, dtype="bfloat16", H=72),
)  # fmt: skip
BIAS_CASES = (
    Case("bias_full", bias=(1, 1, 1, 1)),
    Case("bias_row", T=70, S=90, bias=(0, 1, 0, 1), right=0, N=4, K=2),
)


def make_inputs(case: Case, seed: int = 0):
    """(q, k, v, dout, dlse, masks) of the case; dlse float32 [B, N, T]."""
    rng = np.random.default_rng((seed, *case.name.encode()))
    B, T, S, N, K, H = case.B, case.T, case.S, case.N, case.K, case.H

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(case.dtype)

    q, k, v, dout = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H), normal(B, T, N, H)
    k = k + normal(1, 1, K, H) * 2  # a token-independent offset, as real keys have
    dlse = normal(B, N, T).astype(jnp.float32)
    return q, k, v, dout, dlse, make_masks(case, rng)


def bad_keys_and_bad_values(tokens: int):
    """float32 k, v [1, tokens, 1, 64], each with an offset, that are not finite at different tokens; a bad key has the largest value."""
    rng = np.random.default_rng(tokens)
    k, v = (rng.standard_normal((1, tokens, 1, 64)) + 3 * rng.standard_normal(64) for _ in range(2))
    k[0, [3, tokens - 90, tokens - 1], 0, 7] = np.nan, np.inf, -np.inf
    v[0, [4, 70, tokens - 2], 0, 9] = -np.inf, np.nan, np.nan
    v[0, tokens - 1] *= 50
    return jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)


def values_beyond_the_sample(tokens: int):
    """float32 k, v [1, tokens, 3, 64] with values in V that the tokens which stand for all have not met: head 0 has outliers in
    three tokens and half of its channels, head 1 is zero but for the first tokens, head 2 has channels of no or huge values.
    """
    rng = np.random.default_rng(tokens)
    k, v = (rng.standard_normal((1, tokens, 3, 64)) + rng.standard_normal((3, 64)) for _ in range(2))
    v[0, [2, tokens // 2 + 1, tokens - 2], 0, ::2] *= np.array([[30], [100], [-60]])
    v[0, 5:, 1] = 0
    v[..., 2, :8], v[..., 2, 8:16] = 0, v[..., 2, 8:16] * 2.0**100
    return jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)


def make_masks(case: Case, rng) -> Masks:
    B, T, S, N = case.B, case.T, case.S, case.N
    q_len, kv_len = np.full(B, T), np.full(B, S)
    if case.lengths:
        q_len, kv_len = rng.integers(1, T + 1, B), rng.integers(1, S + 1, B)
        if case.empty_rows:
            kv_len[-1] = 0
    offset = kv_len - q_len if case.bottom_right else np.zeros(B, int)
    bounds = jnp.asarray(np.stack([q_len, kv_len, offset], axis=1), jnp.int32)
    q_seg = kv_seg = jnp.zeros((0, 0), jnp.int32)
    if case.segments:
        ids = np.sort(rng.integers(0, 4, (B, max(T, S))), axis=1)
        q_seg, kv_seg = jnp.asarray(ids[:, :T], jnp.int32), jnp.asarray(ids[:, :S], jnp.int32)

    def shape(axes):
        return tuple(n if full else 1 for n, full in zip((B, N, T, S), axes))

    mask, bias = jnp.zeros((0, 0, 0, 0), bool), jnp.zeros((0, 0, 0, 0), jnp.float32)
    if case.mask:
        dense = rng.random(shape(case.mask)) < 0.7
        if case.empty_rows:
            dense[..., : max(1, dense.shape[2] // 3), :] = False
        mask = jnp.asarray(dense)
    if case.bias:
        bias = jnp.asarray(rng.standard_normal(shape(case.bias)), jnp.float32)
    return Masks(bounds, q_seg, kv_seg, mask, bias)


