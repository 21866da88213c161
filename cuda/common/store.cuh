// Results to memory in the caller's dtype.
#pragma once

#include "common/params.h"
#include "ptx/cvt.cuh"

namespace sage {

__device__ __forceinline__ void store_one(void* out, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::kF32) {
    static_cast<float*>(out)[at] = x;
  } else {
    const uint32_t bits =
        dtype == Dtype::kBf16 ? ptx::cvt_bf16x2_f32(x, 0.0f) : ptx::cvt_f16x2_f32(x, 0.0f);
    static_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(bits);
  }
}

// Two neighbouring outputs; `at` is even where `paired`, so that one aligned store serves both.
__device__ __forceinline__ void store_two(void* out, Dtype dtype, int64_t at, float x, float y) {
  if (dtype == Dtype::kF32) {
    *reinterpret_cast<float2*>(static_cast<float*>(out) + at) = make_float2(x, y);
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + at) =
        dtype == Dtype::kBf16 ? ptx::cvt_bf16x2_f32(x, y) : ptx::cvt_f16x2_f32(x, y);
  }
}

// Channels `channel` and `channel` + 1, an even number of them before, of a row of `channels` that begins at `row`.
__device__ __forceinline__ void store_channels(void* out, Dtype dtype, int64_t row, int channel,
                                               int channels, float x, float y) {
  if (channels % 2 == 0) {
    if (channel < channels) store_two(out, dtype, row + channel, x, y);
  } else {
    if (channel < channels) store_one(out, dtype, row + channel, x);
    if (channel + 1 < channels) store_one(out, dtype, row + channel + 1, y);
  }
}

// Up to `count` of eight neighbouring outputs; `aligned` if `at` is a multiple of 8.
__device__ __forceinline__ void store_eight(void* out, Dtype dtype, int64_t at, float4 low,
                                            float4 high, int count, bool aligned) {
  if (count < 8 || !aligned) {
    const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) store_one(out, dtype, at + i, x[i]);
    }
  } else if (dtype == Dtype::kF32) {
    auto* const to = reinterpret_cast<float4*>(static_cast<float*>(out) + at);
    to[0] = low;
    to[1] = high;
  } else {
    const bool bf16 = dtype == Dtype::kBf16;
    const auto pair = [bf16](float x, float y) {
      return bf16 ? ptx::cvt_bf16x2_f32(x, y) : ptx::cvt_f16x2_f32(x, y);
    };
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + at) =
        make_uint4(pair(low.x, low.y), pair(low.z, low.w), pair(high.x, high.y),
                   pair(high.z, high.w));
  }
}

}  // namespace sage
