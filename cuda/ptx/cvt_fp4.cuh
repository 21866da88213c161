// Conversions of FP4 attention: eight floats to e2m1, four e4m3 scales to floats.
#pragma once

#include <cstdint>

#include "numerics/e2m1.h"
#include "ptx/cvt.cuh"

namespace sage::ptx {

// The first lands in the lowest four bits. Nearest, ties to even, saturating at ±6.
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

// The lowest byte first. Exact.
__device__ __forceinline__ void cvt_f32_e4m3x4(float (&x)[4], uint32_t codes) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves[2];
  cvt_f16x4_e4m3x4(halves, codes);
  cvt_f32_f16x2(x[0], x[1], halves[0]);
  cvt_f32_f16x2(x[2], x[3], halves[1]);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = e4m3_value(static_cast<uint8_t>(codes >> (8 * i)));
#endif
}

}  // namespace sage::ptx
