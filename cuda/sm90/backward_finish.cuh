// dQ from the sums that backward_dq_sums.cuh leaves in its place.
//
// Its blocks come as soon as the kernel that adds the sums up leaves multiprocessors to them: in its last turn, for which there
// are seldom as many blocks of keys as multiprocessors. They take pieces of heads in the order in which heads are complete,
// and wait for each.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/scale.cuh"
#include "common/tile.cuh"
#include "ptx/counters.cuh"
#include "ptx/cvt.cuh"
#include "ptx/grid_dependency.cuh"
#include "sm90/backward_common.cuh"
#include "sm90/backward_dq_sums.cuh"

namespace sage::sm90 {

inline constexpr int kFinishThreads = 256, kFinishBlocks = 3;  // blocks of a multiprocessor
inline constexpr int kFinishRows = 4;      // queries of a thread at once, a tile
inline constexpr int kFinishTiles = 4;     // of a piece
inline constexpr int kFinishTogether = 4;  // heads that are side by side in memory, worked on at the same time

struct FinishCall {
  BackwardCall p;
  int pieces;   // of one head
  int reports;  // that a head of keys has had when its dQ is complete
};

// Eight channels of kFinishRows queries.
struct FinishRows {
  uint4 sums[kFinishRows];
  float factor[kFinishRows], dlse[kFinishRows];
};

// A head of queries and a piece of it. kFinishTogether heads (fewer at the end of a batch entry) take turns, then the next.
struct FinishPiece {
  int b, n, piece, kv_plane;
  __device__ FinishPiece(const AttentionShape& s, int pieces, int number) {
    const int of_batch = s.heads * pieces, of_together = kFinishTogether * pieces;
    b = number / of_batch;
    const int in_batch = number % of_batch, first = in_batch / of_together * kFinishTogether;
    const int heads = min(kFinishTogether, s.heads - first), at = in_batch % of_together;
    n = first + at % heads;
    piece = at / heads;
    kv_plane = b * s.kv_heads + n / (s.heads / s.kv_heads);
  }
};

// In place: a thread has eight channels of kFinishRows queries at a time, and reads the next ones while it works on these.
template <int kHeadDim>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocks) finish_dq(const FinishCall call) {
  constexpr int kPieces = kHeadDim / 8, kAtOnce = kFinishThreads / kPieces;
  const BackwardCall& p = call.p;
  const AttentionShape& s = p.shape;
  __shared__ int taken;
  const int eight = static_cast<int>(threadIdx.x) % kPieces, first = static_cast<int>(threadIdx.x) / kPieces;
  const float unscaled = 1.0f / sum_factor(s.keys);
#pragma unroll 1
  while (true) {
    if (threadIdx.x == 0) {
      taken = static_cast<int>(atomicAdd(p.w.taken + 1, 1u));
      const FinishPiece at(s, call.pieces, taken);
      if (at.b < s.batch) {
        ptx::wait_until_counted(p.w.added + at.kv_plane, call.reports);
      }
    }
    __syncthreads();
    const FinishPiece at(s, call.pieces, taken);
    __syncthreads();
    if (at.b >= s.batch) break;
    const int64_t plane = static_cast<int64_t>(at.b) * s.heads + at.n;
    const int64_t channel = static_cast<int64_t>(at.kv_plane) * kHeadDim + 8 * eight;
    const int query = at.piece * kFinishTiles * kFinishRows * kAtOnce + first;  // the thread's first, and every kAtOnce-th
    const float* const row_factor = p.w.row_factor + plane * tiles_of(s.queries) * kTileQueries + query;
    const int64_t row = plane * s.queries + query;
    uint4* const sums = reinterpret_cast<uint4*>(p.dq) +
                        ((static_cast<int64_t>(at.b) * s.queries + query) * s.heads + at.n) * kPieces + eight;
    const unsigned distance = kAtOnce * kPieces * s.heads;
    const auto load = [&](FinishRows& x, int tile) {
#pragma unroll
      for (int i = 0; i < kFinishRows; ++i) {
        const int k = tile * kFinishRows + i;
        x.sums[i] = make_uint4(0, 0, 0, 0);
        x.factor[i] = x.dlse[i] = 0.0f;
        if (tile == kFinishTiles || k * kAtOnce >= s.queries - query) continue;
        x.sums[i] = sums[k * distance];
        x.factor[i] = row_factor[k * kAtOnce];
        x.dlse[i] = p.dlse[row + k * kAtOnce];
      }
    };
    FinishRows next;
    load(next, 0);
    float scale[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) scale[c] = channel_scale(p.k_max[channel + c]) * unscaled;
#pragma unroll 1
    for (int tile = 0; tile < kFinishTiles; ++tile) {
      const FinishRows x = next;
      load(next, tile + 1);
#pragma unroll
      for (int i = 0; i < kFinishRows; ++i) {
        const int k = tile * kFinishRows + i;
        if (k * kAtOnce >= s.queries - query) continue;
        uint32_t pairs[4] = {x.sums[i].x, x.sums[i].y, x.sums[i].z, x.sums[i].w};
        float y[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ptx::cvt_f32_f16x2(y[2 * j], y[2 * j + 1], pairs[j]);
          y[2 * j] *= x.factor[i] * scale[2 * j];
          y[2 * j + 1] *= x.factor[i] * scale[2 * j + 1];
        }
        if (x.dlse[i] != 0.0f && p.l[row + k * kAtOnce] != 0.0f) {
          const float dlse = x.dlse[i] * p.scale;
#pragma unroll
          for (int c = 0; c < 8; ++c) y[c] = fmaf(dlse, p.k_mean[channel + c], y[c]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          pairs[j] = p.dq_dtype == Dtype::kBf16 ? ptx::cvt_bf16x2_f32(y[2 * j], y[2 * j + 1])
                                                : ptx::cvt_f16x2_f32(y[2 * j], y[2 * j + 1]);
        }
        sums[k * distance] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }
  ptx::griddepcontrol_wait();  // who waits for this kernel waits for the one before it
}

// Behind the kernel that adds the sums up, whose warps make `reports` for each head of keys.
template <int kHeadDim>
const char* launch_finish_dq(const BackwardCall& p, int reports, Stream stream) {
  const AttentionShape& s = p.shape;
  const int pieces = static_cast<int>(blocks_for(s.queries, kFinishTiles * kFinishRows * kFinishThreads / (kHeadDim / 8)));
  const int64_t all = static_cast<int64_t>(s.batch) * s.heads * pieces, room = kFinishBlocks * multiprocessors();
  return launch(finish_dq<kHeadDim>, dim3(static_cast<unsigned>(std::min(all, room))), kFinishThreads, 0, stream,
                FinishCall{p, pieces, reports}, Start::kEarly);
}

}  // namespace sage::sm90
