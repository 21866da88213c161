// A warp's 16 rows of a wgmma accumulator to memory by the copy engine: outputs of 16 bits of heads that are as wide as
// padded, through a region of the warp's own in shared memory. Others: store_rows.cuh.
#pragma once

#include "common/tensor_map.h"
#include "common/tile.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"
#include "ptx/shared.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/forward_sums.cuh"

namespace sage::sm90 {

inline constexpr int kOutTileColumns = 64;  // channels: 128 bytes, the width of the swizzle
inline constexpr int kOutTileBytes = 16 * kOutTileColumns * 2;  // of which a row of kHeadDim channels takes several

// Whether outputs can leave like that.
inline bool leaves_in_tiles(Dtype dtype, const AttentionShape& shape) {
  return dtype != Dtype::kF32 && shape.head_dim == shape.padded_dim;
}

// Null, or why there is no map of `out`, [batch][length][heads · head_dim].
inline const char* encode_output_map(CUtensorMap& map, const void* out, const AttentionShape& s, int length, int heads) {
  return encode_tensor_map(
      map, {out, 2, static_cast<int64_t>(heads) * s.head_dim, length, s.batch, kOutTileColumns, 16});
}

// Until the copy engine has read what this warp has sent before, so that the region may be written again, or the block end.
__device__ __forceinline__ void wait_for_sent_tiles() {
  if (ptx::elect_one()) ptx::cp_async_bulk_wait_read();
  __syncwarp();
}

//   region       16 · kHeadDim · 2 bytes at a multiple of 1024
//   outputs      outputs(n): a thread's FourOutputs of channels 8n to 8n + 7
template <int kHeadDim, bool kBf16, class Outputs>
__device__ __forceinline__ void write_tiles(unsigned char* region, const Outputs& outputs) {
  using Tile = SharedTile<16, 2 * kOutTileColumns>;
  const int lane = ptx::opaque_thread() % kWarpSize;
  const uint32_t base = ptx::shared_address(region);  // at a multiple of 1024
  const auto pack = [](float2 x) { return kBf16 ? ptx::cvt_bf16x2_f32(x.x, x.y) : ptx::cvt_f16x2_f32(x.x, x.y); };
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; n += 2) {
    const FourOutputs x = outputs(n), y = outputs(n + 1);
    const int tile = n / Tile::kChunks, chunk = n % Tile::kChunks;
    ptx::stmatrix_x4(Tile::address(base + tile * kOutTileBytes, 0, chunk, lane % 16, lane / 16), pack(x.upper),
                     pack(x.lower), pack(y.upper), pack(y.lower));
  }
}

// Clears the thread's share of row g (r = 0) or g + 8.
template <int kHeadDim>
__device__ __forceinline__ void clear_tile_row(unsigned char* region, int r) {
  using Tile = SharedTile<16, 2 * kOutTileColumns>;
  const int lane = ptx::opaque_thread() % kWarpSize;
#pragma unroll 1
  for (int i = lane % 4; i < kHeadDim / 8; i += 4) {
    *reinterpret_cast<uint4*>(region + i / Tile::kChunks * kOutTileBytes +
                              Tile::offset(lane / 4 + 8 * r, i % Tile::kChunks)) = make_uint4(0, 0, 0, 0);
  }
}

// Sends them to row `row` of batch entry `batch`; `column` is the head's first. Rows from the end of the tensor on are not
// written. All lanes of the warp take part.
template <int kHeadDim>
__device__ __forceinline__ void send_tiles(const CUtensorMap& map, const unsigned char* region, int column, int row,
                                           int batch) {
  ptx::fence_proxy_async_shared();
  __syncwarp();
  if (!ptx::elect_one()) return;
#pragma unroll
  for (int tile = 0; tile < kHeadDim / kOutTileColumns; ++tile) {
    ptx::cp_async_bulk_tensor_3d_store(&map, ptx::shared_address(region) + tile * kOutTileBytes,
                                       column + tile * kOutTileColumns, row, batch);
  }
  ptx::cp_async_bulk_commit();
}

}  // namespace sage::sm90
