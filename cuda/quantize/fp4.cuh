// NVFP4 blocks of 16 numbers in the registers of a thread, or of two neighbours (docs/nvfp4.md, "Formats").
#pragma once

#include "numerics/e2m1.h"
#include "quantize/rows.cuh"

namespace sage {

// Σ by halves: the upper half is added to the lower, again and again.
template <int kCount>
__device__ __forceinline__ float sum_by_halves(const float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    float y[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) y[i] = x[i] + x[i + kCount / 2];
    return sum_by_halves(y);
  }
}

__device__ __forceinline__ uint32_t e2m1_codes(const float (&x)[kChannels], float inverse) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) word |= e2m1_code(__fmul_rn(x[i], inverse)) << (4 * i);
  return word;
}

// A block's two candidates: scaled to 6 or to 4 (docs/nvfp4.md, "Four or six").
struct Candidates {
  GroupScale six, four;
  __device__ __forceinline__ explicit Candidates(float largest)
      : six(block_scale(largest, kSixth)), four(block_scale(largest, kQuarter)) {}
};

// The scale of 16 channels that this lane and its neighbour, lane ^ 1, hold: the lower lane the lower eight.
__device__ __forceinline__ float pair_error(const float (&x)[kChannels], const GroupScale& s) {
  float squares[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    squares[i] = squared_error(x[i], s);
    squares[i] += __shfl_xor_sync(kFullWarp, squares[i], 1);
  }
  return sum_by_halves(squares);
}
__device__ __forceinline__ GroupScale pair_scale(const float (&x)[kChannels], bool four_or_six) {
  const Candidates scale(lanes_max<2>(largest_magnitude(x)));
  if (!four_or_six) return scale.six;
  return pair_error(x, scale.four) < pair_error(x, scale.six) ? scale.four : scale.six;
}

// The scale of 16 numbers of one thread, in two halves.
__device__ __forceinline__ float own_error(const float (&x)[2][kChannels], const GroupScale& s) {
  float squares[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    squares[i] = squared_error(x[0][i], s) + squared_error(x[1][i], s);
  }
  return sum_by_halves(squares);
}
__device__ __forceinline__ GroupScale own_scale(const float (&x)[2][kChannels], bool four_or_six) {
  const Candidates scale(fmaxf(largest_magnitude(x[0]), largest_magnitude(x[1])));
  if (!four_or_six) return scale.six;
  return own_error(x, scale.four) < own_error(x, scale.six) ? scale.four : scale.six;
}

// Writes eight channels' codes and, from the lower of two neighbours, their common scale. `element` is the
// first channel's place in an array of tokens times Hp channels. All lanes take part in pair_scale before.
__device__ __forceinline__ void store_channels(uint8_t* codes, uint8_t* scales, int64_t element,
                                               const float (&x)[kChannels], const GroupScale& scale,
                                               bool bad) {
  *reinterpret_cast<uint32_t*>(codes + element / 2) = e2m1_codes(x, scale.inverse);
  if (element % kFp4Block == 0) {
    scales[element / kFp4Block] = bad ? kNanScale : e4m3_code(scale.scale);
  }
}

}  // namespace sage
