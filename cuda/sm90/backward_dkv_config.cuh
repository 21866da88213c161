// dK and dV on Hopper, and dQ beside them: the call, sizes, the shared-memory map (backward_dkv.cuh).
#pragma once

#include "common/tensor_map.h"
#include "sm90/backward_common.cuh"
#include "sm90/backward_work.cuh"

namespace sage::sm90 {

struct DkvCall {
  BackwardCall p;
  CUtensorMap k, v, q, d_out, x, y;
  CUtensorMap z, dq;  // with dQ
  float dq_factor;    // of its sums
  CUtensorMap dk, dv;  // where they are `tiled`
  bool tiled_dk, tiled_dv;
  int key_blocks;   // of one head
  int items;        // of all heads
  Crew crew;
  int group_heads;  // query heads that share a head of keys
};

// ---------------------------------------------------------------------------------- tile constants

template <int kHeadDim>
using DkvBlock = std::conditional_t<kHeadDim == 64, GradientBlock<3, 32, 160>, GradientBlock<2, 40, 232>>;

template <int kHeadDim_, bool kWithDq_>
struct DkvConfig : DkvBlock<kHeadDim_> {
  using Block = DkvBlock<kHeadDim_>;
  using Slot = GradientSlot<Block::kGroups, 2 * kHeadDim_>;  // factors of dK, of dV
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWithDq = kWithDq_;
  // Registers and shared memory decide who computes dQ of a tile: at head dimension 64 one warpgroup, in turn, else all of
  // them, 64 channels each.
  static constexpr bool kInTurn = kWithDq && kHeadDim == 64;
  static constexpr int kStages = kHeadDim == 128 || kWithDq ? 2 : 4;  // a power of two: stages follow from counts
  static constexpr int kCodesPlaces = !kWithDq ? 0 : kInTurn ? 4 : 3;

  // --------------------------------------------------------------------------- shared-memory map
  // K [128][kHeadDim] | V [128][kHeadDim] | with dQ: z, a tile [kHeadDim][64] of each warpgroup's keys
  //   | kStages × { Q | dO [64][kHeadDim], terms [64] } | kStages × { x | y [kHeadDim][64] }
  //   | exact sums of dK and dV of each warp; outputs
  //   | with dQ: kCodesPlaces × { G [64][64] of each warpgroup's keys } | sums of dQ of each warp | zeros for another's
  //   | 2 × lines of a tile's queries for each warpgroup | notes | slots | barriers
  static constexpr int kRowsBytes = Block::kRows * kHeadDim;
  static constexpr int kRowsLoaded = (kWithDq ? 3 : 2) * kRowsBytes;
  static constexpr int kTileBytes = kGradientTile * kHeadDim;
  static constexpr int kTermsBytes = kGradientTile * static_cast<int>(sizeof(QueryTerms));
  static constexpr int kWarpBytes = 16 * kHeadDim * 2;  // of dK, and again of dV
  static constexpr int kWarps = 4 * Block::kGroups;
  static constexpr int kZAt = 2 * kRowsBytes;
  static constexpr int kScoresAt = kRowsLoaded;
  static constexpr int kScoresBytes = 2 * kTileBytes + kTermsBytes;
  static constexpr int kSumsAt = kScoresAt + kStages * kScoresBytes;
  static constexpr int kSumsBytes = 2 * kTileBytes;
  static constexpr int kWarpsAt = kSumsAt + kStages * kSumsBytes;
  static constexpr int kCodesAt = kWarpsAt + kWarps * 2 * kWarpBytes;
  static constexpr int kCodesTile = kGradientTile * 64;
  static constexpr int kCodesBytes = Block::kGroups * kCodesTile;
  static constexpr int kStagedAt = kCodesAt + kCodesPlaces * kCodesBytes;
  static constexpr int kStagedBytes = 16 * kOutTileColumns * 2;  // of a warp
  static constexpr int kZerosAt = kStagedAt + kWarps * kStagedBytes;
  static constexpr int kLinesAt = kWithDq ? kZerosAt + kStagedBytes : kStagedAt;
  static constexpr int kNotesAt = kLinesAt + Block::kGroups * 2 * kTermsBytes;
  static constexpr int kSlotsAt = kNotesAt + kStages * static_cast<int>(sizeof(TileNote));
  static constexpr int kBarriersAt = kSlotsAt + kGradientSlots * static_cast<int>(sizeof(Slot));
  static constexpr size_t kSharedBytes = kBarriersAt + 8 * (4 * kStages + GradientBarriers::kCount + kCodesPlaces);
  static_assert(kSharedBytes <= kSharedLimit && kBarriersAt % 8 == 0, "what an sm_90 offers a block");
  static_assert(kScoresBytes % 1024 == 0 && kWarpsAt % 1024 == 0 && kCodesAt % 1024 == 0 && kStagedAt % 1024 == 0,
                "tiles at multiples of 1024 bytes");
  static __device__ int scores_full(int stage) { return kBarriersAt + 8 * stage; }
  static __device__ int scores_empty(int stage) { return scores_full(stage) + 8 * kStages; }
  static __device__ int sums_full(int stage) { return scores_full(stage) + 16 * kStages; }
  static __device__ int sums_empty(int stage) { return scores_full(stage) + 24 * kStages; }
  static __device__ GradientBarriers barriers(uint32_t base) { return {base + kBarriersAt + 32 * kStages}; }
  static __device__ int codes_full(int place) {
    return kBarriersAt + 32 * kStages + 8 * GradientBarriers::kCount + 8 * place;
  }
  // Of a warpgroup's n-th tile; those of the one before may still be read.
  static __device__ QueryTerms* lines(unsigned char* shared, int group, int n) {
    return reinterpret_cast<QueryTerms*>(shared + kLinesAt + (2 * group + n % 2) * kTermsBytes);
  }
  static __device__ Slot& slot(unsigned char* shared, int turn) {
    return reinterpret_cast<Slot*>(shared + kSlotsAt)[turn % kGradientSlots];
  }
};

template <class Config>
int key_blocks(const AttentionShape& shape) {  // of one head
  return (shape.keys + Config::kRows - 1) / Config::kRows;
}

// Distances from the dense mask, and its summary, of the group's first head to those of another.
struct MaskOffsets {
  int64_t dense, state;
  __device__ MaskOffsets(const BackwardCall& p, int head) : dense(0), state(0) {
    if (p.masks.mask == nullptr || p.masks.mask_sizes[1] == 1) return;
    const MaskSummary summary = mask_summary(p.shape, p.masks, p.w.masks);
    dense = head * p.masks.mask_strides[1];
    state = static_cast<int64_t>(head) * summary.state_rows * summary.state_columns;
  }
};

}  // namespace sage::sm90
