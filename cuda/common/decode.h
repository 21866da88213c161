// When a few queries meet many keys, the keys of a head are split among blocks (split-K); otherwise most
// multiprocessors would have nothing to do. The rule depends on shapes alone: it sizes the workspace.
#pragma once

#include "common/params.h"

namespace sage {

inline constexpr int kDecodeRows = 16;      // query rows of a block: tokens × heads that share keys
inline constexpr int kDecodeQueries = 16;   // longest query sequence that is split
inline constexpr int kDecodeTiles = 16;     // fewest tiles of 64 keys
inline constexpr int kDecodeBlocks = 256;   // blocks to aim at: one wave on the largest GPUs
inline constexpr int kTilesPerSplit = 4;    // fewest

struct DecodePlan {
  int row_tiles;  // of one key head
  int splits;     // 1: do not split
  size_t bytes;   // partial results: out [B, N, T, splits, Hp], m and l [B, N, T, splits], float32
};

inline DecodePlan decode_plan(const AttentionShape& s, const MaskParams& masks, PvFormat pv,
                              bool f16_accumulate) {
  DecodePlan plan = {0, 1, 0};
  const int tiles = (s.keys + kTileKeys - 1) / kTileKeys;
  const bool fits = s.queries > 0 && s.queries <= kDecodeQueries && tiles >= kDecodeTiles &&
                    s.padded_dim <= 128 && pv != PvFormat::kInt8 && !f16_accumulate &&
                    masks.mask == nullptr && masks.q_seg == nullptr && s.batch > 0 && s.kv_heads > 0;
  if (!fits) return plan;
  plan.row_tiles = (s.heads / s.kv_heads * s.queries + kDecodeRows - 1) / kDecodeRows;
  const int64_t blocks = static_cast<int64_t>(s.batch) * s.kv_heads * plan.row_tiles;
  const int64_t most = tiles / kTilesPerSplit, wanted = kDecodeBlocks / blocks;
  plan.splits = static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
  if (plan.splits > 1) {
    plan.bytes = static_cast<size_t>(s.batch) * s.heads * s.queries * plan.splits *
                 (s.padded_dim + 2) * sizeof(float);
  }
  return plan;
}

// Attention by that plan, whose `splits` are more than 1.
const char* attend_split(const AttendParams& params, const DecodePlan& plan, Stream stream);

// The same with values in e4m3, for sm_90a, and whether it is built and the current device is one.
const char* attend_split_sm90(const AttendParams& params, const DecodePlan& plan, Stream stream);
bool has_sm90_decode();

}  // namespace sage
