// dQ beside dK and dV: the codes of G, which leave the accumulators keys by queries, become an operand in shared memory,
// queries by keys; the product with a block's keys is added to the queries' sums in memory, in 16 bits
// (docs/kernels/sm90_backward.md).
//
// The sums lie where dQ will lie, [B, T, N, H] of f16, each row of channels in the order in which threads hold them
// (`sum_channel`), and times the power of two by a row's `l` (`sum_factor`). finish_dq makes dQ of them.
#pragma once

#include "common/scale.cuh"
#include "common/tile.cuh"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/red.cuh"
#include "ptx/shared.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/backward_common.cuh"

namespace sage::sm90 {

// What keeps a row's sums finite in 16 bits: Σ|g| is at most 256·√H·l, for |dP − D| is at most r·√H, and codes of z are at
// most 448; so with 128 channels and codes rounded up by 1/16 the sums are at most 2^20.4·l. A power of two between
// 2^-5/l and 2^-6/l brings them below 2^15.4.
__device__ __forceinline__ float sum_factor(float l) {
  constexpr int kBias = 127, kShift = 6;
  const int exponent = static_cast<int>(float_bits(l) >> 23 & 0xff);  // of 2^(exponent - 127) <= l
  return bits_float(static_cast<uint32_t>(max(2 * kBias - kShift - exponent, 1)) << 23);
}

// Writes the codes of a warp's 16 keys, one k-group of a tile of G [64 queries][128 keys], each pair of keys g, g + 8 side
// by side: the order in which `z` has them then.
//   tile       address of the tile, of rows of 128 bytes in their swizzle
//   chunk      the warp's among the block's
__device__ __forceinline__ void store_codes(uint32_t tile, int chunk, const uint32_t (&g)[kGradientRegisters]) {
  using Tile = SharedTile<kGradientTile, 128>;
  const int lane = static_cast<int>(ptx::opaque(threadIdx.x)) % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t* const x = g + 4 * half;
    ptx::stmatrix_x4_transposed(tile + Tile::offset(32 * half + lane, chunk), ptx::prmt(x[0], x[1], 0x5140),
                                ptx::prmt(x[0], x[1], 0x7362), ptx::prmt(x[2], x[3], 0x5140),
                                ptx::prmt(x[2], x[3], 0x7362));
  }
}

// sums = G·zᵀ: 64 queries by 64 channels over 128 keys, from tiles of rows of 128 bytes at addresses in 16-byte units.
__device__ __forceinline__ void multiply_queries(float (&sums)[32], uint32_t g, uint32_t z) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma_m64k32_f32_e4m3(sums, ptx::shared_operand<128, 0, 1024>(g + 2 * step),
                               ptx::shared_operand<128, 0, 1024>(z + 2 * step), step > 0);
  }
}

// Adds a thread's sums of rows g and g + 8 to memory.
//   out       the row's first sum of the thread
//   stride    bytes between rows
//   factor    of rows g and g + 8
//   counts    whether these rows exist
__device__ __forceinline__ void add_sums(const float (&sums)[32], unsigned char* out, int64_t stride,
                                         const float (&factor)[2], const bool (&counts)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * j + i) + 2 * r;
        x[i] = ptx::cvt_f16x2_f32(sums[at] * factor[r], sums[at + 1] * factor[r]);
      }
      ptx::add_f16x8_if(out + 8 * r * stride + 64 * j, x, counts[r]);
    }
  }
}

// ------------------------------------------------------------------------------------------------- dQ

inline constexpr int kFinishThreads = 256;

// dQ from its sums, in place: a quad has 32 channels of a row, which its lanes hold as they were added up.
template <int kHeadDim>
__global__ void __launch_bounds__(kFinishThreads) finish_dq(const BackwardCall p) {
  constexpr int kQuads = kHeadDim / 32;
  const AttentionShape& s = p.shape;
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int t = static_cast<int>(threadIdx.x) % 4, quad = static_cast<int>(piece / 4 % kQuads);
  const int64_t row = piece / (4 * kQuads);  // of [B, T, N]
  const bool inside = row < static_cast<int64_t>(s.batch) * s.queries * s.heads;
  const int n = static_cast<int>(row % s.heads);
  const int64_t token = row / s.heads;
  const int b = static_cast<int>(token / s.queries), query = static_cast<int>(token % s.queries);
  const int64_t kv_plane = static_cast<int64_t>(b) * s.kv_heads + n / (s.heads / s.kv_heads);
  const int64_t plane = static_cast<int64_t>(b) * s.heads + n;
  uint4* const at = reinterpret_cast<uint4*>(p.dq) + piece;
  uint32_t x[4] = {};
  float factor = 0.0f, dlse = 0.0f;
  if (inside) {
    const uint4 sums = *at;
    x[0] = sums.x, x[1] = sums.y, x[2] = sums.z, x[3] = sums.w;
    const float l = p.l[plane * s.queries + query];
    factor = p.w.row_factor[plane * tiles_of(s.queries) * kTileQueries + query] / sum_factor(l);
    dlse = l != 0.0f ? p.dlse[plane * s.queries + query] * p.scale : 0.0f;
  }
  // Word i of lane t holds channels 8i + 2t and the next; lane i is to have the words of that i, by t.
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = t & bit;
      const uint32_t sent = upper ? x[i] : x[i | bit];
      const uint32_t got = __shfl_xor_sync(kFullWarp, sent, bit);
      (upper ? x[i] : x[i | bit]) = got;
    }
  }
  if (!inside) return;
  const int64_t channel = kv_plane * kHeadDim + 32 * quad + 8 * t;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float y[2];
    ptx::cvt_f32_f16x2(y[0], y[1], x[i]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      y[c] *= factor * channel_scale(p.w.z_max, channel + 2 * i + c);
      if (dlse != 0.0f) y[c] = fmaf(dlse, p.k_mean[channel + 2 * i + c], y[c]);
    }
    x[i] = p.dq_dtype == Dtype::kBf16 ? ptx::cvt_bf16x2_f32(y[0], y[1]) : ptx::cvt_f16x2_f32(y[0], y[1]);
  }
  *at = make_uint4(x[0], x[1], x[2], x[3]);
}

}  // namespace sage::sm90
