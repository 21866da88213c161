// The product P·V on native e4m3 matrix instructions, sm_89 and later. See sm80/values.cuh for what
// a Values struct is.
#pragma once

#include "sm80/values.cuh"

namespace sage::sm89 {

template <bool kHalfAccumulators>
struct NativeE4m3 : sm80::TransposedValues {
  static constexpr PvFormat kFormat = PvFormat::kE4m3;
  static constexpr bool kF16Accumulate = kHalfAccumulators;
  static constexpr bool kTileMaximum = false;
  static constexpr int kMaxChannels = kHalfAccumulators ? 128 : 256;
  static constexpr bool kTwoRowTiles = false;
  static constexpr float kExponentBias = 8.0f;    // E·256
  static constexpr float kRowSumScale = 0x1p-8f;  // what undoes it in l
  static constexpr float kOutputScale = 0x1p-8f;
  using Probabilities = sm80::Probabilities8;

  static __device__ __forceinline__ void pack(Probabilities& p, const float (&e)[kKeyGroups][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = i / 4 * 4 + i % 4 / 2 * 2, c = i % 2 * 2;
      const uint32_t low = ptx::cvt_e4m3x2_f32(e[n][c], e[n][c + 1]);
      const uint32_t high = ptx::cvt_e4m3x2_f32(e[n + 1][c], e[n + 1][c + 1]);
      p.a[i / 4][i % 4] = low | high << 16;
    }
  }

  // Each tile of 64 keys gets fresh accumulators: the hardware's sums keep about 14 bits, float32
  // holds what has been collected before.
  template <int kChannels, int kRowTiles>
  static __device__ __forceinline__ void multiply(float (&o)[kRowTiles][kChannels / 8][4],
                                                  const Probabilities (&p)[kRowTiles],
                                                  const float (&)[kRowTiles][2], uint32_t tile) {
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      if (n % 8 == 0)
        __syncwarp();  // a stop for ptxas, which would load ahead until registers spill
      uint32_t b[4];
      Tile<kChannels>::load_b8(b, tile, 8 * n, 0);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if constexpr (kHalfAccumulators) {
          uint32_t half[2] = {0, 0};
          ptx::mma_m16n8k32_f16_e4m3(half, p[r].a[0], {b[0], b[1]}, half);
          ptx::mma_m16n8k32_f16_e4m3(half, p[r].a[1], {b[2], b[3]}, half);
          ptx::cvt_f32_f16x2(sum[0], sum[1], half[0]);
          ptx::cvt_f32_f16x2(sum[2], sum[3], half[1]);
        } else {
          ptx::mma_m16n8k32_f32_e4m3(sum, p[r].a[0], {b[0], b[1]}, sum);
          ptx::mma_m16n8k32_f32_e4m3(sum, p[r].a[1], {b[2], b[3]}, sum);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) o[r][n][c] += sum[c];
      }
    }
  }
};

using E4m3 = NativeE4m3<false>;
using E4m3F16Accumulate = NativeE4m3<true>;

}  // namespace sage::sm89
