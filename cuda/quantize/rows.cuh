// What the quantisers share: a block of 2·Hp threads holds 8 channels of several tokens per thread,
// read with 16-byte accesses where head dimension and alignment allow.
#pragma once

#include <cuda_runtime.h>

#include "common/params.h"
#include "common/tile.cuh"
#include "numerics/bf16.h"
#include "numerics/f16.h"
#include "numerics/int8.h"

namespace sage {

inline constexpr int kChannels = 8;  // channels a thread holds of one token

// A block's threads: Hp/8 neighbouring threads share a token, 16 tokens at a time.
template <int kHeadDim>
struct RowBlock {
  static constexpr int kThreads = 2 * kHeadDim;
  static constexpr int kThreadsPerToken = kHeadDim / kChannels;  // 8, 16 or 32: never over a warp
  static constexpr int kTokensAtOnce = kThreads / kThreadsPerToken;
  static_assert(kTokensAtOnce == 16, "quantize_kv.cu and quantize_q.cu map 16 rows to tokens");

  static __device__ int row() { return static_cast<int>(threadIdx.x) / kThreadsPerToken; }
  static __device__ int channel() {
    return static_cast<int>(threadIdx.x) % kThreadsPerToken * kChannels;
  }
};

__device__ __forceinline__ float load_element(const void* x, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kF32) return static_cast<const float*>(x)[at];
  const uint16_t bits = static_cast<const uint16_t*>(x)[at];
  return dtype == Dtype::kBf16 ? bf16_value(bits) : f16_value(bits);
}

// Channels [channel, channel + 8) of the row that starts at element `row`; zero from `head_dim` on.
__device__ __forceinline__ void load_channels(float (&x)[kChannels], const void* tensor,
                                              Dtype dtype, int64_t row, int channel, int head_dim) {
  const int64_t at = row + channel;
  if (head_dim % kChannels != 0) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      x[i] = channel + i < head_dim ? load_element(tensor, dtype, at + i) : 0.0f;
    }
  } else if (channel >= head_dim) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = 0.0f;
  } else if (dtype == Dtype::kF32) {
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(tensor) + at);
    const float4 low = from[0], high = from[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor) + at);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const auto bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      x[i] = dtype == Dtype::kBf16 ? bf16_value(bits) : f16_value(bits);
    }
  }
}

__device__ __forceinline__ bool all_finite(const float (&x)[kChannels]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) finite = finite && is_finite(x[i]);
  return finite;
}

__device__ __forceinline__ float largest_magnitude(const float (&x)[kChannels]) {
  float a = 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) a = fmaxf(a, fabsf(x[i]));
  return a;
}

// Whether `condition` holds for all threads of this thread's token; every lane takes part.
template <int kThreadsPerToken>
__device__ __forceinline__ bool whole_token(bool condition) {
  const unsigned failing = __ballot_sync(kFullWarp, !condition);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const unsigned mine = kThreadsPerToken == 32 ? kFullWarp : (1u << kThreadsPerToken) - 1u;
  return (failing >> (lane / kThreadsPerToken * kThreadsPerToken) & mine) == 0;
}

// Maximum over `kLanes` neighbouring lanes.
template <int kLanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  }
  return x;
}

// Maximum over the block. `scratch` holds a float a warp; it may be reused after the next barrier.
template <int kThreads>
__device__ __forceinline__ float block_max(float x, float* scratch) {
  x = lanes_max<kWarpSize>(x);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int i = 1; i < kThreads / kWarpSize; ++i) x = fmaxf(x, scratch[i]);
  return x;
}

// Eight INT8 codes as two words, lowest channel first.
__device__ __forceinline__ uint2 int8_codes(const float (&x)[kChannels], float inverse) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const auto code = static_cast<uint8_t>(int8_code(x[i], inverse));
    words[i / 4] |= static_cast<uint32_t>(code) << (8 * (i % 4));
  }
  return make_uint2(words[0], words[1]);
}

}  // namespace sage
