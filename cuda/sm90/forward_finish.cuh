// l, m and LSE of finished rows, to memory: one warp of the loader's warpgroup does that, and consumers go on.
#pragma once

#include "common/row_blocks.cuh"
#include "common/tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "sm90/forward_stream.cuh"

namespace sage::sm90 {

template <class Config>
class Finisher {
  static constexpr int kRowsOfLane = Config::kRows / kWarpSize;

 public:
  __device__ Finisher(const ForwardCall& call, unsigned char* shared)
      : call_(call), shared_(shared), base_(ptx::shared_address(shared)) {}

  __device__ void run() {
    const int blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
    for (int turn = 0; call_.work.item(turn, static_cast<int>(blockIdx.x), blocks) >= 0; ++turn) {
      row_block(turn);
    }
  }

 private:
  // Of the block's turn-th row block.
  __device__ void row_block(int turn) {
    const int slot_index = turn % Config::kSlots, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const uint32_t phase = turn / Config::kSlots & 1;
    const AttendParams& p = call_.p;
    const auto& slot = Config::slots(shared_)[slot_index];
    ptx::mbarrier_wait(base_ + Config::slot_full(slot_index), phase);
    const int rows = slot.rows - lane;  // from this lane's first on
    const int64_t first =
        (static_cast<int64_t>(slot.mask.b) * p.shape.heads + slot.mask.n) * p.shape.queries + slot.row + lane;
    float shift[kRowsOfLane];  // asked for before the rows are there: memory is far away
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      shift[i] = i * kWarpSize < rows ? p.lse_shift[first + i * kWarpSize] : 0.0f;
    }
    ptx::mbarrier_wait(base_ + Config::rows_done(slot_index), phase);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      if (i * kWarpSize >= rows) continue;
      const auto [l, m] = Config::finished(shared_, slot_index, lane + i * kWarpSize);
      p.l[first + i * kWarpSize] = l;
      p.m[first + i * kWarpSize] = m;
      p.lse[first + i * kWarpSize] = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2 + shift[i];
    }
    ptx::fence_proxy_async_shared();  // the next queries come there
    ptx::mbarrier_arrive(base_ + Config::slot_empty(slot_index));
  }

  const ForwardCall& call_;
  unsigned char* const shared_;
  const uint32_t base_;
};

}  // namespace sage::sm90
