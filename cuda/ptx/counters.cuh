// Counters in global memory by which blocks, of one kernel or of two that run at the same time, tell each other that
// something in memory is complete.
#pragma once

#include <cstdint>

namespace sage::ptx {

// What this thread has written, or seen to be written, comes before it.
__device__ __forceinline__ void count_up(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}

// Until it has reached `target`; what was written before it did is seen by this thread, and by those that meet it at a barrier.
__device__ __forceinline__ void wait_until_counted(const uint32_t* counter, uint32_t target) {
  uint32_t count;
  while (true) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(__cvta_generic_to_global(counter)) : "memory");
    if (count >= target) return;
    __nanosleep(200);
  }
}

}  // namespace sage::ptx
