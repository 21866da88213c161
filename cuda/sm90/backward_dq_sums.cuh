// dQ beside dK and dV: the codes of G, which leave the accumulators keys by queries, become an operand in shared memory,
// queries by keys; the product with a block's keys is added to the queries' sums in memory, in 16 bits
// (docs/kernels/sm90_backward.md).
//
// The sums lie where dQ will lie, [B, T, N, H] of f16, times a power of two (`sum_factor`). finish_dq makes dQ of them.
#pragma once

#include "common/scale.cuh"
#include "common/tile.cuh"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/backward_common.cuh"

namespace sage::sm90 {

// What keeps sums finite in 16 bits. Σ|g| of a row is at most 256·√H·l, for |dP − D| is at most r·√H, l at most the number
// of keys, and codes of z at most 448: with 128 channels and codes of g rounded up by 1/16, 2^20.4 a key.
SAGE_HOST_DEVICE float sum_factor(int keys) {
  float factor = 0x1p-5f;
  for (int64_t most = 1; most < keys; most *= 2) factor *= 0.5f;
  return factor;
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

// A warp's 16 rows of sums, of 64 channels, to `staged`, 2 KiB of its own at a multiple of 1024.
__device__ __forceinline__ void stage_sums(const float (&sums)[32], unsigned char* staged, float factor) {
  write_tiles<64, false>(staged, [&](int n) {
    return FourOutputs{{sums[4 * n] * factor, sums[4 * n + 1] * factor},
                       {sums[4 * n + 2] * factor, sums[4 * n + 3] * factor}};
  });
}

// ------------------------------------------------------------------------------------------------- dQ

inline constexpr int kFinishThreads = 256;

// dQ from its sums, in place: eight channels of a row a thread.
template <int kHeadDim>
__global__ void __launch_bounds__(kFinishThreads) finish_dq(const BackwardCall p) {
  constexpr int kPieces = kHeadDim / 8;
  const AttentionShape& s = p.shape;
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  const int64_t row = piece / kPieces;  // of [B, T, N]
  if (row >= static_cast<int64_t>(s.batch) * s.queries * s.heads) return;
  const int n = static_cast<int>(row % s.heads);
  const int64_t token = row / s.heads;
  const int b = static_cast<int>(token / s.queries), query = static_cast<int>(token % s.queries);
  const int64_t plane = static_cast<int64_t>(b) * s.heads + n;
  const int64_t channel = (static_cast<int64_t>(b) * s.kv_heads + n / (s.heads / s.kv_heads)) * kHeadDim +
                          8 * (static_cast<int>(threadIdx.x) % kPieces);
  uint4* const at = reinterpret_cast<uint4*>(p.dq) + piece;
  const uint4 sums = *at;
  const float factor = p.w.row_factor[plane * tiles_of(s.queries) * kTileQueries + query] / sum_factor(s.keys);
  const float dlse = p.l[plane * s.queries + query] != 0.0f ? p.dlse[plane * s.queries + query] * p.scale : 0.0f;
  uint32_t x[4] = {sums.x, sums.y, sums.z, sums.w};
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
