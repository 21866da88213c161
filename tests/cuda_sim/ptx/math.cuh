// Host version of cuda/ptx/math.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "numerics/bf16.h"
#include "numerics/f16.h"

namespace sage::ptx {

inline float ex2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // .ftz; NaN passes
}

inline float lg2(float x) { return std::log2(x); }

inline float fma_sat(float a, float b, float c) { return std::fmin(std::fmax(std::fma(a, b, c), 0.0f), 1.0f); }  // NaN: 0

inline uint32_t fma_ftz_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto flushed = [](float x) { return std::fabs(x) < 0x1p-14f ? 0.0f : x; };
  uint32_t r = 0;
  for (int half = 0; half < 32; half += 16) {
    const auto value = [&](uint32_t x) { return flushed(f16_value(static_cast<uint16_t>(x >> half))); };
    r |= static_cast<uint32_t>(f16_bits(flushed(std::fma(value(a), value(b), value(c))))) << half;
  }
  return r;
}

template <class Value, class Pick>
uint32_t pick_halves(uint32_t a, uint32_t b, Value value, Pick first) {
  return ::pick_halves<uint16_t>(a, b, [&](uint16_t x, uint16_t y) {
    return std::isnan(value(y)) || first(value(x), value(y)) ? x : y;
  });
}
inline bool larger(float x, float y) { return x >= y; }
inline bool smaller(float x, float y) { return x <= y; }

inline uint32_t max_bf16x2(uint32_t a, uint32_t b) { return pick_halves(a, b, bf16_value, larger); }
inline uint32_t min_bf16x2(uint32_t a, uint32_t b) { return pick_halves(a, b, bf16_value, smaller); }
inline uint32_t max_f16x2(uint32_t a, uint32_t b) { return pick_halves(a, b, f16_value, larger); }
inline uint32_t min_f16x2(uint32_t a, uint32_t b) { return pick_halves(a, b, f16_value, smaller); }

inline uint32_t max_magnitude_bf16x2(uint32_t a, uint32_t b) {
  const uint32_t signs = (a ^ b) & 0x80008000u;  // as the hardware leaves them
  return signs | ::pick_halves<uint16_t>(a & 0x7fff7fffu, b & 0x7fff7fffu,
                                         [](uint16_t x, uint16_t y) { return x > y ? x : y; });
}
inline uint32_t max_magnitude_f16x2(uint32_t a, uint32_t b) { return max_magnitude_bf16x2(a, b); }

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;  // replicate the sign
    r |= byte << (8 * i);
  }
  return r;
}

inline int opaque(int x) { return x; }

inline int opaque_thread() { return static_cast<int>(threadIdx.x); }

inline int opaque_blocks() { return static_cast<int>(gridDim.x); }

inline bool always(int, int) { return true; }

}  // namespace sage::ptx
