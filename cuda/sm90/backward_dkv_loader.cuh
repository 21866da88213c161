// The loader of backward_dkv.cuh: rows of keys, then tiles of the queries of all heads of their group.
#pragma once

#include "ptx/counters.cuh"
#include "sm90/backward_dkv_config.cuh"

namespace sage::sm90 {

// Whether some key of the block holds a NaN or Inf.
template <class Config>
__device__ __forceinline__ bool bad_keys(const BackwardCall& p, int kv_plane, int key) {
  const int tiles = tiles_of(p.shape.keys), tile = key / kTileKeys;
  const float* const k_scale = p.k_scale + static_cast<int64_t>(kv_plane) * tiles;
  bool bad = false;
#pragma unroll
  for (int group = 0; group < Config::kGroups; ++group) {
    bad = bad || (tile + group < tiles && k_scale[tile + group] < 0.0f);
  }
  return bad;
}

// The rows of an item: blocks of one head follow each other; the first keys come first, because under a causal mask the most
// queries see them.
template <class Config>
__device__ __forceinline__ void describe_keys(const DkvCall& call, typename Config::Slot& slot, int item) {
  const BackwardCall& p = call.p;
  const AttentionShape& shape = p.shape;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int kv_plane = item / call.key_blocks, key = item % call.key_blocks * Config::kRows;
  const int b = kv_plane / shape.kv_heads, head = kv_plane % shape.kv_heads;
  if (lane < Config::kGroups) {
    const int tiles = tiles_of(shape.keys), tile = key / kTileKeys + lane;
    const int64_t at = static_cast<int64_t>(kv_plane) * tiles + tile;
    slot.k_scale[lane] = tile < tiles ? fabsf(p.k_scale[at]) : 0.0f;
    slot.v_scale[lane] = tile < tiles ? p.v_dp_scale[at] : 0.0f;
  } else if (lane == Config::kGroups) {
    slot.bad = bad_keys<Config>(p, kv_plane, key) ? Config::kBadKeys | Config::kHideAll : 0u;
  } else if (lane == kWarpSize - 1) {
    slot.mask = Mask(shape, p.masks, p.w.masks, b, head * (shape.heads / shape.kv_heads));
    slot.b = b;
    slot.head = head;
    slot.kv_plane = kv_plane;
    slot.row = key;
  }
  const int64_t channel = static_cast<int64_t>(kv_plane) * Config::kHeadDim;
  describe_factors<Config::kHeadDim>(slot.factor, p.w.y_max + channel, p.scale * (1.0f / 256.0f));
  describe_factors<Config::kHeadDim>(slot.factor + Config::kHeadDim, p.w.x_max + channel, 1.0f / 256.0f);
  __syncwarp();
}

// What is remembered from one item to the next is little, and the slot has the rest: the loader has few registers.
template <class Config>
__device__ __forceinline__ void copy_queries(const DkvCall& call, unsigned char* shared) {
  const uint32_t base = ptx::shared_address(shared);
  const GradientBarriers barriers = Config::barriers(base);
  const BackwardCall& p = call.p;
  uint32_t count = 0;  // notes so far
  int head = 0;
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    typename Config::Slot& slot = Config::slot(shared, turn);
    const int item = call.crew.template item<!Config::kWithDq>(turn, p.w.taken);
    if (!hand_out(barriers, slot, turn, item < call.items, [&] { describe_keys<Config>(call, slot, item); })) return;
    if (threadIdx.x == 0) {
      ptx::mbarrier_wait(barriers.rows_empty(), turn % 2 ^ 1);
      if (Config::kWithDq && slot.kv_plane >= p.cleared_heads) {
        ptx::wait_until_counted(p.w.cleared + slot.kv_plane, call.key_blocks);  // before anything is added to the head's dQ
        ptx::fence_proxy_async_global();
      }
      ptx::mbarrier_arrive_expect_tx(barriers.rows_full(), Config::kRowsLoaded);
      ptx::cp_async_bulk_tensor_3d(base, &call.k, barriers.rows_full(), 0, slot.row, slot.kv_plane);
      ptx::cp_async_bulk_tensor_3d(base + Config::kRowsBytes, &call.v, barriers.rows_full(), 0, slot.row, slot.kv_plane);
      if (Config::kWithDq) {
        for (int group = 0; group < Config::kGroups; ++group) {
          ptx::cp_async_bulk_tensor_3d(base + Config::kZAt + group * Config::kTileBytes, &call.z,
                                       barriers.rows_full(), slot.row + 64 * group, 0, slot.kv_plane);
        }
      }
    }
    __syncwarp();
    const auto emit = [&](const TileNote& note) {
      const int stage = static_cast<int>(count % Config::kStages);
      const uint32_t phase = count / Config::kStages % 2;
      const uint32_t scores_full = base + Config::scores_full(stage);
      const uint32_t sums_full = base + Config::sums_full(stage);
      const uint32_t scores = base + Config::kScoresAt + stage * Config::kScoresBytes;
      const uint32_t sums = base + Config::kSumsAt + stage * Config::kSumsBytes;
      ++count;
      ptx::mbarrier_wait(base + Config::scores_empty(stage), phase ^ 1);
      TileNote& to = reinterpret_cast<TileNote*>(shared + Config::kNotesAt)[stage];
      to = note;
      to.scale[0] = __int_as_float(head);
      if (note.flags & Config::kStop) {
        ptx::mbarrier_arrive(scores_full);
        ptx::mbarrier_wait(base + Config::sums_empty(stage), phase ^ 1);
        ptx::mbarrier_arrive(sums_full);
        return;
      }
      const int query = note.key * kGradientTile, plane = slot.kv_plane * call.group_heads + head;
      const int64_t padded = static_cast<int64_t>(tiles_of(ptx::opaque(p.shape.queries))) * kTileQueries;
      ptx::mbarrier_arrive_expect_tx(scores_full, Config::kScoresBytes);
      ptx::cp_async_bulk_tensor_3d(scores, &call.q, scores_full, 0, query, plane);
      ptx::cp_async_bulk_tensor_3d(scores + Config::kTileBytes, &call.d_out, scores_full, 0, query,
                                   plane);
      ptx::cp_async_bulk(scores + 2 * Config::kTileBytes, p.w.terms + plane * padded + query,
                         Config::kTermsBytes, scores_full);
      ptx::mbarrier_wait(base + Config::sums_empty(stage), phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(sums_full, Config::kSumsBytes);
      ptx::cp_async_bulk_tensor_3d(sums, &call.x, sums_full, query, 0, plane);
      ptx::cp_async_bulk_tensor_3d(sums + Config::kTileBytes, &call.y, sums_full, query, 0, plane);
    };
#pragma unroll 1
    for (head = 0; head < call.group_heads; ++head) {
      int first, end;
      slot.mask.query_tiles(slot.row, slot.row + Config::kRows, kGradientTile, first, end);
      const auto look = [&](TileNote& note) {
        bool visible = false;
        note.flags = slot.bad;
#pragma unroll 1
        for (int group = 0; group < Config::kGroups; ++group) {
          const TileView view = slot.mask.view(note.key * kGradientTile, kGradientTile, slot.row + 64 * group,
                                               MaskOffsets(p, ptx::opaque(head)).state);
          visible = visible || view != TileView::kNothing;
          if (view != TileView::kAll) note.flags |= Config::kHide << group;
          if (view == TileView::kNothing) note.flags |= Config::kNone << group;
        }
        return visible;
      };
      walk_tiles(first, end, look, emit);
    }
    if (threadIdx.x == 0) emit({0, Config::kStop, {0.0f, 0.0f}});
    __syncwarp();
  }
}

}  // namespace sage::sm90
