// From scores to probabilities in FP4 (docs/nvfp4.md; SageAttention3, arXiv 2505.11594, sections 3.3 and 3.4).
#pragma once

#include "common/mask.cuh"
#include "common/tile.cuh"
#include "ptx/cvt.cuh"
#include "ptx/cvt_fp4.cuh"
#include "ptx/math.cuh"

namespace sage::sm120 {

inline constexpr float kTopLog2 = 11.392317422778762f;  // log2(448·6): P is in units of 1/2688
inline constexpr float kSixLog2 = 2.584962500721156f;
inline constexpr float kSmallestScale = 0x1p-9f;  // of e4m3
// Below every score, and finite, so that no difference of maxima is NaN.
inline constexpr float kNoMaximum = -3.402823466e38f;

// A warp's 16 × 64 scores: lane 4g + t has of row g in s[n][0..1], and of row g + 8 in s[n][2..3], the keys
// 32·(n/4) + 8t + 2·(n%4) + {0, 1}: eight in a row for every four n.
inline constexpr int kKeyGroups = kTileKeys / 8;

__device__ __forceinline__ int key_of(int n, int c) {
  return n / 4 * 32 + static_cast<int>(threadIdx.x) % 4 * 8 + n % 4 * 2 + (c & 1);
}

// Replaces the scores that do not count by -inf. `query` is the row of s[.][0..1], `key` the tile's first.
__device__ __forceinline__ void hide(float (&s)[kKeyGroups][4], const Mask& mask, int query, int key) {
  uint32_t seen = 0;  // bit 4n + c for s[n][c]
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    const int n = bit / 4, c = bit % 4;
    seen = seen << 1 | (mask.visible(query + (c >> 1) * 8, key + key_of(n, c)) ? 1u : 0u);
  }
#pragma unroll
  for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[n][c] = seen >> (4 * n + c) & 1u ? s[n][c] : -INFINITY;
  }
}

// The largest score of each block of 16 keys, which this lane shares with lane ^ 1: top[r][u] for row g + 8r and
// keys 32u + 16·(t/2) ... NaN scores do not count.
__device__ __forceinline__ void block_maxima(const float (&s)[kKeyGroups][4], float (&top)[2][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      float x = fmaxf(s[4 * u][2 * r], s[4 * u][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < 4; ++n) x = fmaxf(fmaxf(x, s[4 * u + n][2 * r]), s[4 * u + n][2 * r + 1]);
      top[r][u] = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
    }
  }
}

// P as an A operand with its scales; adds the lane's share of each row's sum to l. In units of 1/2688 of the
// row's largest probability so far, 2^(s·multiplier − m) is at most 2688. A block's scale is its largest number
// over 6, rounded; dividing by it costs one logarithm a block, which goes into the exponent of every number,
// and the sum takes it back.
__device__ __forceinline__ void probabilities(const float (&s)[kKeyGroups][4], const float (&top)[2][2],
                                              float multiplier, const float (&m)[2],
                                              uint32_t (&p)[4], uint32_t& scales, float (&l)[2]) {
  float shift[2], wanted[4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shift[r] = kTopLog2 - m[r];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      wanted[2 * r + u] = ptx::ex2(fmaf(top[r][u], multiplier, shift[r] - kSixLog2));
    }
  }
  const uint32_t mine = ptx::cvt_e4m3x4_f32(wanted[0], wanted[1], wanted[2], wanted[3]);
  float rounded[4];
  ptx::cvt_f32_e4m3x4(rounded, mine);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      // A scale that rounds to 0 makes products of 0, whatever the codes; the sum wants a number.
      const float scale = fmaxf(rounded[2 * r + u], kSmallestScale);
      const float start = shift[r] - ptx::lg2(scale);
      float e[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        e[i] = ptx::ex2(fmaf(s[4 * u + i / 2][2 * r + i % 2], multiplier, start));
      }
      const float total = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
      l[r] = fmaf(total, scale, l[r]);
      p[2 * u + r] = ptx::cvt_e2m1x8_f32(e);
    }
  }
  // Lanes 0 and 2 of four have the four blocks of row g between them, so have lanes 1 and 3 of row g + 8.
  const uint32_t other = __shfl_xor_sync(kFullWarp, mine, 2);
  scales = ptx::prmt(mine, other, threadIdx.x % 2 == 0 ? 0x5140 : 0x7362);
}

}  // namespace sage::sm120
