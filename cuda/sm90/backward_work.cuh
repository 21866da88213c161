// How blocks that stay share the gradients out: one warp of each, the loader, takes rows from a counter that all blocks count
// up (the first ones are dealt out, where no block waits for another), and writes down what the consumers have to know of
// them. While these end a block of rows it brings the next.
#pragma once

#include "common/mask.cuh"
#include "common/tile.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/forward_stream.cuh"
#include "sm90/store_tiles.cuh"

namespace sage::sm90 {

// A block of rows: queries of one head for dQ, keys of one for dK and dV.
template <int kGroups, int kFactors>
struct GradientSlot {
  Mask mask;
  int b, head, kv_plane, row;  // `head` of queries, or of keys; its first row, or kNoRows: there are no more
  uint32_t bad;                // flags of its tiles, if it holds a NaN or Inf
  float k_scale[kGroups], v_scale[kGroups];  // of its keys
  alignas(8) float factor[kFactors > 0 ? kFactors : 1];  // what sums of channels have to be multiplied with
};
inline constexpr int kNoRows = -1;
inline constexpr int kGradientSlots = 2;

// Barriers between the loader and the consumers, at `at` in shared memory.
struct GradientBarriers {
  static constexpr int kCount = 2 + 2 * kGradientSlots;
  uint32_t at;
  __device__ __forceinline__ uint32_t rows_full() const { return at; }
  __device__ __forceinline__ uint32_t rows_empty() const { return at + 8; }
  __device__ __forceinline__ uint32_t slot_full(int slot) const { return at + 16 + 8 * slot; }
  __device__ __forceinline__ uint32_t slot_empty(int slot) const { return slot_full(slot) + 8 * kGradientSlots; }
  // By one thread; `warps` of consumers, and `helpers` that read slots too. All lanes arrive where slots change hands:
  // compute-sanitizer's racecheck does not see that a lane that arrives speaks for those that it has met at a __syncwarp.
  __device__ __forceinline__ void init(int warps, int helpers = 0) const {
    ptx::mbarrier_init(rows_full(), 1);
    ptx::mbarrier_init(rows_empty(), warps);
    for (int i = 0; i < kGradientSlots; ++i) {
      ptx::mbarrier_init(slot_full(i), kWarpSize);
      ptx::mbarrier_init(slot_empty(i), (warps + helpers) * kWarpSize);
    }
  }
};

// Some of a launch's blocks, which share one kind of work.
struct Crew {
  int first, blocks;
  // What this block does in its turn-th turn, in all lanes of a warp: `counter` counts what is taken. Where no block waits for
  // another (kDealt) the first turns are dealt out; elsewhere a block that does not run yet must not own anything.
  template <bool kDealt>
  __device__ __forceinline__ int item(int turn, uint32_t* counter) const {
    if (kDealt && turn == 0) return static_cast<int>(blockIdx.x) - first;
    uint32_t taken = 0;
    if (threadIdx.x % kWarpSize == 0) taken = atomicAdd(counter, 1u);
    return (kDealt ? blocks : 0) + static_cast<int>(__shfl_sync(kFullWarp, taken, 0));
  }
};

// The loader's part of a turn, in all lanes of its warp: when the slot is free, describes its rows by `describe`, or says that
// there are no more. Returns `more`.
template <class Slot, class Describe>
__device__ __forceinline__ bool hand_out(const GradientBarriers& barriers, Slot& slot, int turn, bool more,
                                         const Describe& describe) {
  ptx::mbarrier_wait(barriers.slot_empty(turn % kGradientSlots), turn / kGradientSlots % 2 ^ 1);
  if (more) {
    describe();
  } else if (threadIdx.x == 0) {
    slot.row = kNoRows;
  }
  ptx::mbarrier_arrive(barriers.slot_full(turn % kGradientSlots));
  return more;
}

// The consumers': calls compute(turn) until there are no more rows.
template <class Config, class Compute>
__device__ __forceinline__ void take_turns(unsigned char* shared, const Compute& compute) {
  const GradientBarriers barriers = Config::barriers(ptx::shared_address(shared));
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    ptx::mbarrier_wait(barriers.slot_full(turn % kGradientSlots), turn / kGradientSlots % 2);
    if (from_lane_0(Config::slot(shared, turn).row) == kNoRows) break;
    compute(turn);
  }
  wait_for_sent_tiles();
}

// Calls emit(note) in lane 0 for every tile of [first, end) that look(note) finds visible, in order.
// All lanes of a warp take part; they look at 32 tiles at once.
template <class Look, class Emit>
__device__ __forceinline__ void walk_tiles(int first, int end, Look look, Emit emit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll 1
  for (int base = first; base < end; base += kWarpSize) {
    TileNote note = {base + lane, 0, {0.0f, 0.0f}};
    const bool visible = base + lane < end && look(note);
#pragma unroll 1
    for (uint32_t seen = __ballot_sync(kFullWarp, visible); seen != 0; seen &= seen - 1) {
      const TileNote next = note_of_lane(note, __ffs(seen) - 1);
      if (lane == 0) emit(next);
      __syncwarp();
    }
  }
}

}  // namespace sage::sm90
