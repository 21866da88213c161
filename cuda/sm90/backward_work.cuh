// How blocks that stay share the gradients out: one warp of each, the loader, takes the next rows from a counter that all
// blocks count up, and writes down what the consumers have to know of them. While these end a block of rows it brings the
// next.
#pragma once

#include "common/mask.cuh"
#include "common/tile.cuh"
#include "ptx/mbarrier.cuh"
#include "sm90/forward_stream.cuh"

namespace sage::sm90 {

// A block of rows: queries of one head for dQ, keys of one for dK and dV.
template <int kGroups>
struct GradientSlot {
  Mask mask;
  int b, head, kv_plane, row;  // `head` of queries, or of keys; its first row, or kNoRows: there are no more
  uint32_t bad;                // flags of its tiles, if it holds a NaN or Inf
  float k_scale[kGroups], v_scale[kGroups];  // of its keys
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
  // By one thread; `warps` of consumers.
  __device__ __forceinline__ void init(int warps) const {
    ptx::mbarrier_init(rows_full(), 1);
    ptx::mbarrier_init(rows_empty(), warps);
    for (int i = 0; i < kGradientSlots; ++i) {
      ptx::mbarrier_init(slot_full(i), 1);
      ptx::mbarrier_init(slot_empty(i), warps);
    }
  }
};

// The next of the work that `counter` counts, in all lanes of a warp.
__device__ __forceinline__ int next_item(uint32_t* counter) {
  uint32_t item = 0;
  if (threadIdx.x % kWarpSize == 0) item = atomicAdd(counter, 1u);
  return static_cast<int>(__shfl_sync(kFullWarp, item, 0));
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
