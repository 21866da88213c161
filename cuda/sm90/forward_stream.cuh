// The stream of work of a forward block: which rows it computes, which tiles of keys they see, and
// the copies that bring both. One warp of the block, the producer, walks the stream ahead of the
// consumers and writes down for each tile all that they need to know of it.
#pragma once

#include <cuda.h>

#include "common/mask.cuh"
#include "common/row_blocks.cuh"
#include "common/tile.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/mbarrier.cuh"

namespace sage::sm90 {

// Kernel parameter: the call, its tensor maps, and the order of the work.
struct ForwardCall {
  AttendParams p;
  CUtensorMap q, k, v;
  CUtensorMap out;  // where `tiled_out`: outputs in 16 bits, heads as wide as padded
  bool tiled_out;
  RowBlockLists work;
  float zero;  // 0, which the compiler does not know: see forward_softmax.cuh
};

// What consumers need of a row block.
template <int kRows>
struct WorkSlot {
  Mask mask;
  int row, rows, kv_plane;
  float scale[kRows];  // of Q's codes
};

// What consumers need of a tile of keys.
struct alignas(16) TileNote {
  int key;         // its first; in the backward kernels, the tile's number
  uint32_t flags;  // see below
  // Of its groups of 64 keys; in backward_dq.cuh and backward_delta.cuh K's and V's of the tile; in backward_dkv.cuh the first is
  // the head of the tile's queries, within its group, as bits.
  float scale[2];
};
enum TileFlags : uint32_t {  // of the forward pass; the backward kernels': GradientBlock
  kHide = 1,       // some query of the first 64 rows does not see some key; of the others: kHide << 1, ...
  kBadKeys = 8,    // some key holds a NaN or Inf
  kEnds = 32,      // last tile of its row block
  kStop = 64,      // no tile: the stream has ended
  // None of the first 64 rows sees any of the first 64 keys; of the other keys of 128: kNone << 1; of other rows: two bits each.
  kNone = 256,
  // Some of them see some of these keys, in the same order. A tile with a bad key is hidden where neither is set, too.
  kSome = kNone << 6,
};

__device__ __forceinline__ TileNote note_of_lane(const TileNote& note, int lane) {
  return {__shfl_sync(kFullWarp, note.key, lane),
          __shfl_sync(kFullWarp, note.flags, lane),
          {__shfl_sync(kFullWarp, note.scale[0], lane), __shfl_sync(kFullWarp, note.scale[1], lane)}};
}

// The producer. Config gives the shared-memory map and barriers (forward_config.cuh). It has few
// registers: what it knows lies in shared memory.
template <class Config>
class Producer {
 public:
  __device__ Producer(const ForwardCall& call, unsigned char* shared)
      : call_(call), shared_(shared), base_(ptx::shared_address(shared)) {}

  __device__ void run() {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    for (int turn = 0, item; (item = call_.work.item(turn, block, blocks)) >= 0; ++turn) row_block(item);
    if (lane() == 0) emit({0, kStop, {0.0f, 0.0f}});
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

  __device__ void row_block(int item) {
    using Slot = typename Config::Slot;
    const AttendParams& p = call_.p;
    const RowBlock work = call_.work.plan.at(p.shape, item, Config::kRows);
    const int plane = work.b * p.shape.heads + work.n;
    kv_plane_ = work.b * p.shape.kv_heads + work.n / (p.shape.heads / p.shape.kv_heads);
    // All loads are under way before the first is used, and before the slot is free.
    constexpr int kQ = Config::kRows / kWarpSize;
    float q[kQ];
    const int64_t first = static_cast<int64_t>(plane) * p.shape.queries + work.row + lane();
#pragma unroll
    for (int i = 0; i < kQ && p.q == nullptr; ++i) {
      const bool inside = work.row + lane() + i * kWarpSize < p.shape.queries;
      q[i] = inside ? p.q_scale[first + i * kWarpSize] : 0.0f;
    }
    // Consumers will want these, in the end.
    constexpr int kLine = 128 / sizeof(float);
    if (lane() < Config::kHeadDim / kLine) {
      const int64_t channel = static_cast<int64_t>(kv_plane_) * Config::kHeadDim + lane() * kLine;
      ptx::prefetch_global_l1(p.v_scale + channel);
      if (Config::Values::kFormat == PvFormat::kE4m3) ptx::prefetch_global_l1(p.v_mean + channel);
    }
    const int slot_index = count_ % Config::kSlots;
    Slot& slot = Config::slots(shared_)[slot_index];
    const uint32_t empty = p.q == nullptr ? Config::slot_empty(slot_index) : Config::rows_done(slot_index);
    ptx::mbarrier_wait(base_ + empty, (count_ / Config::kSlots & 1) ^ 1);
    ++count_;
    if (lane() == 0) {
      slot.mask = Mask(p.shape, p.masks, p.workspace, work.b, work.n);
      slot.row = work.row;
      slot.rows = work.rows;
      slot.kv_plane = kv_plane_;
    }
#pragma unroll
    for (int i = 0; i < kQ && p.q == nullptr; ++i) slot.scale[lane() + i * kWarpSize] = q[i];
    const uint32_t full = base_ + Config::slot_full(slot_index);
    if (lane() == 0 && p.q == nullptr) {
      ptx::mbarrier_arrive_expect_tx(full, Config::kQueryBytes);
      ptx::cp_async_bulk_tensor_3d(base_ + Config::queries(slot_index), &call_.q, full, 0, work.row,
                                   plane);
    } else {
      ptx::mbarrier_arrive(full);
    }
    __syncwarp();
    tiles(slot);
  }

  // The tiles that some row sees; at least one, so that rows that see nothing are written too. The
  // lanes look at 32 tiles at once; one note is always held back, because the last has to say that it is.
  __device__ void tiles(const typename Config::Slot& slot) {
    int first, end;
    slot.mask.key_tiles(slot.row, slot.row + slot.rows, Config::kKeys, first, end);
    TileNote held = {0, (kHide << Config::kGroups) - kHide | (kNone << 2 * Config::kGroups) - kNone, {0.0f, 0.0f}};
    bool any = false;
#pragma unroll 1
    for (int base = first; base < end; base += kWarpSize) {
      TileNote note = {(base + lane()) * Config::kKeys, 0, {0.0f, 0.0f}};
      const bool visible = base + lane() < end && look(slot, note);
#pragma unroll 1
      for (uint32_t seen = __ballot_sync(kFullWarp, visible); seen != 0; seen &= seen - 1) {
        if (any && lane() == 0) emit(held);
        held = note_of_lane(note, __ffs(seen) - 1);
        any = true;
      }
    }
    held.flags |= kEnds;
    if (lane() == 0) emit(held);
    __syncwarp();
  }

  // Whether a row sees a key of the tile; completes its note.
  __device__ bool look(const typename Config::Slot& slot, TileNote& note) const {
    bool visible = false;
#pragma unroll 1
    for (int i = 0; i < Config::kGroups * (Config::kKeys / kTileKeys); ++i) {
      const int group = i % Config::kGroups, half = i / Config::kGroups;
      const TileView view = 64 * group < slot.rows
                                ? slot.mask.view(slot.row + 64 * group, 64, note.key + kTileKeys * half)
                                : TileView::kNothing;
      visible = visible || view != TileView::kNothing;
      if (view != TileView::kAll) note.flags |= kHide << group;
      if (view == TileView::kNothing) note.flags |= kNone << 2 * group + half;
      if (view == TileView::kSome) note.flags |= kSome << 2 * group + half;
    }
    if (!visible) return false;
    const int keys = call_.p.shape.keys;
    const float* const scales =
        call_.p.k_scale + static_cast<int64_t>(kv_plane_) * mask_tiles(keys) + note.key / kTileKeys;
#pragma unroll
    for (int half = 0; half < Config::kKeys / kTileKeys; ++half) {
      const float x = note.key + half * kTileKeys < keys ? scales[half] : 0.0f;
      if (x < 0.0f) note.flags |= kBadKeys | ((kHide << Config::kGroups) - kHide);
      note.scale[half] = fabsf(x);
    }
    return true;
  }

  // Brings the keys of a tile together with the values of the one before, which are needed when it is.
  __device__ void emit(const TileNote& note) {
    const uint32_t full = base_ + Config::full(stage_);
    const bool stops = note.flags & kStop;
    const bool values = value_plane_ >= 0;
    ptx::mbarrier_wait(base_ + Config::k_empty(stage_), phase_ ^ 1);
    Config::notes(shared_)[stage_] = note;
    ptx::mbarrier_arrive_expect_tx(
        full, (stops ? 0 : Config::kKeyBytes) + (values ? Config::kValueBytes : 0));
    if (!stops) {
      ptx::cp_async_bulk_tensor_3d(base_ + Config::keys(stage_), &call_.k, full, 0, note.key,
                                   kv_plane_);
    }
    if (values) {
      const int stage = stage_ == 0 ? Config::kStages - 1 : stage_ - 1;
      const uint32_t phase = stage_ == 0 ? phase_ : phase_ ^ 1;
      ptx::mbarrier_wait(base_ + Config::v_empty(stage), phase);
      Config::Values::template copy<Config>(base_ + Config::values(stage), &call_.v, full, value_key_,
                                            value_plane_);
    }
    value_key_ = note.key;
    value_plane_ = kv_plane_;
    if (++stage_ == Config::kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

  const ForwardCall& call_;
  unsigned char* shared_;
  uint32_t base_;
  int count_ = 0;  // row blocks so far
  int kv_plane_ = 0;
  // Of lane 0 alone:
  int stage_ = 0;
  uint32_t phase_ = 0;
  int value_key_ = 0, value_plane_ = -1;  // of the tile before, whose values are to be copied
};

}  // namespace sage::sm90
