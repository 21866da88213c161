"""FP4 attention on the CPU against exact attention, on the random problems of the GPU's tests (test_gpu_fp4.py)."""

import numpy as np
import pytest
from fp4_problems import DTYPES, QUERIES, SEEDS, random_case, random_problem
from metrics import relative_l2
from test_cpu_fp4 import SAGE3, run

from sage_jax.masking import OPEN

ROUND = len(DTYPES) * len(QUERIES)  # seeds until every dtype has met every kind of length


def test_the_problems_hold_what_they_promise():
    cases = [random_case(seed) for seed in SEEDS]
    pairs = {(c.dtype, c.T if c.T in QUERIES else None) for c in cases[:ROUND]}
    assert len(pairs) == ROUND
    for some in (cases[:ROUND], cases):
        assert any(c.left < OPEN and c.bottom_right for c in some)
        assert any(c.right < OPEN and c.lengths for c in some)
        assert any(c.N > c.K for c in some) and any(c.N == c.K for c in some)
        assert any(c.segments for c in some) and any(c.mask for c in some)


@pytest.mark.parametrize("seed", range(ROUND))
def test_near_exact_attention(seed):
    case, q, k, v, masks, exact = random_problem(seed)
    out = run(case, SAGE3, "cpu", q, k, v, masks)[2][0]
    assert relative_l2(np.asarray(out, np.float32), exact) < 0.18  # .118 to .176 of the specification
