// Kernels with deliberate mistakes: what the simulator must notice. Each doubles an array through
// shared memory and gets one thing wrong.
#include "common/launch.h"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/shared.cuh"

namespace sage {
namespace {

constexpr int kThreads = 64;

struct Problem {
  const float* in;  // [64]
  float* out;       // [64]
};

__device__ float* shared_floats() { return reinterpret_cast<float*>(ptx::dynamic_shared()); }

// Thread i reads what thread 63 - i wrote, with or without a barrier between.
template <bool kBarrier>
__global__ void mirror(const Problem p) {
  const int i = static_cast<int>(threadIdx.x);
  shared_floats()[i] = p.in[i];
  if (kBarrier) __syncthreads();
  p.out[i] = 2.0f * shared_floats()[kThreads - 1 - i];
}

// Copies asynchronously, and waits or forgets to.
template <bool kWait>
__global__ void copy(const Problem p) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < kThreads / 4)
    ptx::cp_async_16(ptx::shared_address(&shared_floats()[4 * i]), p.in + 4 * i, true);
  ptx::cp_async_commit();
  if (kWait) ptx::cp_async_wait_group<0>();
  __syncthreads();
  p.out[i] = 2.0f * shared_floats()[i];
}

__global__ void half_a_barrier(const Problem p) {
  if (threadIdx.x < 32) __syncthreads();
  p.out[threadIdx.x] = 0.0f;
}

__global__ void half_a_warp(const Problem p) {
  float x = p.in[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  } else {
    __syncwarp();
  }
  p.out[threadIdx.x] = x;
}

__global__ void load_too_far(const Problem p) {
  uint32_t r[1];
  ptx::ldmatrix_x1(r, ptx::shared_address(ptx::dynamic_shared()) + 256);
  p.out[threadIdx.x] = static_cast<float>(r[0]);
}

__global__ void write_too_far(const Problem p) {
  shared_floats()[kThreads + threadIdx.x] = p.in[threadIdx.x];
}

}  // namespace
}  // namespace sage

extern "C" const char* sim_selftest(int which, const float* in, float* out) {
  using namespace sage;
  const Problem p = {in, out};
  void (*const kernels[])(Problem) = {mirror<true>,   mirror<false>, copy<true>,   copy<false>,
                                      half_a_barrier, half_a_warp,   load_too_far, write_too_far};
  return launch(kernels[which], dim3(1), dim3(kThreads), sizeof(float) * kThreads, nullptr, p);
}
