// e2m1 and NVFP4 blocks (docs/nvfp4.md, "Formats"): 0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives, in
// blocks of 16 that share an e4m3 scale. Every operation rounds once: compile without --use_fast_math.
#pragma once

#include "numerics/e4m3.h"
#include "numerics/int8.h"

namespace sage {

inline constexpr int kFp4Block = 16;            // numbers that share a scale
inline constexpr uint8_t kNanScale = 0x7f;      // of a token with a NaN or Inf
inline constexpr float kSixth = 1.0f / 6.0f, kQuarter = 1.0f / 4.0f;

// |x| rounded to e2m1, still as float: nearest, ties to an even code, saturating at 6. Adding and taking
// away 1.5·2^(e+22) leaves one bit after the leading one of x in [2^e, 2^(e+1)); below 1 the grid stays 1/2.
SAGE_HOST_DEVICE float round_e2m1(float x) {
  x = fminf(fabsf(x), 6.0f);
  uint32_t exponent = float_bits(x) & 0x7f800000u;
  exponent = exponent < float_bits(1.0f) ? float_bits(1.0f) : exponent;
  const float magic = bits_float(exponent + (22u << 23) + 0x00400000u);
  return (x + magic) - magic;
}

// The four bits of x. Negative numbers that round to zero keep their sign.
SAGE_HOST_DEVICE uint32_t e2m1_code(float x) {
  const float rounded = round_e2m1(x);
  const uint32_t code = rounded < 1.0f ? static_cast<uint32_t>(rounded * 2.0f)
                                       : (float_bits(rounded) >> 22) - 252u;
  return code | (float_bits(x) >> 28 & 8u);
}

SAGE_HOST_DEVICE float e2m1_value(uint32_t code) {
  const uint32_t magnitude = code & 7u;
  const float value = magnitude < 2u ? static_cast<float>(magnitude) * 0.5f
                                     : bits_float((magnitude + 252u) << 22);
  return bits_float(float_bits(value) | (code & 8u) << 28);
}

// A block of queries counts as at least this fraction of their mean, whose product with K′ has the same unit.
inline constexpr float kMeanFloor = 0x1p-12f;

// A tensor's scale 2^e, such that amax · 2^-e lies in [512, 1024), and its inverse.
SAGE_HOST_DEVICE GroupScale tensor_scale(float amax) {
  if (amax < kTinyAmax) return {0.0f, 0.0f};
  const int exponent = static_cast<int>(float_bits(amax) >> 23) - 127 - 9;
  return {power_of_two(exponent), power_of_two(-exponent)};
}

// 1/scale of a normal power of two, 0 for 0.
SAGE_HOST_DEVICE float inverse_power(float scale) {
  return scale == 0.0f ? 0.0f : bits_float((254u << 23) - float_bits(scale));
}

// e4m3(amax · fraction), and what elements are multiplied by.
SAGE_HOST_DEVICE GroupScale block_scale(float amax, float fraction) {
  const float scale = round_e4m3(amax * fraction);
  return {scale, scale == 0.0f ? 0.0f : 1.0f / scale};
}

// The square of what rounding x costs, the difference rounded to 12 bits so that its square is exact.
SAGE_HOST_DEVICE float squared_error(float x, const GroupScale& block) {
  const float rounded = round_e2m1(x * block.inverse) * block.scale;  // exact, and so fused or not
  const float difference = fabsf(rounded - fabsf(x));
  uint32_t exponent = float_bits(difference) & 0x7f800000u;
  exponent = exponent < (1u << 23) ? 1u << 23 : exponent;
  const float magic = bits_float(exponent + (12u << 23) + 0x00400000u);
  const float short_one = (difference + magic) - magic;
  return short_one * short_one;
}

}  // namespace sage
