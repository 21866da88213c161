// Additions in global memory without a result (sm_90: several values at once).
#pragma once

#include <cstdint>

namespace sage::ptx {

// Adds eight f16, in pairs, to 16 bytes at `to`, if `counts`: without a branch.
__device__ __forceinline__ void add_f16x8_if(void* to, const uint32_t (&x)[4], bool counts) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0; @p red.global.relaxed.gpu.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4}; }" ::"l"(to),
      "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(static_cast<int>(counts))
      : "memory");
}

}  // namespace sage::ptx
