"""Programs end while a kernel of another stream, such as a collective, holds most multiprocessors for as long as it
likes: no block of a kernel may own work that others wait for before it runs. `pytest -m gpu` on a GPU machine.
"""

import contextlib
import ctypes
import threading
import time

import jax
import pytest
from cases import Case, make_inputs
from metrics import assert_same_bits, relative_l2
from test_gpu import TRAIN8, gradient_program
from test_gpu_at_once import REPEATED

pytestmark = pytest.mark.gpu

LEFT = 3  # multiprocessors that are not held
LONGEST = 60.0  # seconds
# Each block says that it runs, in memory[1 + block], and stays until memory[0] is set.
HOLD = b"""
.version 7.0
.target sm_80
.address_size 64
.visible .entry hold(.param .u64 memory)
{
  .reg .u64 %base, %own;
  .reg .u32 %block, %end;
  .reg .pred %stay;
  ld.param.u64 %base, [memory];
  mov.u32 %block, %ctaid.x;
  mad.wide.u32 %own, %block, 4, %base;
  st.volatile.global.u32 [%own + 4], 1;
AGAIN:
  nanosleep.u32 1000;
  ld.volatile.global.u32 %end, [%base];
  setp.eq.u32 %stay, %end, 0;
  @%stay bra AGAIN;
  ret;
}
\0"""
MULTIPROCESSORS, LARGEST_SHARED_MEMORY = 16, 97  # CUdevice_attribute
DYNAMIC_SHARED_SIZE = 8  # CUfunction_attribute
MAPPED = 2  # CU_MEMHOSTALLOC_DEVICEMAP
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class Driver:
    """Calls of the CUDA driver in the context that JAX uses, by their names."""

    def __init__(self):
        self._library = ctypes.CDLL("libcuda.so.1")

    def __getattr__(self, name):
        def call(*arguments):
            status = getattr(self._library, name)(*arguments)
            assert status == 0, f"{name} returned {status}"

        return call


@contextlib.contextmanager
def held_multiprocessors():
    """Holds all multiprocessors but LEFT, for LONGEST at most. Gives an event that says whether it had to let go."""
    cuda, device, context = Driver(), ctypes.c_int(), ctypes.c_void_p()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    cuda.cuCtxPushCurrent_v2(context)
    module, kernel, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    cuda.cuModuleLoadData(ctypes.byref(module), HOLD)
    cuda.cuModuleGetFunction(ctypes.byref(kernel), module, b"hold")
    count, shared = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(count), MULTIPROCESSORS, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(shared), LARGEST_SHARED_MEMORY, device)
    cuda.cuFuncSetAttribute(kernel, DYNAMIC_SHARED_SIZE, shared)
    cuda.cuStreamCreate(ctypes.byref(stream), NON_BLOCKING)
    blocks = count.value - LEFT
    memory, address = ctypes.c_void_p(), ctypes.c_uint64()
    cuda.cuMemHostAlloc(ctypes.byref(memory), ctypes.c_size_t(4 * (1 + blocks)), MAPPED)
    cuda.cuMemHostGetDevicePointer_v2(ctypes.byref(address), memory, 0)
    words = (ctypes.c_uint32 * (1 + blocks)).from_address(memory.value)
    ctypes.memset(memory, 0, ctypes.sizeof(words))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(address))
    let_go = threading.Event()

    def end():
        let_go.set()
        words[0] = 1

    timer = threading.Timer(LONGEST, end)
    timer.start()
    try:
        # grid, block, shared memory, stream, arguments
        cuda.cuLaunchKernel(kernel, blocks, 1, 1, 32, 1, 1, shared, stream, arguments, None)
        while not all(words[1:]) and not let_go.is_set():
            time.sleep(1e-3)
        yield let_go
    finally:
        timer.cancel()
        words[0] = 1
        cuda.cuStreamSynchronize(stream)
        cuda.cuMemFreeHost(memory)
        cuda.cuStreamDestroy_v2(stream)
        cuda.cuModuleUnload(module)
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
        cuda.cuDevicePrimaryCtxRelease_v2(device)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_come_while_others_hold_multiprocessors(head_dim, deterministic):
    """More blocks of keys than two turns of a GPU, so that dQ of most heads is cleared while others are added up."""
    case = Case("many_heads", B=2, T=390, S=400, N=80, K=80, H=head_dim, dtype="bfloat16")
    inputs = make_inputs(case)
    program = gradient_program(case, TRAIN8, deterministic=deterministic)
    for _ in range(3):  # all that loads or captures kernels is done after that
        expected = jax.device_get(program(*inputs))
    with held_multiprocessors() as let_go:
        actual = jax.device_get(program(*inputs))
        assert not let_go.is_set(), f"nothing had come after {LONGEST} s"
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        if name == "dq" and not deterministic:
            assert relative_l2(x, y) <= REPEATED
        else:
            assert_same_bits(x, y, name)
