// The sums of P·V in the accumulators of a warpgroup: a thread's share of rows g and g + 8 of its warp's 16.
#pragma once

#include <cuda_runtime.h>

#include "common/tile.cuh"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"

namespace sage::sm90 {

// Channels 8n + 2t and 8n + 2t + 1 of both rows.
struct FourOutputs {
  float2 upper, lower;
};

// Those of a wgmma accumulator.
template <int kHeadDim>
struct FromArray {
  const float (&x)[kHeadDim / 2];
  __device__ __forceinline__ FourOutputs operator()(int n) const {
    return {{x[4 * n], x[4 * n + 1]}, {x[4 * n + 2], x[4 * n + 3]}};
  }
};

template <int kHeadDim>
struct FloatSums {
  float d[kHeadDim / 2];

  __device__ __forceinline__ void shrink(const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) d[i] *= by[i >> 1 & 1];
  }
  __device__ __forceinline__ FourOutputs at(int n) const { return FromArray<kHeadDim>{d}(n); }
};

// In 16 bits: half of the registers, and of the traffic with them that ordinary instructions have to wait for. What the
// sums may add up to is bounded by their rows' probabilities (`kMostProbability` in forward_values.cuh).
//
// Long sums, over many tiles, are in units of kLongUnit: those of a million keys of the largest probability and value are finite
// (those of 1.13 million are not), and the spacing below the normal range, kLongUnit · 2^-24, is 2^-18 of a row's largest
// probability. An addition rounds to nearest, which errs by 2^-11 of the sum at most, twice that and the factor's own rounding
// where the reference has changed.
template <int kHeadDim>
struct HalfSums {
  static constexpr float kLongUnit = 0x1p12f;
  uint32_t d[kHeadDim / 4];

  __device__ __forceinline__ void shrink(const float (&by)[2]) {
    const uint32_t pair[2] = {ptx::cvt_f16x2_f32(by[0], by[0]), ptx::cvt_f16x2_f32(by[1], by[1])};
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) d[i] = ptx::mul_f16x2(d[i], pair[i & 1]);
  }
  __device__ __forceinline__ FourOutputs at(int n) const {
    FourOutputs x;
    ptx::cvt_f32_f16x2(x.upper.x, x.upper.y, d[2 * n]);
    ptx::cvt_f32_f16x2(x.lower.x, x.lower.y, d[2 * n + 1]);
    return x;
  }

  // Makes them long ones.
  __device__ __forceinline__ void lengthen() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) d[i] = ptx::mul_f16x2(d[i], kLongInverse);
  }
  // The same, with `sums` added, each row multiplied by `by`. A lane's words of them are 32 · 16 bytes apart.
  __device__ __forceinline__ void add_long(const uint4* sums, const float (&by)[2]) {
    const uint32_t pair[2] = {ptx::cvt_f16x2_f32(by[0], by[0]), ptx::cvt_f16x2_f32(by[1], by[1])};
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      const uint4 old = sums[n * kWarpSize];
      const uint32_t x[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        d[4 * n + i] = ptx::fma_f16x2(d[4 * n + i], kLongInverse, ptx::mul_f16x2(x[i], pair[i & 1]));
      }
    }
  }
  __device__ __forceinline__ void store(uint4* sums) const {
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      sums[n * kWarpSize] = make_uint4(d[4 * n], d[4 * n + 1], d[4 * n + 2], d[4 * n + 3]);
    }
  }

 private:
  static constexpr uint32_t kLongInverse = 0x0c000c00;  // 1 / kLongUnit, twice
};

}  // namespace sage::sm90
