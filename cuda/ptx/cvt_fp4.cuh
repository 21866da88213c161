// Eight floats to e2m1, the first in the lowest four bits; nearest, ties to even, saturating at ±6.
#pragma once

#include <cstdint>

#include "numerics/e2m1.h"

namespace sage::ptx {

__device__ __forceinline__ uint32_t cvt_e2m1x8_f32(const float (&x)[8]) {
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
  uint32_t r;
  asm("{ .reg .b8 a, b, c, d; cvt.rn.satfinite.e2m1x2.f32 a, %2, %1; cvt.rn.satfinite.e2m1x2.f32 b, "
      "%4, %3; cvt.rn.satfinite.e2m1x2.f32 c, %6, %5; cvt.rn.satfinite.e2m1x2.f32 d, %8, %7; "
      "mov.b32 %0, {a, b, c, d}; }"
      : "=r"(r)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
  return r;
#else
  uint32_t r = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) r |= e2m1_code(x[i]) << (4 * i);
  return r;
#endif
}

}  // namespace sage::ptx
