// A warp's 16 rows of a wgmma accumulator to memory.
#pragma once

#include "common/store.cuh"
#include "common/tile.cuh"
#include "ptx/math.cuh"

namespace sage::sm90 {

// Half of the channels at a time through shared memory, so that rows leave in whole 16-byte pieces.
//   region       16 · kHeadDim · 2 bytes of the warp's own, at a multiple of 128
//   x            the accumulators
//   first        element of the first row's first channel, of which `rows` rows exist
//   row_stride   elements from one row to the next
template <int kHeadDim>
__device__ __forceinline__ void store_rows(unsigned char* region, const float (&x)[kHeadDim / 2],
                                           void* out, Dtype dtype, int64_t first, int rows,
                                           int64_t row_stride, int head_dim) {
  constexpr int kColumns = kHeadDim / 2, kPieces = kColumns / 8, kValues = kHeadDim / 4;
  using Stage = SharedTile<16, 4 * kColumns>;
  // Opaque: the compiler would compute all addresses before the kernel's loop, and keep them.
  const int lane = ptx::opaque(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncwarp();  // what lay there has been read
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      unsigned char* const at = region + Stage::offset(g + (i >> 1 & 1) * 8, i / 4 * 2 + t / 2);
      *reinterpret_cast<float2*>(at + t % 2 * 8) =
          make_float2(x[half * kValues + i], x[half * kValues + i + 1]);
    }
    __syncwarp();
    const int channels = head_dim - half * kColumns;  // that exist
#pragma unroll 1
    for (int i = lane; i < 16 * kPieces; i += kWarpSize) {
      const int row = i / kPieces, piece = i % kPieces;
      if (row >= rows || 8 * piece >= channels) continue;
      const auto* const low = reinterpret_cast<const float4*>(region + Stage::offset(row, 2 * piece));
      const auto* const high =
          reinterpret_cast<const float4*>(region + Stage::offset(row, 2 * piece + 1));
      store_eight(out, dtype, first + row * row_stride + half * kColumns + 8 * piece, *low, *high,
                  channels - 8 * piece, head_dim % 8 == 0);
    }
  }
  __syncwarp();
}

}  // namespace sage::sm90
