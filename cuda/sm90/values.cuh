// The product P·V on sm_90, whose warp-level e4m3 products are f16 products in disguise (ptxas
// converts every operand, and the sums carry full float32): convert once, accumulate in place.
#pragma once

#include "sm80/values.cuh"

namespace sage::sm90 {

struct HardwareConversions {
  static constexpr float kValueScale = 1.0f;

  static __device__ __forceinline__ uint32_t round(float low, float high) {
    return ptx::cvt_f16x2_e4m3x2(ptx::cvt_e4m3x2_f32(low, high));
  }

  static __device__ __forceinline__ void widen(uint32_t (&b)[2], uint32_t codes) {
    ptx::cvt_f16x4_e4m3x4(b, codes);
  }
};

using E4m3 = sm80::E4m3ThroughHalf<false, HardwareConversions>;
using E4m3F16Accumulate = sm80::E4m3ThroughHalf<true, HardwareConversions>;

}  // namespace sage::sm90
