// Host version of cuda/ptx/cvt.cuh.
#pragma once

#include <cmath>
#include <cstdint>

#include "numerics/bf16.h"
#include "numerics/e4m3.h"
#include "numerics/f16.h"

namespace sage::ptx {

inline uint32_t cvt_f16x2_f32(float low, float high) {
  return f16_bits(low) | static_cast<uint32_t>(f16_bits(high)) << 16;
}

inline uint32_t cvt_bf16x2_f32(float low, float high) {
  return bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16;
}

inline void cvt_f32_f16x2(float& low, float& high, uint32_t pair) {
  low = f16_value(static_cast<uint16_t>(pair));
  high = f16_value(static_cast<uint16_t>(pair >> 16));
}

inline uint16_t cvt_e4m3x2_f32(float low, float high) {
  return static_cast<uint16_t>(e4m3_code(low) | e4m3_code(high) << 8);
}

inline uint16_t cvt_e4m3x2_f16x2(uint32_t pair) {
  return cvt_e4m3x2_f32(f16_value(static_cast<uint16_t>(pair)),
                        f16_value(static_cast<uint16_t>(pair >> 16)));
}

inline uint32_t cvt_f16x2_e4m3x2(uint16_t pair) {
  return cvt_f16x2_f32(e4m3_value(static_cast<uint8_t>(pair)),
                       e4m3_value(static_cast<uint8_t>(pair >> 8)));
}

inline void cvt_f16x4_e4m3x4(uint32_t (&halves)[2], uint32_t codes) {
  halves[0] = cvt_f16x2_e4m3x2(static_cast<uint16_t>(codes));
  halves[1] = cvt_f16x2_e4m3x2(static_cast<uint16_t>(codes >> 16));
}

inline uint32_t cvt_e4m3x4_f32(float x0, float x1, float x2, float x3) {
  return cvt_e4m3x2_f32(x0, x1) | static_cast<uint32_t>(cvt_e4m3x2_f32(x2, x3)) << 16;
}

inline uint32_t cvt_s8x4_f32(float x0, float x1, float x2, float x3) {
  const auto byte = [](float x) {
    const float rounded = std::isnan(x) ? 0.0f : std::fmin(std::fmax(std::nearbyint(x), -128.0f), 127.0f);
    return static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>(rounded)));
  };
  return byte(x0) | byte(x1) << 8 | byte(x2) << 16 | byte(x3) << 24;
}

}  // namespace sage::ptx
