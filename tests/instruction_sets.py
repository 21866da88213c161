"""The instruction sets of the CPU handlers, and a fixture that runs a test on each that this CPU has."""

import pytest

from sage_jax import _native_cpu

ISAS = ("generic", "avx2", "avx512", "avx512bf16")  # the newest last


@pytest.fixture(params=ISAS)
def isa(request):
    before = _native_cpu.isa()
    if not _native_cpu.select_isa(request.param):
        pytest.skip(f"no {request.param} kernels in this build, or on this CPU")
    yield request.param
    _native_cpu.select_isa(before)
