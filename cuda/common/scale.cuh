// From INT8 products to scores in the log2 domain (docs/abi.md, section 3):
//   s_ij = (Σ q8·k8) · (q_scale_i · c·log2 e · |k_scale_j|).
// Accumulators start at the bits of 1.5·2^23. Added to them, an integer of magnitude below 2^22 (a
// sum over 256 channels is below 4129024) makes the bits of the float 1.5·2^23 + integer: one exact
// subtraction instead of a conversion, and integer comparisons keep their order.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace sage {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kMagic = 12582912.0f;   // 1.5·2^23
inline constexpr int kMagicBits = 0x4b400000;  // its bits
inline constexpr int kNoScore = -0x00800000;   // the bits of -inf: below every accumulator
inline constexpr int8_t kBadCode = -128;       // first code of a key with a NaN or Inf

__device__ __forceinline__ float accumulated(int bits) { return __int_as_float(bits) - kMagic; }

// The multiplier of a row's scores in one tile of keys: at least the smallest normal float, so that
// -inf, the score of a key that does not count, stays -inf in zero groups too. A query that is not
// finite has a NaN scale and zero codes: its multiplier becomes that float, and its results become
// NaN at the end.
__device__ __forceinline__ float score_multiplier(float row_scale, float key_scale) {
  return fmaxf(row_scale * key_scale, 0x1p-126f);
}

}  // namespace sage
