// Loads from device memory.
#pragma once

#include <cstdint>

namespace sage::ptx {

// 16 bytes, or zeros; asked for where this stands. Of a load that C++ makes conditional inside a loop ptxas makes a load and a
// conditional move, which waits for it.
__device__ __forceinline__ void load_global_or_zero(uint4& words, const void* from, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
      " @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
      : "l"(from), "r"(static_cast<int>(wanted)));
}

}  // namespace sage::ptx
