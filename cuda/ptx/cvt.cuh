// Conversions between number formats, two at a time; the first argument lands in the low half.
// All round to nearest even.
#pragma once

#include <cstdint>

#include "numerics/e4m3.h"

namespace sage::ptx {

__device__ __forceinline__ uint32_t cvt_f16x2_f32(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ uint32_t cvt_bf16x2_f32(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ void cvt_f32_f16x2(float& low, float& high, uint32_t pair) {
  asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// sm_89 and later. Saturates at ±448.
__device__ __forceinline__ uint16_t cvt_e4m3x2_f32(float low, float high) {
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}

// sm_89 and later. Saturates at ±448.
__device__ __forceinline__ uint16_t cvt_e4m3x2_f16x2(uint32_t pair) {
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(r) : "r"(pair));
  return r;
}

// sm_89 and later. Exact.
__device__ __forceinline__ uint32_t cvt_f16x2_e4m3x2(uint16_t pair) {
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}

// Four codes, the lowest byte first. Taken apart by the move, not by a shift, the upper half costs ptxas no
// instruction.
__device__ __forceinline__ void cvt_f16x4_e4m3x4(uint32_t (&halves)[2], uint32_t codes) {
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2;"
      " cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(halves[0]), "=r"(halves[1])
      : "r"(codes));
}

// Four at once, the first argument in the lowest byte; on architectures without the instruction bit
// by bit. Saturates at ±448.
__device__ __forceinline__ uint32_t cvt_e4m3x4_f32(float x0, float x1, float x2, float x3) {
#if __CUDA_ARCH__ >= 890
  return cvt_e4m3x2_f32(x0, x1) | static_cast<uint32_t>(cvt_e4m3x2_f32(x2, x3)) << 16;
#else
  return e4m3_code(x0) | static_cast<uint32_t>(e4m3_code(x1)) << 8 |
         static_cast<uint32_t>(e4m3_code(x2)) << 16 | static_cast<uint32_t>(e4m3_code(x3)) << 24;
#endif
}

// Four rounded to integers as signed bytes, the first argument in the lowest. Saturates at -128 and 127; NaN becomes 0.
__device__ __forceinline__ uint32_t cvt_s8x4_f32(float x0, float x1, float x2, float x3) {
  uint32_t r;
  asm("{ .reg .s32 a, b, c, d; .reg .b32 upper;"
      " cvt.rni.s32.f32 a, %1; cvt.rni.s32.f32 b, %2; cvt.rni.s32.f32 c, %3; cvt.rni.s32.f32 d, %4;"
      " cvt.pack.sat.s8.s32.b32 upper, d, c, 0; cvt.pack.sat.s8.s32.b32 %0, b, a, upper; }"
      : "=r"(r)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return r;
}

}  // namespace sage::ptx
