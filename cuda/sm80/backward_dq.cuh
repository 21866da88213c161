// dQ of one block of 64 queries, and the exact row sums D: the kernels that own queries and walk
// over keys (docs/abi.md, section 4; docs/kernels/sm80_backward.md has the picture).
//
// Requirements
//   sm_80; head dimension padded to 64, 128 or 256; the workspace filled by backward_prepass.cu.
// Roles: 4 warps of 16 queries. Every warp multiplies, all threads copy.
#pragma once

#include "common/launch.h"
#include "common/seen.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "sm80/backward_scores.cuh"

namespace sage::sm80 {

// ------------------------------------------------------------------------------------- block's plan

// What a block of queries of one head knows before its loop.
struct QueryBlock {
  int batch, head, first, queries;  // first query of the block
  int channel;                      // first channel of its sums
  int plane, kv_plane;              // of the head, of its keys
  int64_t padded_row;               // of the first query in the padded arrays of the workspace

  // `block_index` may be opaque, to find the values again after the loop instead of keeping them.
  __device__ __forceinline__ QueryBlock(const AttentionShape& s, int splits, int block_index) {
    // Blocks of one head follow each other, so that its keys stay in L2; the last rows come first,
    // because under a causal mask they see the most keys.
    const int tiles = tiles_of(s.queries), within = block_index % (tiles * splits);
    const int index = block_index / (tiles * splits);
    channel = within % splits * (s.padded_dim / splits);
    first = (tiles - 1 - within / splits) * kBlockRows;
    queries = s.queries;
    head = index % s.heads;
    batch = index / s.heads;
    plane = index;
    kv_plane = batch * s.kv_heads + head / (s.heads / s.kv_heads);
    padded_row = static_cast<int64_t>(plane) * tiles * kTile + first;
  }
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / kWarpSize * kWarpRows;
  }
};

// What the loop needs now and then: in shared memory, because registers are dear.
struct QueryPlan {
  QueryBlock block;
  int first, end;        // key tiles
  int whole, whole_end;  // those of which every pair counts, by bounds and window
};

// ---------------------------------------------------------------------------------- tile constants

template <class Recipe_, int kHeadDim_>
struct DqConfig {
  using Recipe = Recipe_;
  using Dp = typename Recipe::Dp;
  static constexpr int kHeadDim = kHeadDim_;
  // Channels of a block, whose sums take kChannels / 2 registers. More: more blocks, which compute the
  // scores again.
  static constexpr int kChannels = kHeadDim < 256 ? kHeadDim : Dp::kBytes == 1 ? 128 : 64;
  static constexpr int kSplits = kHeadDim / kChannels;
  static constexpr int kStages = kHeadDim == 256 ? 1 : 2;  // of K and V
  static constexpr RowsIn kQueryRows =
      kHeadDim == 256 || Recipe::kTileScales ? RowsIn::kShared : RowsIn::kRegisters;
  static constexpr RowsIn kGradientRows =
      kHeadDim == 256 ? (Dp::kBytes == 1 ? RowsIn::kShared : RowsIn::kGlobal)
      : Recipe::kTileScales ? RowsIn::kShared : RowsIn::kRegisters;
  static constexpr int kGroups = 2;  // of 8 keys, scored at once
  // Blocks of a multiprocessor, which bounds registers.
  static constexpr int kMinBlocks = kHeadDim == 64 && Dp::kBytes == 1 ? 3 : 2;

  // ------------------------------------------------------------------------------ shared-memory map
  // Mask | maxima | QueryPlan | terms [64] | { K [64][kHeadDim] | V [64][kHeadDim·kBytes] } × kStages | z [kChannels][64]
  //   | Q and dO rows where they are not kept in registers
  using QueryRows = RowOperand<kBlockRows, kHeadDim, kQueryRows>;
  using GradientRows = RowOperand<kBlockRows, kHeadDim * Dp::kBytes, kGradientRows>;
  using KeyTile = SharedTile<kTile, kHeadDim>;
  using ValueTile = SharedTile<kTile, kHeadDim * Dp::kBytes>;
  using ZTile = SharedTile<kChannels, kTile>;
  static constexpr int kMaximaAt = 256;
  static constexpr int kPlanAt = kMaximaAt + kBackwardWarps * 4;
  static constexpr int kTermsAt = 384;
  static constexpr int kRingAt = kTermsAt + kBlockRows * static_cast<int>(sizeof(QueryTerms));
  static constexpr int kStageBytes = KeyTile::kBytes + ValueTile::kBytes;
  static constexpr int kZAt = kRingAt + kStages * kStageBytes;
  static constexpr int kQueriesAt = kZAt + ZTile::kBytes;
  static constexpr int kGradientsAt = kQueriesAt + QueryRows::kSharedBytes;
  static constexpr size_t kSharedBytes = kGradientsAt + GradientRows::kSharedBytes;
  static_assert(sizeof(Mask) <= kMaximaAt && kPlanAt + sizeof(QueryPlan) <= kTermsAt,
                "the mask and the plan have their places");
  static_assert(kSharedBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 offer a block 99 KiB");
};

// ------------------------------------------------------------------------------------------ pieces

// The tile loop that dQ and D share. `Body` is called with each tile's scores in two halves.
template <class Config>
struct KeyWalk {
  const BackwardCall& p;
  const QueryPlan& plan;
  const Mask& mask;
  uint32_t ring;

  // The next tile from `tile` on in which some query of the block sees some key.
  __device__ __forceinline__ int visible_from(int tile) const {
    const bool has_gaps = mask.q_ids != nullptr || mask.state != nullptr;
    while (has_gaps && tile < plan.end &&
           mask.view(plan.block.first, kBlockRows, tile * kTile) == TileView::kNothing) {
      ++tile;
    }
    return tile;
  }

  __device__ __forceinline__ TileView view(int tile) const {
    if (tile >= plan.whole && tile < plan.whole_end) return TileView::kAll;
    return mask.view(plan.block.first, kBlockRows, tile * kTile);
  }

  __device__ __forceinline__ void load(int tile, int stage) const {
    const uint32_t at = ring + stage * Config::kStageBytes;
    const int key = tile * kTile;
    const int64_t row = static_cast<int64_t>(plan.block.kv_plane) * p.shape.keys + key;
    constexpr int kValueBytes = Config::kHeadDim * Config::Dp::kBytes;
    const int thread = ptx::opaque_thread();
    Config::KeyTile::template copy_run<kBackwardThreads>(at, p.k8 + row * Config::kHeadDim,
                                                         p.shape.keys - key, thread);
    Config::ValueTile::template copy_run<kBackwardThreads>(
        at + Config::KeyTile::kBytes,
        static_cast<const unsigned char*>(p.v_dp) + row * kValueBytes, p.shape.keys - key, thread);
  }
};

template <class Config>
__device__ __forceinline__ void load_rows(typename Config::QueryRows& q,
                                          typename Config::GradientRows& d_out,
                                          const BackwardCall& p, const QueryBlock& block, uint32_t shared) {
  constexpr int kGradientBytes = Config::kHeadDim * Config::Dp::kBytes;
  q.template load<kBackwardThreads>(
      p.q8 + (static_cast<int64_t>(block.plane) * p.shape.queries + block.first) * Config::kHeadDim,
      p.shape.queries - block.first, shared + Config::kQueriesAt);
  d_out.template load<kBackwardThreads>(
      static_cast<const unsigned char*>(p.w.d_out) +
          block.padded_row * kGradientBytes,
      kBlockRows, shared + Config::kGradientsAt);
  if (threadIdx.x < kBlockRows) {
    ptx::cp_async_16(shared + Config::kTermsAt + threadIdx.x * sizeof(QueryTerms),
                     p.w.terms + block.padded_row + threadIdx.x, true);
  }
}

// ------------------------------------------------------------------------------------------ kernels

template <class Config>
__global__ void __launch_bounds__(kBackwardThreads, Config::kMinBlocks)
    backward_dq(const BackwardCall p) {
  using Recipe = typename Config::Recipe;
  using Dp = typename Config::Dp;
  constexpr int kHeadDim = Config::kHeadDim;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_row = QueryBlock::warp_row();
  unsigned char* const shared = ptx::dynamic_shared();
  const uint32_t shared_at = ptx::shared_address(shared);

  float dq[Config::kChannels / 8][4] = {};
  {
  // The mask lives in shared memory: most tiles need little of it, and registers are dear.
  Mask& mask = *reinterpret_cast<Mask*>(shared);
  QueryPlan& plan = *reinterpret_cast<QueryPlan*>(shared + Config::kPlanAt);
  if (threadIdx.x == 0) {
    const QueryBlock own(p.shape, Config::kSplits, blockIdx.x);
    plan.block = own;
    mask = Mask(p.shape, p.masks, p.w.masks, own.batch, own.head);
    mask.key_tiles(own.first, own.first + kBlockRows, kTile, plan.first, plan.end);
    mask.whole_tiles(own.first, kBlockRows, plan.whole, plan.whole_end);
  }
  __syncthreads();
  const QueryBlock& block = plan.block;
  const KeyWalk<Config> walk = {p, plan, mask, shared_at + Config::kRingAt};

  int tile = walk.visible_from(plan.first);
  if (tile < plan.end) walk.load(tile, 0);
  typename Config::QueryRows q;
  typename Config::GradientRows d_out;
  load_rows<Config>(q, d_out, p, block, shared_at);
  ptx::cp_async_commit();

  const auto* row_terms = reinterpret_cast<const QueryTerms*>(shared + Config::kTermsAt) +
                          warp_row + lane / 4;
  const int64_t padded_keys = static_cast<int64_t>(tiles_of(p.shape.keys)) * kTile;
  const uint8_t* z = p.w.z + (static_cast<int64_t>(block.kv_plane) * kHeadDim + block.channel) * padded_keys;

  // -------------------------------------------------------------------------------------- main loop
  for (int stage = 0; tile < plan.end; stage = (stage + 1) % Config::kStages) {
    ptx::cp_async_wait_group<0>();  // K and V of this thread's copies ...
    __syncthreads();                // ... and of all; nobody reads z or the other stage any more
    const int key = tile * kTile;
    Config::ZTile::template copy<kBackwardThreads>(shared_at + Config::kZAt, z + key, padded_keys,
                                                   Config::kChannels, ptx::opaque_thread());
    ptx::cp_async_commit();
    const int next = walk.visible_from(tile + 1);
    if constexpr (Config::kStages == 2) {
      if (next < plan.end) walk.load(next, stage ^ 1);
      ptx::cp_async_commit();
    }

    const KeyScales now = KeyScales::load<Dp>(p, block.kv_plane, tile);
    const uint32_t keys_at = shared_at + Config::kRingAt + stage * Config::kStageBytes;
    const TileView view = walk.view(tile);
    const bool works = view != TileView::kNothing && block.first + warp_row < block.queries;
    typename Recipe::Operand operand;
    float tile_scale = 1.0f;
    [[maybe_unused]] FloatTile g;
    uint32_t seen = kAllSeen;
    if (works) {
      const QueryTerms terms[2] = {with_key_scales(row_terms[0], now.k, now.v),
                                   with_key_scales(row_terms[8], now.k, now.v)};
      if (view == TileView::kSome || now.any_bad) {
        seen = seen_of_queries<typename Config::KeyTile>(
            mask, block.first + warp_row + ptx::opaque_thread() % kWarpSize / 4, key, now.any_bad,
            shared + Config::kRingAt + stage * Config::kStageBytes, ptx::opaque_thread() % 4);
      }
#pragma unroll
      for (int from = 0; from < kTileGroups; from += Config::kGroups) {
        ScorePart<Dp, Config::kGroups> scores;
        scores.template multiply<typename Config::KeyTile, typename Config::ValueTile>(
            q, keys_at, d_out, keys_at + Config::KeyTile::kBytes, 8 * from);
        float gradient[Config::kGroups][4];
#pragma unroll
        for (int n = 0; n < Config::kGroups; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float e;
            scores.evaluate(n, c, terms[c >> 1], e, gradient[n][c]);
            if constexpr (Recipe::kTileScales) g.value[from + n][c] = gradient[n][c];
          }
        }
        if constexpr (!Recipe::kTileScales) {
#pragma unroll
          for (int n = 0; n < Config::kGroups; n += 2) {
            Recipe::Products::encode(operand, (from + n) / 2, gradient[n], gradient[n + 1]);
          }
        }
      }
      if (seen != kAllSeen) {
        if constexpr (Recipe::kTileScales) {
          g.hide(seen);
        } else {
          operand.hide(seen);
        }
      }
    }
    if constexpr (Recipe::kTileScales) {
      auto* maxima = reinterpret_cast<uint32_t*>(shared + Config::kMaximaAt);
      const uint32_t largest = works ? g.largest() : 0u;
      if (lane == 0) maxima[threadIdx.x / kWarpSize] = largest;
    }

    ptx::cp_async_wait_group<Config::kStages - 1>();  // z
    __syncthreads();
    if constexpr (Config::kStages == 1) {
      if (next < plan.end) walk.load(next, 0);
      ptx::cp_async_commit();
    }
    if (works) {
      if constexpr (Recipe::kTileScales) {
        const auto* maxima = reinterpret_cast<const uint32_t*>(shared + Config::kMaximaAt);
        const GroupScale codes = tile_codes(maxima);
        g.encode(operand, codes.inverse);
        tile_scale = codes.scale * now.k;
      }
      multiply_tile<Recipe, typename Config::ZTile>(dq, operand, shared_at + Config::kZAt,
                                                    tile_scale, p.shape.keys);
    }
    tile = next;
  }
  ptx::cp_async_wait_group<0>();
  }

  // --------------------------------------------------------------------------------------- epilogue
  const QueryBlock block(p.shape, Config::kSplits, ptx::opaque(blockIdx.x));
  const int thread = ptx::opaque_thread(), t = thread % 4;
  const int thread_row = thread / kWarpSize * kWarpRows + thread % kWarpSize / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int in_block = thread_row + 8 * r, query = block.first + in_block;
    if (query >= block.queries) continue;
    const int64_t row = static_cast<int64_t>(block.plane) * block.queries + query;
    const float factor = p.w.row_factor[block.padded_row + in_block];
    const float dlse = p.l[row] == 0.0f ? 0.0f : p.dlse[row] * p.scale;
    const int64_t out = ((static_cast<int64_t>(block.batch) * block.queries + query) *
                             p.shape.heads + block.head) * p.shape.head_dim;
#pragma unroll
    for (int n = 0; n < Config::kChannels / 8; ++n) {
      const int channel = block.channel + 8 * n + 2 * t;
      float x[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t at = static_cast<int64_t>(block.kv_plane) * kHeadDim + channel + c;
        x[c] = fmaf(dq[n][2 * r + c], factor * gradient_scale<Recipe>(p.k_max, at),
                    dlse * p.k_mean[at]);
      }
      store_channels(p.dq, p.dq_dtype, out, channel, p.shape.head_dim, x[0], x[1]);
    }
  }
}

// D by the backward pass's own probabilities: adds (Σ_j e·dP)/l to every query's terms.
template <class Config>
__global__ void __launch_bounds__(kBackwardThreads, Config::kMinBlocks)
    backward_delta(const BackwardCall p) {
  using Dp = typename Config::Dp;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_row = QueryBlock::warp_row();
  unsigned char* const shared = ptx::dynamic_shared();
  const uint32_t shared_at = ptx::shared_address(shared);

  Mask& mask = *reinterpret_cast<Mask*>(shared);
  QueryPlan& plan = *reinterpret_cast<QueryPlan*>(shared + Config::kPlanAt);
  if (threadIdx.x == 0) {
    const QueryBlock own(p.shape, 1, blockIdx.x);
    plan.block = own;
    mask = Mask(p.shape, p.masks, p.w.masks, own.batch, own.head);
    mask.key_tiles(own.first, own.first + kBlockRows, kTile, plan.first, plan.end);
    mask.whole_tiles(own.first, kBlockRows, plan.whole, plan.whole_end);
  }
  __syncthreads();
  const QueryBlock& block = plan.block;
  const KeyWalk<Config> walk = {p, plan, mask, shared_at + Config::kRingAt};
  int tile = walk.visible_from(plan.first);
  if (tile < plan.end) walk.load(tile, 0);
  typename Config::QueryRows q;
  typename Config::GradientRows d_out;
  load_rows<Config>(q, d_out, p, block, shared_at);
  ptx::cp_async_commit();
  const auto* row_terms = reinterpret_cast<const QueryTerms*>(shared + Config::kTermsAt) +
                          warp_row + lane / 4;
  float sum[2] = {};

  for (int stage = 0; tile < plan.end; stage = (stage + 1) % Config::kStages) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    const int next = walk.visible_from(tile + 1);
    if constexpr (Config::kStages == 2) {
      if (next < plan.end) walk.load(next, stage ^ 1);
      ptx::cp_async_commit();
    }
    const int key = tile * kTile;
    const KeyScales scales = KeyScales::load<Dp>(p, block.kv_plane, tile);
    const int stage_at = Config::kRingAt + stage * Config::kStageBytes;
    const TileView view = walk.view(tile);
    if (view != TileView::kNothing && block.first + warp_row < block.queries) {
      uint32_t seen = kAllSeen;
      if (view == TileView::kSome || scales.any_bad) {
        seen = seen_of_queries<typename Config::KeyTile>(mask, block.first + warp_row + lane / 4, key, scales.any_bad,
                                                         shared + stage_at, lane % 4);
      }
      QueryTerms terms[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        terms[r] = with_key_scales(row_terms[8 * r], scales.k, scales.v);
        terms[r].offset = 0.0f;
      }
#pragma unroll
      for (int from = 0; from < kTileGroups; from += Config::kGroups) {
        ScorePart<Dp, Config::kGroups> scores;
        scores.template multiply<typename Config::KeyTile, typename Config::ValueTile>(
            q, shared_at + stage_at, d_out, shared_at + stage_at + Config::KeyTile::kBytes,
            8 * from);
#pragma unroll
        for (int n = 0; n < Config::kGroups; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float e, product;
            scores.evaluate(n, c, terms[c >> 1], e, product);
            const int bit = 4 * (from + n) + c;
            if (seen >> bit & 1u) sum[c >> 1] += product;
          }
        }
      }
    }
    if constexpr (Config::kStages == 1) {
      __syncthreads();
      if (next < plan.end) walk.load(next, 0);
      ptx::cp_async_commit();
    }
    tile = next;
  }
  ptx::cp_async_wait_group<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = quad_sum(sum[r]);
    const int in_block = warp_row + lane / 4 + 8 * r, query = block.first + in_block;
    if (lane % 4 != 0 || query >= block.queries) continue;
    const float l = p.l[static_cast<int64_t>(block.plane) * block.queries + query];
    const QueryTerms terms = p.w.terms[block.padded_row + in_block];
    // The row's gain is in the products. e carries train8's factor 256; sagebwd's gain is 1/l.
    const float factor = Config::Recipe::kTileScales ? terms.gain : 1.0f / (256.0f * l);
    if (l != 0.0f) p.w.terms[block.padded_row + in_block].offset = terms.offset - total * factor;
  }
}

template <class Config>
const char* launch_dq(const BackwardCall& p, Stream stream) {
  const unsigned blocks = static_cast<unsigned>(tiles_of(p.shape.queries)) * Config::kSplits *
                          p.shape.heads * p.shape.batch;
  return launch(backward_dq<Config>, blocks, kBackwardThreads, Config::kSharedBytes, stream, p);
}

template <class Config>
const char* launch_delta(const BackwardCall& p, Stream stream) {
  const unsigned blocks = static_cast<unsigned>(tiles_of(p.shape.queries)) * p.shape.heads *
                          p.shape.batch;
  return launch(backward_delta<Config>, blocks, kBackwardThreads, Config::kSharedBytes, stream, p);
}

}  // namespace sage::sm80
