// The stream of work of an FP4 forward block: which rows it computes, which tiles of keys they see, and the
// copies that bring them. One warp, the producer, walks the stream ahead of the consumers and writes down for
// each tile all that they need to know of it.
//
// Codes come by bulk tensor copies where the architecture has them. Scales and ΔS come by cp.async: their rows
// start at multiples of 4 bytes only. Both count on the barrier of their stage.
#pragma once

#include "common/mask.cuh"
#include "common/row_blocks.cuh"
#include "common/scale.cuh"
#include "common/tensor_map.h"
#include "ptx/bulk_tensor.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "sm120/forward_config.cuh"

namespace sage::sm120 {

// Kernel parameter.
struct ForwardCall {
  AttendFp4Params p;
  CUtensorMap k, v;  // where the architecture has bulk copies
  RowBlocks work;
};

// A warp's copies of a tile's rows, `pitch` bytes apart; zero from `valid_rows` and `valid_bytes` on.
template <class Tile, int kRows>
__device__ __forceinline__ void copy_rows(uint32_t tile, const uint8_t* source, int64_t pitch,
                                          int valid_rows, int valid_bytes) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < kRows * Tile::kChunks; i += kWarpSize) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    ptx::cp_async_16(tile + Tile::offset(row, chunk), source + row * pitch + chunk * kChunkBytes,
                     row < valid_rows && chunk * kChunkBytes < valid_bytes);
  }
}

template <class Config>
class Producer {
  using Slot = typename Config::Slot;

 public:
  __device__ Producer(const ForwardCall& call, unsigned char* shared)
      : call_(call),
        shared_(shared),
        base_(ptx::shared_address(shared)),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize) {}

  __device__ void run() {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int items = call_.work.items * Config::kSplits;
    for (int turn = 0; turn * blocks < items; ++turn) {
      const int item = RowBlocks::item(turn, block, blocks);
      if (item < items) row_block(item);
    }
    emit({0, kStop});
  }

 private:
  __device__ void row_block(int item) {
    const AttendFp4Params& p = call_.p;
    const AttentionShape& shape = p.shape;
    const RowBlock work = call_.work.whole_block(shape, item / Config::kSplits, Config::kRows);
    const int channel = item % Config::kSplits * Config::kChannels;
    kv_plane_ = work.b * shape.kv_heads + work.n / (shape.heads / shape.kv_heads);
    const int blocks = static_cast<int>(query_blocks(shape));  // of a head
    const int64_t queries = (static_cast<int64_t>(work.b) * shape.heads + work.n) * blocks;
    first_value_ = static_cast<int64_t>(kv_plane_) * Config::kHeadDim + channel;
    value_row_ = channel;
    slot_ ^= 1;
    ptx::mbarrier_wait(base_ + Config::slot_empty(slot_), slot_phase_ ^ 1);
    slot_phase_ ^= slot_;
    Slot& slot = Config::slots(shared_)[slot_];
    if (lane_ == 0) {
      slot.mask = Mask(shape, p.masks, p.workspace, work.b, work.n);
      slot.row = work.row;
      slot.channel = channel;
      slot.value_tensor = p.v_tensor[kv_plane_];
      slot.value_means = p.v_mean + static_cast<int64_t>(kv_plane_) * Config::kHeadDim;
    }
#pragma unroll
    for (int group = 0; group < Config::kGroups; ++group) {
      // Rows past the last query take its block: any will do.
      const int64_t block = queries + min((work.row + 64 * group) / kFp4Queries, blocks - 1);
      delta_[group] = p.delta + block * shape.keys;
      if (lane_ == 0) {
        // Not 0: -inf, the score of a hidden key, times 0 would be NaN.
        slot.multiplier[group] = fmaxf(
            p.q_tensor[block] * (p.scale * kLog2E) * p.k_tensor[kv_plane_], 0x1p-126f);
      }
    }
    __syncwarp();
    tiles(slot.mask, work.row);
  }

  // The tiles that some row sees; at least one, so that rows that see nothing are written too. One is always
  // held back, because the last has to say that it is.
  __device__ void tiles(const Mask& mask, int row) {
    int first, end;
    mask.key_tiles(row, row + Config::kRows, Config::kKeys, first, end);
    TileNote held = {0, 0};
    for (int tile = first; tile < end; ++tile) {
      const TileNote next = look(mask, row, tile * Config::kKeys);
      if (next.view == 0) continue;
      if (held.view != 0) emit(held);
      held = next;
    }
    held.view |= kEnds;
    emit(held);
  }

  // Lane 2·group + half looks at what 64 rows see of 64 keys.
  __device__ TileNote look(const Mask& mask, int row, int key) const {
    TileView view = TileView::kNothing;
    if (lane_ < 2 * Config::kGroups) {
      view = mask.view(row + lane_ / 2 * 64, 64, key + lane_ % 2 * Config::kHalfKeys);
    }
    return {key, __ballot_sync(kFullWarp, view == TileView::kAll) |
                     __ballot_sync(kFullWarp, view == TileView::kSome) << 8};
  }

  __device__ void emit(const TileNote& note) {
    const uint32_t full = base_ + Config::full(stage_), stage = base_ + stage_ * Config::kStageBytes;
    ptx::mbarrier_wait(base_ + Config::empty(stage_), phase_ ^ 1);
    const bool some = (note.view & ~(kEnds | kStop)) != 0;  // else no row sees a key: nothing to copy
    if (lane_ == 0) {
      // Who has seen it arrive sees the slot as well, which was written before.
      Config::notes(shared_)[stage_] = {note.key, note.view | slot_ << kSlotBit};
      if constexpr (ptx::kHasBulkCopies) {
        ptx::mbarrier_arrive_expect_tx(
            full, some ? Config::KeyTile::kBytes + Config::ValueTile::kBytes : 0);
        if (some) {
          ptx::cp_async_bulk_tensor_3d(stage, &call_.k, full, 0, note.key, kv_plane_);
          ptx::cp_async_bulk_tensor_3d(stage + Config::kValuesAt, &call_.v, full, note.key / 2,
                                       value_row_, kv_plane_);
        }
      } else {
        ptx::mbarrier_arrive(full);
      }
    }
    if (some) {
      if constexpr (!ptx::kHasBulkCopies) copy_codes(stage, note.key);
      copy_scales(stage, note.key);
    }
    ptx::cp_async_mbarrier_arrive(full);
    if (++stage_ == Config::kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

  __device__ int64_t padded_keys() const {
    return static_cast<int64_t>(mask_tiles(call_.p.shape.keys)) * kTileKeys;
  }

  __device__ void copy_codes(uint32_t stage, int key) const {
    const AttendFp4Params& p = call_.p;
    const int keys = p.shape.keys;
    copy_rows<typename Config::KeyTile, Config::kKeys>(
        stage, p.k4 + (static_cast<int64_t>(kv_plane_) * keys + key) * (Config::kHeadDim / 2),
        Config::kHeadDim / 2, keys - key, Config::kHeadDim / 2);
    const int64_t pitch = padded_keys() / 2;
    copy_rows<typename Config::ValueTile, Config::kChannels>(
        stage + Config::kValuesAt, p.v4 + first_value_ * pitch + key / 2, pitch, Config::kChannels,
        static_cast<int>(pitch) - key / 2);
  }

  __device__ void copy_scales(uint32_t stage, int key) const {
    const AttendFp4Params& p = call_.p;
    const int keys = p.shape.keys;
    const uint8_t* const key_scales =
        p.k_scale + (static_cast<int64_t>(kv_plane_) * keys + key) * Config::kKeyScaleBytes;
    const int of_32 = Config::scale_place(lane_), delta_of_32 = Config::delta_place(lane_);
#pragma unroll
    for (int i = 0; i < Config::kKeys / kWarpSize; ++i) {
      constexpr int kBytes = Config::kKeyScaleBytes;
      const int j = i * kWarpSize + lane_;
      ptx::cp_async<kBytes>(stage + Config::kKeyScalesAt + kBytes * (i * kWarpSize + of_32),
                            key_scales + kBytes * j, key + j < keys);
#pragma unroll
      for (int group = 0; group < Config::kGroups; ++group) {
        ptx::cp_async<4>(
            stage + Config::kDeltaAt + 4 * (group * Config::kKeys + i * kWarpSize + delta_of_32),
            delta_[group] + key + j, key + j < keys);
      }
    }
    const int64_t pitch = padded_keys() / kFp4Block;
    const uint8_t* const value_scales = p.v_scale + first_value_ * pitch + key / kFp4Block;
#pragma unroll
    for (int i = 0; i < Config::kChannels / kWarpSize; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::cp_async<4>(
            stage + Config::kValueScalesAt + 8 * (i * kWarpSize + of_32) + 4 * half,
            value_scales + (i * kWarpSize + lane_) * pitch + 4 * half,
            key + half * Config::kHalfKeys < keys);
      }
    }
  }

  const ForwardCall& call_;
  unsigned char* shared_;
  uint32_t base_;
  int lane_;
  uint32_t slot_ = 1, slot_phase_ = 0;  // the first row block takes slot 0
  int stage_ = 0;
  uint32_t phase_ = 0;
  int kv_plane_ = 0, value_row_ = 0;
  int64_t first_value_ = 0;             // row of V
  const float* delta_[Config::kGroups];  // ΔS of the groups' rows
};

}  // namespace sage::sm120
