// dQ on Hopper: a block takes 128 queries (192 at head dimension 64) of one head at a time and walks over keys, as the
// forward pass does (docs/abi.md, section 4; docs/kernels/sm90_backward.md).
//
// Requirements
//   sm_90a; train8 with INT8 dO·Vᵀ; head dimension padded to 64 or 128; at least one query and one key;
//   the workspace filled by sm80/backward_prepass.cu.
// Roles: warp 0 copies; warpgroups of 64 queries compute. While one multiplies the other evaluates.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/tensor_map.h"
#include "sm90/backward_common.cuh"
#include "sm90/backward_work.cuh"

namespace sage::sm90 {

struct DqCall {
  BackwardCall p;
  CUtensorMap q, d_out, k, v, z;
  CUtensorMap dq;  // where it is `tiled`
  bool tiled_dq;
  int row_blocks;  // of one head
  int items;       // of all heads
  Crew crew;
};

// ---------------------------------------------------------------------------------- tile constants

// Three warpgroups where registers allow: three warps a scheduler hide each other's latencies.
template <int kHeadDim>
using DqBlock = std::conditional_t<kHeadDim == 64, GradientBlock<3, 56, 152>, GradientBlock<2, 56, 224>>;

// kOnlyDelta: for D alone (backward_delta.cuh), which needs neither z nor sums of channels.
template <int kHeadDim_, class Block_ = DqBlock<kHeadDim_>, bool kOnlyDelta_ = false>
struct DqConfig : Block_ {
  using Block = Block_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kOnlyDelta = kOnlyDelta_;

  // --------------------------------------------------------------------------- shared-memory map
  // Q [kRows][kHeadDim] | dO [kRows][kHeadDim] | kStages × { K | V [64][kHeadDim], z [kHeadDim][64] }
  //   | exact sums of each warp; outputs | terms of the rows | notes | slots | barriers
  // kOnlyDelta: stages without z, no sums, no outputs.
  static constexpr int kRowsBytes = Block::kRows * kHeadDim;
  static constexpr int kTileBytes = kGradientTile * kHeadDim;
  static constexpr int kStageBytes = (kOnlyDelta ? 2 : 3) * kTileBytes;
  static constexpr int kWarpBytes = kOnlyDelta ? 0 : 16 * kHeadDim * 2;
  static constexpr int kStages = kOnlyDelta ? 8 : kHeadDim == 128 ? 4 : 6;
  static constexpr int kCounter = kOnlyDelta ? 2 : 1;  // of blocks of queries, in BackwardWorkspace::taken
  static constexpr int kStagesAt = 2 * kRowsBytes;
  static constexpr int kWarpsAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kTermsAt = kWarpsAt + 4 * Block::kGroups * kWarpBytes;
  static constexpr int kNotesAt = kTermsAt + Block::kRows * static_cast<int>(sizeof(QueryTerms));
  using Slot = GradientSlot<Block::kGroups, kOnlyDelta ? 0 : kHeadDim>;
  static constexpr int kSlotsAt = kNotesAt + kStages * static_cast<int>(sizeof(TileNote));
  static constexpr int kBarriersAt = kSlotsAt + kGradientSlots * static_cast<int>(sizeof(Slot));
  static constexpr size_t kSharedBytes = kBarriersAt + 8 * (2 * kStages + GradientBarriers::kCount);
  static_assert(kSharedBytes <= kSharedLimit && kBarriersAt % 8 == 0 && kWarpsAt % 1024 == 0,
                "what an sm_90 offers a block; regions at multiples of 1024 bytes");
  static __device__ int full(int stage) { return kBarriersAt + 8 * stage; }
  static __device__ int empty(int stage) { return full(stage) + 8 * kStages; }
  static __device__ int before(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }
  static __device__ void move_on(int& stage, uint32_t& phase) {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
  static __device__ GradientBarriers barriers(uint32_t base) { return {base + kBarriersAt + 16 * kStages}; }
  static __device__ Slot& slot(unsigned char* shared, int turn) {
    return reinterpret_cast<Slot*>(shared + kSlotsAt)[turn % kGradientSlots];
  }
};

// ------------------------------------------------------------------------------------------ roles

// The rows of an item: blocks of one head follow each other, so that its keys stay in L2; the last rows come first, because
// under a causal mask they see the most keys.
template <class Config>
__device__ __forceinline__ void describe_queries(const DqCall& call, typename Config::Slot& slot, int item) {
  const BackwardCall& p = call.p;
  const AttentionShape& shape = p.shape;
  const int plane = item / call.row_blocks, row = (call.row_blocks - 1 - item % call.row_blocks) * Config::kRows;
  const int b = plane / shape.heads, n = plane % shape.heads;
  const int kv_plane = b * shape.kv_heads + n / (shape.heads / shape.kv_heads);
  if (threadIdx.x == 0) {
    slot.mask = Mask(shape, p.masks, p.w.masks, b, n);
    slot.b = b;
    slot.head = n;
    slot.kv_plane = kv_plane;
    slot.row = row;
  }
  // For the end.
  const int rows = min(Config::kRows, shape.queries - row);
  const int64_t first = static_cast<int64_t>(plane) * shape.queries + row;
  fetch_early(p.l + first, rows);
  if constexpr (!Config::kOnlyDelta) {
    describe_factors<Config::kHeadDim>(slot.factor, p.k_max + static_cast<int64_t>(kv_plane) * Config::kHeadDim, 1.0f);
    fetch_early(p.w.row_factor + static_cast<int64_t>(plane) * tiles_of(shape.queries) * kTileQueries + row, rows);
    fetch_early(p.dlse + first, rows);
  }
  __syncwarp();
}

// What is remembered from one item to the next is little, and the slot has the rest: the loader has few registers.
template <class Config>
__device__ __forceinline__ void copy_keys(const DqCall& call, unsigned char* shared) {
  const uint32_t base = ptx::shared_address(shared);
  const GradientBarriers barriers = Config::barriers(base);
  const BackwardCall& p = call.p;
  const int keys = p.shape.keys;
  int stage = 0;
  uint32_t phase = 0;
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    typename Config::Slot& slot = Config::slot(shared, turn);
    const int item = call.crew.template item<true>(turn, p.w.taken + Config::kCounter);
    if (!hand_out(barriers, slot, turn, item < call.items, [&] { describe_queries<Config>(call, slot, item); })) return;
    if (threadIdx.x == 0) {
      const int plane = slot.b * p.shape.heads + slot.head, padded = tiles_of(p.shape.queries) * kTileQueries;
      const uint32_t terms_bytes = min(Config::kRows, padded - slot.row) * static_cast<int>(sizeof(QueryTerms));
      ptx::mbarrier_wait(barriers.rows_empty(), turn % 2 ^ 1);
      const uint32_t full = barriers.rows_full();
      ptx::mbarrier_arrive_expect_tx(full, 2 * Config::kRowsBytes + terms_bytes);
      ptx::cp_async_bulk_tensor_3d(base, &call.q, full, 0, slot.row, plane);
      ptx::cp_async_bulk_tensor_3d(base + Config::kRowsBytes, &call.d_out, full, 0, slot.row, plane);
      ptx::cp_async_bulk(base + Config::kTermsAt, p.w.terms + static_cast<int64_t>(plane) * padded + slot.row, terms_bytes,
                         full);
    }
    __syncwarp();
    const float* const k_scale = p.k_scale + static_cast<int64_t>(slot.kv_plane) * tiles_of(keys);
    const float* const v_scale = p.v_dp_scale + static_cast<int64_t>(slot.kv_plane) * tiles_of(keys);
    const auto emit = [&](const TileNote& note) {
      const uint32_t full = base + Config::full(stage);
      const uint32_t at = base + Config::kStagesAt + stage * Config::kStageBytes;
      ptx::mbarrier_wait(base + Config::empty(stage), phase ^ 1);
      reinterpret_cast<TileNote*>(shared + Config::kNotesAt)[stage] = note;
      if (note.flags & Config::kStop) {
        ptx::mbarrier_arrive(full);
      } else {
        const int key = note.key * kGradientTile, kv_plane = slot.kv_plane;
        ptx::mbarrier_arrive_expect_tx(full, Config::kStageBytes);
        ptx::cp_async_bulk_tensor_3d(at, &call.k, full, 0, key, kv_plane);
        ptx::cp_async_bulk_tensor_3d(at + Config::kTileBytes, &call.v, full, 0, key, kv_plane);
        if (!Config::kOnlyDelta) ptx::cp_async_bulk_tensor_3d(at + 2 * Config::kTileBytes, &call.z, full, key, 0, kv_plane);
      }
      Config::move_on(stage, phase);
    };
    const auto look = [&](TileNote& note) {
      bool visible = false;
#pragma unroll 1
      for (int group = 0; group < Config::kGroups; ++group) {
        const TileView view = slot.mask.view(slot.row + 64 * group, 64, note.key * kGradientTile);
        visible = visible || view != TileView::kNothing;
        if (view != TileView::kAll) note.flags |= Config::kHide << group;
        if (view == TileView::kNothing) note.flags |= Config::kNone << group;
      }
      if (!visible) return false;
      const float k = k_scale[note.key];
      if (k < 0.0f) note.flags |= Config::kBadKeys | Config::kHideAll;
      note.scale[0] = fabsf(k);
      note.scale[1] = v_scale[note.key];
      return true;
    };
    int first, end;
    slot.mask.key_tiles(slot.row, slot.row + Config::kRows, kGradientTile, first, end);
    walk_tiles(first, end, look, emit);
    if (threadIdx.x == 0) emit({0, Config::kStop, {0.0f, 0.0f}});
    __syncwarp();
  }
}

// Terms of rows `within` and `within` + 8 of the block; those behind the last query count for nothing.
template <class Config>
__device__ __forceinline__ void read_terms(QueryTerms (&terms)[2], const unsigned char* shared, int within, int queries) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    terms[r] = {0.0f, -INFINITY, 0.0f, 0.0f};
    if (within + 8 * r < queries) {
      terms[r] = reinterpret_cast<const QueryTerms*>(shared + Config::kTermsAt)[within + 8 * r];
    }
  }
}

// A warpgroup's view of the rows of the slot of `turn`, from when they are there; a thread has shares of rows `row` and
// row + 8 of the block.
template <class Config>
struct QueryTurn {
  const uint32_t base;
  const GradientBarriers barriers;
  const typename Config::Slot& slot;
  const int row;
  const uint32_t queries;  // of the warpgroup, in 16-byte units; dO lies kRowsBytes further
  QueryTerms terms[2];

  __device__ __forceinline__ QueryTurn(const DqCall& call, unsigned char* shared, int group, int turn)
      : base(ptx::shared_address(shared)),
        barriers(Config::barriers(base)),
        slot(Config::slot(shared, turn)),
        row(64 * group + static_cast<int>(threadIdx.x) / kWarpSize % 4 * 16 + static_cast<int>(threadIdx.x) % kWarpSize / 4),
        queries(base / 16 + group * 64 * Config::kHeadDim / 16) {
    ptx::mbarrier_wait(barriers.rows_full(), turn % 2);
    read_terms<Config>(terms, shared, row, call.p.shape.queries - slot.row);
  }
  // Issues Q·Kᵀ and dO·Vᵀ with the tile of keys at `tile`, in 16-byte units.
  __device__ __forceinline__ void multiply(int (&s)[kGradientValues], int (&d)[kGradientValues], uint32_t tile) const {
    multiply_scores<Config::kHeadDim>(s, queries, tile);
    multiply_scores<Config::kHeadDim>(d, queries + Config::kRowsBytes / 16, tile + Config::kTileBytes / 16);
  }
  // Which of the thread's values of a tile count; `keys` are the codes of its keys.
  __device__ __forceinline__ uint32_t seen(const TileNote& note, const unsigned char* keys) const {
    return seen_of_queries<SharedTile<8, Config::kHeadDim>>(slot.mask, slot.row + row, note.key * kGradientTile,
                                                            note.flags & Config::kBadKeys, keys, threadIdx.x % 4);
  }
  __device__ __forceinline__ Line score_line(int r, const TileNote& note) const {
    return {terms[r].score * note.scale[0], terms[r].shift};
  }
};

// dQ of the rows of the slot of `turn`; `stage` and `phase` are of the next note.
template <class Config>
__device__ __forceinline__ void compute_dq(const DqCall& call, unsigned char* shared, int group, int turn, int& stage,
                                           uint32_t& phase) {
  constexpr int kHeadDim = Config::kHeadDim;
  const BackwardCall& p = call.p;
  const QueryTurn<Config> at(call, shared, group, turn);
  const auto& slot = at.slot;
  const uint32_t base = at.base;
  unsigned char* const region = shared + Config::kWarpsAt + at.row / 16 * Config::kWarpBytes;
  int s[kGradientValues], d[kGradientValues];
  float dq[kHeadDim / 2] = {};
  uint32_t operand[kGradientRegisters];
  int count = 0;           // tiles so far of which the warpgroup sees anything
  bool under_way = false;  // dQ's product of the tile before

  while (true) {
    uint32_t flags;
    while (true) {
      ptx::mbarrier_wait(base + Config::full(stage), phase);
      const TileNote note = reinterpret_cast<const TileNote*>(shared + Config::kNotesAt)[stage];
      flags = ptx::uniform(note.flags);
      if (flags & (Config::kStop | Config::kNone << group)) break;
      const uint32_t tile = base / 16 + (Config::kStagesAt + stage * Config::kStageBytes) / 16;
      ptx::wgmma_fence();
      at.multiply(s, d, tile);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();  // and dQ's product of the tile before
      ptx::keep_in_registers(s);
      ptx::keep_in_registers(d);
      ptx::keep_in_registers(dq);
      if (under_way) release(base + Config::empty(Config::before(stage)));
      if (count > 0 && count % kExactTiles == 0) {
        if (count == kExactTiles) wait_for_sent_tiles();
        add_exactly(region, dq, count == kExactTiles);
      }

      const Line score[2] = {at.score_line(0, note), at.score_line(1, note)};
      const Line gradient[2] = {{at.terms[0].gain * note.scale[1], at.terms[0].offset},
                                {at.terms[1].gain * note.scale[1], at.terms[1].offset}};
#pragma unroll
      for (int c = 0; c < kGradientValues / 8; ++c) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int r = i >> 1 & 1;
          x[i] = ptx::ex2(score[r].at(s[8 * c + i])) * gradient[r].at(d[8 * c + i]);
        }
        E4m3Values::pack(operand + 2 * c, x);
      }
      if (__builtin_expect(note.flags & (Config::kHide << group), 0)) {
        hide_codes(operand, at.seen(note, shared + Config::kStagesAt + stage * Config::kStageBytes));
      }
      ptx::keep_in_registers(operand);
      ptx::wgmma_fence();
      multiply_gradients<kHeadDim>(dq, operand, tile + 2 * Config::kTileBytes / 16, count > 0);
      ptx::wgmma_commit_group();
      ++count;
      under_way = true;
      Config::move_on(stage, phase);
    }
    if (flags & Config::kStop) break;
    // A tile of which the warpgroup sees nothing adds nothing.
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_registers(dq);
    if (under_way) release(base + Config::empty(Config::before(stage)));
    under_way = false;
    release(base + Config::empty(stage));
    Config::move_on(stage, phase);
  }

  // --------------------------------------------------------------------------------------- epilogue
  const int b = slot.b, n = slot.head, row = slot.row + at.row / 16 * 16, kv_plane = slot.kv_plane;
  float factor[2], dlse[2];  // of rows; fetched early
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = slot.row + at.row + 8 * r;
    const bool inside = query < p.shape.queries;
    const int64_t plane = static_cast<int64_t>(b) * p.shape.heads + n, at = plane * p.shape.queries + query;
    factor[r] = inside ? p.w.row_factor[plane * tiles_of(p.shape.queries) * kTileQueries + query] : 0.0f;
    dlse[r] = inside && p.l[at] != 0.0f ? p.dlse[at] * p.scale : 0.0f;
  }
  ptx::wgmma_wait_group<0>();
  ptx::keep_in_registers(dq);
  release(at.barriers.rows_empty());
  // The note that ends the tiles, and the tile before.
  if (under_way) release(base + Config::empty(Config::before(stage)));
  release(base + Config::empty(stage));
  Config::move_on(stage, phase);
  wait_for_sent_tiles();
  collect(region, dq, count > kExactTiles);
  const auto* const pairs = reinterpret_cast<const float2*>(slot.factor) + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) {
    const float2 scale = pairs[i / 4 * 4];
    dq[i] *= factor[i >> 1 & 1] * (i % 2 == 0 ? scale.x : scale.y);
  }
  ptx::mbarrier_arrive(at.barriers.slot_empty(turn % kGradientSlots));
  if (__any_sync(kFullWarp, dlse[0] != 0.0f || dlse[1] != 0.0f)) {
    const auto* const means =
        reinterpret_cast<const float2*>(p.k_mean + static_cast<int64_t>(kv_plane) * kHeadDim) + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const float2 mean = __ldg(means + i / 4 * 4);
      dq[i] = fmaf(dlse[i >> 1 & 1], i % 2 == 0 ? mean.x : mean.y, dq[i]);
    }
  }
  store_gradients<kHeadDim>(call.dq, call.tiled_dq, region, FromArray<kHeadDim>{dq}, p.dq, p.dq_dtype, b, row,
                            p.shape.queries, n, p.shape.heads, p.shape.head_dim);
}

// ------------------------------------------------------------------------------------------ kernel

// A block of those that take queries: compute(group, turn, stage, phase) is what a warpgroup does in a turn.
template <class Config, class Compute>
__device__ __forceinline__ void query_block(const DqCall& call, unsigned char* shared, const Compute& compute) {
  const uint32_t base = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    Config::barriers(base).init(4 * Config::kGroups);
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(base + Config::full(i), 1);
      ptx::mbarrier_init(base + Config::empty(i), 4 * Config::kGroups);
    }
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async_shared();
  }
  __syncthreads();
  const int group = static_cast<int>(ptx::uniform(threadIdx.x / 128));
  if (group == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) copy_keys<Config>(call, shared);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    int stage = 0;
    uint32_t phase = 0;
    take_turns<Config>(shared, [&](int turn) { compute(group - 1, turn, stage, phase); });
  }
}

// One of those that compute dQ.
template <class Config>
__device__ __forceinline__ void dq_block(const DqCall& call, unsigned char* shared) {
  query_block<Config>(call, shared, [&](int group, int turn, int& stage, uint32_t& phase) {
    compute_dq<Config>(call, shared, group, turn, stage, phase);
  });
}

// Completes a call, whose blocks follow `first_block` others of the launch.
template <class Config>
const char* plan_dq(DqCall& call, int first_block) {
  const BackwardCall& p = call.p;
  constexpr int kHeadDim = Config::kHeadDim;
  const AttentionShape& s = p.shape;
  const int64_t planes = static_cast<int64_t>(s.batch) * s.heads;
  const int64_t kv_planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  const int64_t padded_queries = static_cast<int64_t>(tiles_of(s.queries)) * 64;
  const int64_t padded_keys = static_cast<int64_t>(tiles_of(s.keys)) * 64;
  call.row_blocks = (s.queries + Config::kRows - 1) / Config::kRows;
  const char* error = nullptr;
  const auto map = [&](CUtensorMap& to, const TensorMapSpec& spec) {
    if (error == nullptr) error = encode_tensor_map(to, spec);
  };
  map(call.q, {p.q8, 1, kHeadDim, s.queries, planes, kHeadDim, Config::kRows});
  map(call.d_out, {p.w.d_out, 1, kHeadDim, padded_queries, planes, kHeadDim, Config::kRows});
  map(call.k, {p.k8, 1, kHeadDim, s.keys, kv_planes, kHeadDim, kGradientTile});
  map(call.v, {p.v_dp, 1, kHeadDim, s.keys, kv_planes, kHeadDim, kGradientTile});
  if (!Config::kOnlyDelta) map(call.z, {p.w.z, 1, padded_keys, kHeadDim, kv_planes, kGradientTile, kHeadDim});
  call.tiled_dq = !Config::kOnlyDelta && leaves_in_tiles(p.dq_dtype, s);
  if (error == nullptr && call.tiled_dq) error = encode_output_map(call.dq, p.dq, s, s.queries, s.heads);
  call.items = static_cast<int>(planes * call.row_blocks);
  call.crew = {first_block, std::min(call.items, multiprocessors())};
  return error;
}

}  // namespace sage::sm90
