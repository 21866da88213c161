// NVFP4 (docs/nvfp4.md, "Formats"): e2m1 numbers in blocks of 16 that share an e4m3 scale.
#pragma once

#include "numerics.h"

namespace sage::SAGE_ISA {

constexpr int kBlockVectors = kFp4Block / kLanes;
constexpr float kSixth = 1.f / 6.f, kQuarter = 1.f / 4.f;
constexpr uint8_t kNanScale = 0x7f;

// Nearest even, saturating at ±6; zeros lose their sign.
inline F round_e2m1(F x) { return round_to_grid<1, 0>(min(splat(6), max(splat(-6), x))); }

// The four bits of x rounded to e2m1. Negative numbers that round to zero keep their sign.
inline I e2m1_code(F x) {
  F magnitude = absolute(round_e2m1(x));
  I normal = (bits_of(magnitude) >> 22) - (2 * 127 - 2);
  I small = __builtin_convertvector(magnitude * 2.f, I);
  return (magnitude < 1.f ? small : normal) | ((bits_of(x) >> 28) & 8);
}

constexpr float kE2m1[16] = {0,  .5f,  1,  1.5f,  2,  3,  4,  6,
                             0, -.5f, -1, -1.5f, -2, -3, -4, -6};

inline float e4m3_value(uint8_t code) { return from_e4m3(splat_int(code))[0]; }

// A block of queries counts as at least this fraction of their mean, whose product with K′ has the same unit.
constexpr float kMeanFloor = 0x1p-12f;

// A tensor's scale 2^e, such that amax · 2^-e lies in [512, 1024), and its inverse.
struct TensorScale {
  float scale, inverse;
  explicit TensorScale(float amax) {
    bool zero = amax < kTiny;
    int exponent = exponent_of(amax) - 9;
    scale = zero ? 0 : power_of_two(exponent);
    inverse = zero ? 0 : power_of_two(-exponent);
  }
};
inline float inverse_power(float scale) { return scale == 0 ? 0 : 1.f / scale; }

struct BlockScale {  // e4m3(amax · fraction), and what elements are multiplied by
  float scale, inverse;
  BlockScale(float amax, float fraction) {
    scale = round_e4m3(splat(amax * fraction))[0];
    inverse = scale == 0 ? 0 : 1.f / scale;
  }
};

inline float block_amax(const float* x) {
  F top{};
  for (int v = 0; v < kBlockVectors; ++v) top = max(top, absolute(loadf(x + v * kLanes)));
  return largest(top);
}

// Σ (rounded − x)² of a block: differences of 12 bits, added by halves.
inline float squared_error(const float* x, const BlockScale& block) {
  float squares[kFp4Block];
  for (int v = 0; v < kBlockVectors; ++v) {
    F value = loadf(x + v * kLanes);
    F difference = round_to_grid<11, -126>(round_e2m1(value * block.inverse) * block.scale - value);
    store(squares + v * kLanes, difference * difference);
  }
  for (int64_t half = kFp4Block / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) squares[i] += squares[i + half];
  }
  return squares[0];
}

// Codes (8 bytes) and scale of 16 numbers that were divided by their tensor's scale.
inline void encode_block(uint8_t* codes, uint8_t* scale, const float* x, bool four_or_six) {
  float amax = block_amax(x);
  BlockScale block(amax, kSixth);
  if (four_or_six) {
    BlockScale four(amax, kQuarter);
    if (squared_error(x, four) < squared_error(x, block)) block = four;
  }
  int32_t code[kFp4Block];
  for (int v = 0; v < kBlockVectors; ++v) {
    store(code + v * kLanes, e2m1_code(loadf(x + v * kLanes) * block.inverse));
  }
  for (int i = 0; i < kFp4Block / 2; ++i) {
    codes[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
  }
  *scale = static_cast<uint8_t>(e4m3_code(splat(block.scale))[0]);
}

// 16 numbers replaced by what their block holds of them.
inline void round_block(float* x) {
  BlockScale block(block_amax(x), kSixth);
  for (int v = 0; v < kBlockVectors; ++v) {
    F value = round_e2m1(loadf(x + v * kLanes) * block.inverse);
    store(x + v * kLanes, value * block.scale);
  }
}

// `count` numbers, a multiple of 16: codes times scales.
inline void decode_blocks(float* to, const uint8_t* codes, const uint8_t* scale, int64_t count) {
  for (int64_t i = 0; i < count; i += kFp4Block) {
    float factor = e4m3_value(scale[i / kFp4Block]);
    for (int64_t j = i; j < i + kFp4Block; j += 2) {
      to[j] = kE2m1[codes[j / 2] & 15] * factor;
      to[j + 1] = kE2m1[codes[j / 2] >> 4] * factor;
    }
  }
}

}  // namespace sage::SAGE_ISA
