// dK and dV on Hopper: a block takes 128 keys (192 at head dimension 64) of one head at a time and walks over the queries
// of all heads of their group (docs/abi.md, section 4; docs/kernels/sm90_backward.md). Scores are computed transposed,
// keys by queries: probabilities and score gradients leave the accumulators as A operands of Pᵀ·x, Gᵀ·y.
//
// Requirements
//   sm_90a; train8 with INT8 dO·Vᵀ; head dimension padded to 64 or 128; at least one query and one key;
//   the workspace filled by sm80/backward_prepass.cu.
// Roles: warp 0 copies; warpgroups of 64 keys compute. While one multiplies the other evaluates.
#pragma once

#include "common/launch.h"
#include "common/tensor_map.h"
#include "sm90/backward_common.cuh"
#include "sm90/backward_dq_sums.cuh"
#include "sm90/backward_work.cuh"

namespace sage::sm90 {

struct DkvCall {
  BackwardCall p;
  CUtensorMap k, v, q, d_out, x, y;
  CUtensorMap z, dq;  // with dQ
  float dq_factor;
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

template <int kHeadDim_, bool kWithDq_ = false>
struct DkvConfig : DkvBlock<kHeadDim_> {
  using Block = DkvBlock<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWithDq = kWithDq_;

  // --------------------------------------------------------------------------- shared-memory map
  // K [128][kHeadDim] | V [128][kHeadDim] | with dQ: z [kHeadDim][128] | kStages × { Q | dO [64][kHeadDim], terms [64] }
  //   | kStages × { x | y [kHeadDim][64] } | float32 sums of dK and dV of each warp | notes | slots | barriers
  static constexpr int kRowsBytes = Block::kRows * kHeadDim;
  static constexpr int kTileBytes = kGradientTile * kHeadDim;
  static constexpr int kTermsBytes = kGradientTile * static_cast<int>(sizeof(QueryTerms));
  static constexpr int kWarpBytes = 16 * kHeadDim * (kWithDq ? 2 : 4);  // of dK, and again of dV
  static constexpr int kStages = kHeadDim == 128 || kWithDq ? 2 : 4;  // a power of two: stages follow from counts
  static constexpr int kScoresAt = (kWithDq ? 3 : 2) * kRowsBytes;
  static constexpr int kScoresBytes = 2 * kTileBytes + kTermsBytes;
  static constexpr int kSumsAt = kScoresAt + kStages * kScoresBytes;
  static constexpr int kSumsBytes = 2 * kTileBytes;
  static constexpr int kWarpsAt = kSumsAt + kStages * kSumsBytes;
  static constexpr int kCodesAt = kWarpsAt + 4 * Block::kGroups * 2 * kWarpBytes;  // tiles of G
  static constexpr bool kInTurn = kWithDq && kHeadDim == 64;  // dQ of a tile is one warpgroup's
  static constexpr int kCodesStages = !kWithDq ? 0 : kInTurn ? 4 : 3;
  static constexpr int kCodesBytes = kGradientTile * Block::kRows;
  static constexpr int kStagedAt = kCodesAt + kCodesStages * kCodesBytes;  // sums of dQ on their way
  static constexpr int kStagedBytes = 16 * 64 * 2;                         // of a warp
  static constexpr int kFactorsAt = kStagedAt + (kWithDq ? 4 * Block::kGroups * kStagedBytes : 0);
  static constexpr int kNotesAt = kFactorsAt + (kWithDq ? Block::kGroups * 2 * kHeadDim * 4 : 0);
  using Slot = GradientSlot<Block::kGroups>;
  static constexpr int kSlotsAt = kNotesAt + kStages * static_cast<int>(sizeof(TileNote));
  static constexpr int kBarriersAt = kSlotsAt + kGradientSlots * static_cast<int>(sizeof(Slot));
  static constexpr size_t kSharedBytes = kBarriersAt + 8 * (4 * kStages + GradientBarriers::kCount + kCodesStages);
  static_assert(kSharedBytes <= kSharedLimit && kBarriersAt % 8 == 0 && kScoresBytes % 1024 == 0 && kWarpsAt % 1024 == 0,
                "what an sm_90 offers a block; tiles at multiples of 1024 bytes");
  static_assert(kStages <= kExactTiles, "a warp that runs ahead must not add up float32 sums while others read the factors");
  static_assert(kWithDq || 2 * kHeadDim * 4 <= kWarpBytes / 2, "the factors of the end fit beside a warp's outputs");
  static __device__ int scores_full(int stage) { return kBarriersAt + 8 * stage; }
  static __device__ int scores_empty(int stage) { return scores_full(stage) + 8 * kStages; }
  static __device__ int sums_full(int stage) { return scores_full(stage) + 16 * kStages; }
  static __device__ int sums_empty(int stage) { return scores_full(stage) + 24 * kStages; }
  static __device__ GradientBarriers barriers(uint32_t base) { return {base + kBarriersAt + 32 * kStages}; }
  static __device__ int codes_full(int stage) {
    return kBarriersAt + 32 * kStages + 8 * GradientBarriers::kCount + 8 * stage;
  }
  static __device__ Slot& slot(unsigned char* shared, int turn) {
    return reinterpret_cast<Slot*>(shared + kSlotsAt)[turn % kGradientSlots];
  }
};

// ------------------------------------------------------------------------------------------ roles

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
  __syncwarp();
  const int64_t channel = static_cast<int64_t>(slot.kv_plane) * Config::kHeadDim;
  fetch_early(reinterpret_cast<const float*>(p.w.x_max) + channel, Config::kHeadDim);  // for the end
  fetch_early(reinterpret_cast<const float*>(p.w.y_max) + channel, Config::kHeadDim);
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
    const int item = call.crew.item(turn, p.w.taken);
    ptx::mbarrier_wait(barriers.slot_empty(turn % kGradientSlots), turn / kGradientSlots % 2 ^ 1);
    if (item >= call.items) {
      if (threadIdx.x == 0) slot.row = kNoRows;
      ptx::mbarrier_arrive(barriers.slot_full(turn % kGradientSlots));
      return;
    }
    describe_keys<Config>(call, slot, item);
    ptx::mbarrier_arrive(barriers.slot_full(turn % kGradientSlots));
    if (threadIdx.x == 0) {
      ptx::mbarrier_wait(barriers.rows_empty(), turn % 2 ^ 1);
      ptx::mbarrier_arrive_expect_tx(barriers.rows_full(), (Config::kWithDq ? 3 : 2) * Config::kRowsBytes);
      ptx::cp_async_bulk_tensor_3d(base, &call.k, barriers.rows_full(), 0, slot.row, slot.kv_plane);
      ptx::cp_async_bulk_tensor_3d(base + Config::kRowsBytes, &call.v, barriers.rows_full(), 0, slot.row, slot.kv_plane);
      if (Config::kWithDq) {
        for (int group = 0; group < Config::kGroups; ++group) {
          ptx::cp_async_bulk_tensor_3d(base + 2 * Config::kRowsBytes + group * Config::kTileBytes, &call.z,
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
        }
        return visible;
      };
      walk_tiles(first, end, look, emit);
    }
    if (threadIdx.x == 0) emit({0, Config::kStop, {0.0f, 0.0f}});
    __syncwarp();
  }
}

// Which of a thread's values count; `codes` is the first code of the row of key `key`.
template <class Config>
__device__ __forceinline__ uint32_t seen_by_keys(const Mask& mask, const MaskOffsets& offsets,
                                                 int key, int query, const unsigned char* upper_code,
                                                 const unsigned char* lower_code) {
  const bool sound[2] = {static_cast<int8_t>(*upper_code) != kBadCode,
                         static_cast<int8_t>(*lower_code) != kBadCode};
  if (mask.spans_only()) {
    Span upper = mask.queries_of(key), lower = mask.queries_of(key + 8);
    upper.count = sound[0] ? upper.count : 0;
    lower.count = sound[1] ? lower.count : 0;
    return seen_in_spans(upper, lower, query);
  }
  const int t = static_cast<int>(threadIdx.x) % 4;
  uint32_t seen = 0;
#pragma unroll 1
  for (int i = kGradientValues - 1; i >= 0; --i) {
    const int column = i / 4 * 8 + 2 * t + (i & 1), r = i >> 1 & 1;
    const bool counts = (r == 0 ? sound[0] : sound[1]) &&
                        mask.visible(query + column, key + 8 * r, offsets.dense);
    seen = seen << 1 | (counts ? 1u : 0u);
  }
  return seen;
}

// dK and dV of the rows of the slot of `turn`. `count`: notes so far; `made`: tiles of G.
template <class Config>
__device__ __forceinline__ void compute_dkv(const DkvCall& call, unsigned char* shared, int group, int turn,
                                            uint32_t& count, uint32_t& made) {
  constexpr int kHeadDim = Config::kHeadDim;
  const BackwardCall& p = call.p;
  const uint32_t base = ptx::shared_address(shared), units = base / 16;
  const GradientBarriers barriers = Config::barriers(base);
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int warp_row = 64 * group + static_cast<int>(threadIdx.x) / kWarpSize % 4 * 16;
  unsigned char* const region = shared + Config::kWarpsAt + warp_row / 16 * 2 * Config::kWarpBytes;
  const float k_scale = Config::slot(shared, turn).k_scale[group], v_scale = Config::slot(shared, turn).v_scale[group];

  int s[kGradientValues], d[kGradientValues];
  float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
  uint32_t p_operand[kGradientRegisters], g_operand[kGradientRegisters];
  int tiles = 0;  // so far
  const uint32_t keys = units + group * 64 * kHeadDim / 16;
  ptx::mbarrier_wait(barriers.rows_full(), turn % 2);

  const DqPart<Config> part(call.dq, call.dq_factor, shared, group);
  constexpr int kLate = DqPart<Config>::kLate;
  QueryTile before[kLate] = {};  // the tile before, and the one before that
  const int batch = Config::kWithDq ? from_lane_0(Config::slot(shared, turn).b) : 0;

  uint32_t scores_there = 0;  // whether the next tile is known to be there
  while (true) {
    const int stage = static_cast<int>(count % Config::kStages);
    const uint32_t phase = count / Config::kStages % 2;
    if (!scores_there) ptx::mbarrier_wait(base + Config::scores_full(stage), phase);
    uint32_t codes_there = 0;
    if (Config::kInTurn && made >= kLate) codes_there = ptx::mbarrier_try_wait(part.full(made - kLate), (made - kLate) / DqPart<Config>::kPlaces % 2);
    const TileNote& note = reinterpret_cast<const TileNote*>(shared + Config::kNotesAt)[stage];
    const uint32_t flags = from_lane_0(note.flags);
    int query = 0, head = 0;
    if constexpr (Config::kWithDq) {
      query = from_lane_0(note.key) * kGradientTile;
      head = __float_as_int(from_lane_0(note.scale[0]));
    }
    if (flags & Config::kStop) break;
    const int scores_at = Config::kScoresAt + stage * Config::kScoresBytes;
    const uint32_t queries = units + scores_at / 16;
    // The gradient products of the tile before: the scores would have to wait for them anyway, and
    // their operands' registers are needed.
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_registers(dk);
    ptx::keep_in_registers(dv);
    if (tiles > 0) release(base + Config::sums_empty(static_cast<int>((count - 1) % Config::kStages)));
    if constexpr (Config::kInTurn) {
      if (made >= kLate && !codes_there) part.wait(made - kLate);
      if (tiles >= kLate && part.takes(made - kLate)) part.add(made - kLate, before[kLate - 1], batch);
    }
    ptx::wgmma_fence();
    multiply_scores<kHeadDim>(s, keys, queries);
    multiply_scores<kHeadDim>(d, keys + Config::kRowsBytes / 16, queries + Config::kTileBytes / 16);
    ptx::wgmma_commit_group();
    if (tiles > 0 && tiles % kExactTiles == 0) {
      if (tiles == kExactTiles) wait_for_sent_tiles();
      if constexpr (Config::kWithDq) {
        add_rounded(region, dk, tiles == kExactTiles);
        add_rounded(region + Config::kWarpBytes, dv, tiles == kExactTiles);
      } else {
        add_exactly(region, dk, tiles == kExactTiles);
        add_exactly(region + Config::kWarpBytes, dv, tiles == kExactTiles);
      }
    }
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_registers(s);
    ptx::keep_in_registers(d);

    const auto* const terms =
        reinterpret_cast<const QueryTerms*>(shared + scores_at + 2 * Config::kTileBytes) + 2 * t;
    float dq[32];
    uint32_t sums_there = 0;
    if (Config::kWithDq && !Config::kInTurn && made > 0) codes_there = ptx::mbarrier_try_wait(part.full(made - 1), (made - 1) / 3 % 2);
#pragma unroll
    for (int c = 0; c < kGradientValues / 8; ++c) {
      if (c == 3) sums_there = ptx::mbarrier_try_wait(base + Config::sums_full(stage), phase);
      float e[8], x[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = i / 2, column = i % 2;
        const QueryTerms term = terms[(2 * c + n) * 8 + column];
        const Line score{term.score * k_scale, term.shift}, gradient{term.gain * v_scale, term.offset};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = 4 * n + 2 * r + column;
          e[at] = ptx::ex2(score.at(s[8 * c + at]));
          x[at] = e[at] * gradient.at(d[8 * c + at]);
        }
      }
      E4m3Values::pack(p_operand + 2 * c, e);
      E4m3Values::pack(g_operand + 2 * c, x);
    }
    if (__builtin_expect(flags & (Config::kHide << group), 0)) {
      using Rows = SharedTile<8, kHeadDim>;
      const unsigned char* const codes = shared;  // of the block's keys
      const auto& slot = Config::slot(shared, turn);
      const int thread = static_cast<int>(ptx::opaque(threadIdx.x));
      const int upper = (thread / kWarpSize - 4) * 16 + thread % kWarpSize / 4;
      const uint32_t seen = seen_by_keys<Config>(
          slot.mask, MaskOffsets(p, __float_as_int(from_lane_0(note.scale[0]))),
          slot.row + upper, from_lane_0(note.key) * kGradientTile,
          codes + Rows::offset(upper, 0), codes + Rows::offset(upper + 8, 0));
      hide_codes(p_operand, seen);
      hide_codes(g_operand, seen);
    }
    release(base + Config::scores_empty(stage));
    if (Config::kWithDq && !Config::kInTurn && made > 0) if (!codes_there) part.wait(made - 1);
    if (!sums_there) ptx::mbarrier_wait(base + Config::sums_full(stage), phase);
    const uint32_t sums = units + (Config::kSumsAt + stage * Config::kSumsBytes) / 16;
    ptx::keep_in_registers(p_operand);
    ptx::keep_in_registers(g_operand);
    ptx::wgmma_fence();
    if constexpr (Config::kWithDq && !Config::kInTurn) part.start(dq, made - 1);
    const int go_on = Config::kWithDq ? tiles > 0 : tiles % kExactTiles != 0;
    multiply_gradients<kHeadDim>(dv, p_operand, sums, go_on);
    multiply_gradients<kHeadDim>(dk, g_operand, sums + Config::kTileBytes / 16, go_on);
    ptx::wgmma_commit_group();
    scores_there = ptx::mbarrier_try_wait(base + Config::scores_full(static_cast<int>((count + 1) % Config::kStages)),
                                          (count + 1) / Config::kStages % 2);
    if constexpr (Config::kWithDq) {
      part.store(made, g_operand);
      if constexpr (Config::kInTurn) {
        ptx::fence_proxy_async_shared();
      } else {
        part.wait_for_staged();
        ptx::wgmma_wait_group<1>();
        ptx::keep_in_registers(dq);
        part.stage(dq);
      }
      ptx::mbarrier_arrive(part.full(made));
      if constexpr (!Config::kInTurn) part.send(before[0], batch, tiles > 0);
      before[kLate - 1] = before[0];
      before[0] = {query, Config::slot(shared, turn).head * call.group_heads + head};
      ++made;
    }
    ++count;
    ++tiles;
  }
  ptx::wgmma_wait_group<0>();
  ptx::keep_in_registers(dk);
  ptx::keep_in_registers(dv);
  if constexpr (Config::kWithDq) {
#pragma unroll
    for (int late = kLate; late > 0; --late) {
      const uint32_t n = made - late;
      if (late > tiles || !part.takes(n)) continue;
      part.wait(n);
      part.add(n, before[late - 1], batch);
    }
  }
  release(barriers.rows_empty());
  // The note that ends the tiles.
  if (tiles > 0) release(base + Config::sums_empty(static_cast<int>((count - 1) % Config::kStages)));
  const int last = static_cast<int>(count % Config::kStages);
  release(base + Config::scores_empty(last));
  ptx::mbarrier_wait(base + Config::sums_full(last), count / Config::kStages % 2);
  release(base + Config::sums_empty(last));
  ++count;

  // --------------------------------------------------------------------------------------- epilogue
  wait_for_sent_tiles();
  if constexpr (Config::kWithDq) {
    collect_rounded(region, dk, tiles > kExactTiles);
    collect_rounded(region + Config::kWarpBytes, dv, tiles > kExactTiles);
  } else {
    collect(region, dk, tiles > kExactTiles);
    collect(region + Config::kWarpBytes, dv, tiles > kExactTiles);
  }
  const AttentionShape& shape = p.shape;
  const auto& slot = Config::slot(shared, ptx::opaque(turn));
  const int consumer = static_cast<int>(ptx::opaque(threadIdx.x)) - 128, this_group = consumer / 128;
  const int b = slot.b, head = slot.head, first_row = slot.row + consumer / kWarpSize * 16;
  // What the sums of each channel have to be multiplied with, dK's and then dV's, beside the first warp's outputs.
  const int beside = Config::kWithDq ? Config::kFactorsAt + this_group * 8 * kHeadDim
                                     : Config::kWarpsAt + this_group * 8 * Config::kWarpBytes + Config::kWarpBytes / 2;
  auto* const factors = reinterpret_cast<float*>(shared + beside);
  ptx::bar_sync(1 + this_group, 128);  // that warp has read its sums
#pragma unroll
  for (int j = 0; j < 2 * kHeadDim / 128; ++j) {
    const int i = 128 * j + consumer % 128;
    const bool is_dk = i < kHeadDim;
    const int64_t channel = static_cast<int64_t>(slot.kv_plane) * kHeadDim + i % kHeadDim;
    factors[i] = (is_dk ? p.scale : 1.0f) * (1.0f / 256.0f) * channel_scale(is_dk ? p.w.y_max : p.w.x_max, channel);
  }
  ptx::mbarrier_arrive(barriers.slot_empty(ptx::opaque(turn) % kGradientSlots));
  ptx::bar_sync(1 + this_group, 128);
  const auto finish = [&](float (&x)[kHeadDim / 2], unsigned char* sums, const float* factors, const CUtensorMap& map,
                          bool tiled, void* out, Dtype dtype) {
    const auto* const pairs = reinterpret_cast<const float2*>(factors) + static_cast<int>(ptx::opaque(threadIdx.x)) % 4;
    const auto outputs = [&](int n) {
      const float2 factor = pairs[4 * n];
      const FourOutputs y = FromArray<kHeadDim>{x}(n);
      return FourOutputs{{y.upper.x * factor.x, y.upper.y * factor.y}, {y.lower.x * factor.x, y.lower.y * factor.y}};
    };
    store_gradients<kHeadDim>(map, tiled, sums, outputs, out, dtype, b, first_row, shape.keys, head, shape.kv_heads,
                              shape.head_dim);
  };
  finish(dk, region, factors, call.dk, call.tiled_dk, p.dk, p.dk_dtype);
  finish(dv, region + Config::kWarpBytes, factors + kHeadDim, call.dv, call.tiled_dv, p.dv, p.dv_dtype);
}

// ------------------------------------------------------------------------------------------ kernel

// A block of those that compute dK and dV, which come first in the launch.
template <class Config>
__device__ __forceinline__ void dkv_block(const DkvCall& call, unsigned char* shared) {
  const uint32_t base = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    Config::barriers(base).init(4 * Config::kGroups);
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(base + Config::scores_full(i), 1);
      ptx::mbarrier_init(base + Config::sums_full(i), 1);
      ptx::mbarrier_init(base + Config::scores_empty(i), 4 * Config::kGroups);
      ptx::mbarrier_init(base + Config::sums_empty(i), 4 * Config::kGroups);
    }
    for (int i = 0; i < Config::kCodesStages; ++i) {
      ptx::mbarrier_init(base + Config::codes_full(i), 128 * Config::kGroups);
    }
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async_shared();
  }
  __syncthreads();
  const int group = static_cast<int>(ptx::uniform(threadIdx.x / 128));
  if (group == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) copy_queries<Config>(call, shared);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    const GradientBarriers barriers = Config::barriers(base);
    uint32_t count = 0, made = 0;
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      ptx::mbarrier_wait(barriers.slot_full(turn % kGradientSlots), turn / kGradientSlots % 2);
      if (from_lane_0(Config::slot(shared, turn).row) == kNoRows) break;
      compute_dkv<Config>(call, shared, group - 1, turn, count, made);
    }
    wait_for_sent_tiles();
  }
}

// Completes a call, which has `items` blocks of keys.
template <class Config>
const char* plan_dkv(DkvCall& call, int64_t& items) {
  const BackwardCall& p = call.p;
  constexpr int kHeadDim = Config::kHeadDim;
  const AttentionShape& s = p.shape;
  const int64_t planes = static_cast<int64_t>(s.batch) * s.heads;
  const int64_t kv_planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  const int64_t padded = static_cast<int64_t>(tiles_of(s.queries)) * 64;
  call.key_blocks = (s.keys + Config::kRows - 1) / Config::kRows;
  call.group_heads = s.heads / s.kv_heads;
  const char* error = nullptr;
  const auto map = [&](CUtensorMap& to, const TensorMapSpec& spec) {
    if (error == nullptr) error = encode_tensor_map(to, spec);
  };
  map(call.k, {p.k8, 1, kHeadDim, s.keys, kv_planes, kHeadDim, Config::kRows});
  map(call.v, {p.v_dp, 1, kHeadDim, s.keys, kv_planes, kHeadDim, Config::kRows});
  map(call.q, {p.q8, 1, kHeadDim, s.queries, planes, kHeadDim, kGradientTile});
  map(call.d_out, {p.w.d_out, 1, kHeadDim, padded, planes, kHeadDim, kGradientTile});
  map(call.x, {p.w.x, 1, padded, kHeadDim, planes, kGradientTile, kHeadDim});
  map(call.y, {p.w.y, 1, padded, kHeadDim, planes, kGradientTile, kHeadDim});
  if (Config::kWithDq) {
    map(call.z, {p.w.z, 1, static_cast<int64_t>(tiles_of(s.keys)) * 64, kHeadDim, kv_planes, 64, kHeadDim});
    map(call.dq, {p.dq, 2, static_cast<int64_t>(s.heads) * s.head_dim, s.queries, s.batch, kOutTileColumns, 16, true});
    call.dq_factor = sum_factor(s.keys);
  }
  call.tiled_dk = leaves_in_tiles(p.dk_dtype, s);
  call.tiled_dv = leaves_in_tiles(p.dv_dtype, s);
  if (error == nullptr && call.tiled_dk) error = encode_output_map(call.dk, p.dk, s, s.keys, s.kv_heads);
  if (error == nullptr && call.tiled_dv) error = encode_output_map(call.dv, p.dv, s, s.keys, s.kv_heads);
  items = kv_planes * call.key_blocks;
  call.items = static_cast<int>(items);
  return error;
}

}  // namespace sage::sm90
