// mbarrier (sm_80 and later; bytes of copies: sm_90): a barrier in shared memory that counts arrivals of threads and bytes of bulk copies. It
// has a phase bit that flips each time all of them have come; a wait names the phase it waits for.
#pragma once

#include <cstdint>

namespace sage::ptx {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine, before the block's first barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` of copies as well.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Whether the phase of that parity is complete. A fresh barrier counts as having completed parity 1.
__device__ __forceinline__ bool mbarrier_test_wait(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done != 0;
}

// The same, without insisting: the answer may come late, and be no.
__device__ __forceinline__ uint32_t mbarrier_try_wait(uint32_t barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done;
#else
  return mbarrier_test_wait(barrier, phase);
#endif
}

// Waits until it is. The hint, in nanoseconds, lets the hardware suspend the thread: without it the
// loop spins, and takes the scheduler's turns away from other warps.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3; selp.u32 %0, 1, "
        "0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(phase), "r"(10000000)
        : "memory");
  } while (done == 0);
#else
  while (!mbarrier_test_wait(barrier, phase)) {
  }
#endif
}

}  // namespace sage::ptx
