// A warp's 16 rows of a wgmma accumulator to memory.
#pragma once

#include "common/store.cuh"
#include "common/tile.cuh"
#include "ptx/math.cuh"
#include "sm90/forward_sums.cuh"

namespace sage::sm90 {

// 16-bit rows of whole 16-byte pieces, through shared memory.
template <int kHeadDim, class Outputs>
__device__ __forceinline__ void store_halves(unsigned char* region, const Outputs& outputs, uint16_t* out, bool bf16,
                                             int rows, int64_t row_stride, int head_dim) {
  using Stage = SharedTile<16, 2 * kHeadDim>;
  const int lane = ptx::opaque_thread() % kWarpSize, g = lane / 4, t = lane % 4;
  __syncwarp();  // what lay there has been read
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    const FourOutputs x = outputs(n);
    const auto put = [&](int row, float2 pair) {
      *reinterpret_cast<uint32_t*>(region + Stage::offset(row, n) + 4 * t) =
          bf16 ? ptx::cvt_bf16x2_f32(pair.x, pair.y) : ptx::cvt_f16x2_f32(pair.x, pair.y);
    };
    put(g, x.upper);
    put(g + 8, x.lower);
  }
  __syncwarp();
  constexpr int kRowsAtOnce = kWarpSize / Stage::kChunks;
  const int row = lane / Stage::kChunks, chunk = lane % Stage::kChunks;
  uint16_t* const to = out + row * row_stride + 8 * chunk;
#pragma unroll 2
  for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
    const uint4 piece = *reinterpret_cast<const uint4*>(region + Stage::offset(row + i * kRowsAtOnce, chunk));
    if (row + i * kRowsAtOnce < rows && 8 * chunk < head_dim) {
      *reinterpret_cast<uint4*>(to + i * kRowsAtOnce * row_stride) = piece;
    }
  }
  __syncwarp();
}

// Others: half of the channels at a time through shared memory, so that rows leave in pieces of 16 bytes
// or more.
//   region       16 · kHeadDim · 2 bytes of the warp's own, at a multiple of 128
//   outputs      outputs(n): a thread's FourOutputs of channels 8n to 8n + 7
//   first        element of the first row's first channel, of which `rows` rows exist
//   row_stride   elements from one row to the next
template <int kHeadDim, class Outputs>
__device__ __forceinline__ void store_rows(unsigned char* region, const Outputs& outputs, void* out, Dtype dtype,
                                           int64_t first, int rows, int64_t row_stride, int head_dim) {
  if (dtype != Dtype::kF32 && head_dim % 8 == 0) {
    store_halves<kHeadDim>(region, outputs, static_cast<uint16_t*>(out) + first, dtype == Dtype::kBf16, rows,
                           row_stride, head_dim);
    return;
  }
  constexpr int kColumns = kHeadDim / 2, kPieces = kColumns / 8;
  using Stage = SharedTile<16, 4 * kColumns>;
  // Opaque: the compiler would compute all addresses before the kernel's loop, and keep them.
  const int lane = ptx::opaque_thread() % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncwarp();  // what lay there has been read
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const FourOutputs x = outputs(half * kColumns / 8 + n);
      const auto put = [&](int row, float2 pair) {
        *reinterpret_cast<float2*>(region + Stage::offset(row, 2 * n + t / 2) + t % 2 * 8) = pair;
      };
      put(g, x.upper);
      put(g + 8, x.lower);
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
