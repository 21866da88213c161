// Host version of cuda/ptx/cvt_fp4.cuh.
#pragma once

#include "numerics/e2m1.h"

namespace sage::ptx {

inline uint32_t cvt_e2m1x8_f32(const float (&x)[8]) {
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i) r |= e2m1_code(x[i]) << (4 * i);
  return r;
}

inline void cvt_f32_e4m3x4(float (&x)[4], uint32_t codes) {
  for (int i = 0; i < 4; ++i) x[i] = e4m3_value(static_cast<uint8_t>(codes >> (8 * i)));
}

}  // namespace sage::ptx
