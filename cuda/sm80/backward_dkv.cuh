// dK and dV of one block of 64 keys: owns keys and walks over the queries of all the heads of their
// group, so that every sum has one order (docs/abi.md, section 4; docs/kernels/sm80_backward.md).
//
// Scores are computed transposed, keys by queries: probabilities and score gradients then leave the
// accumulators as A operands of Pᵀ·x and Gᵀ·y.
//
// Requirements
//   sm_80; head dimension padded to 64, 128 or 256; the workspace filled by backward_prepass.cu.
// Roles: 4 warps of 16 keys. Every warp multiplies, all threads copy. Q, dO and their terms are copied
// while x and y are multiplied, and the other way round.
#pragma once

#include "common/launch.h"
#include "common/seen.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared.cuh"
#include "sm80/backward_scores.cuh"

namespace sage::sm80 {

// ------------------------------------------------------------------------------------- block's plan

// What a block of keys of one head knows before its loop.
struct KeyBlock {
  int batch, kv_head, first, channel;  // first key, first channel of its sums
  int kv_plane, first_plane;           // of its head, of the first query head of the group

  // `block_index` may be opaque, to find the values again after the loop instead of keeping them.
  __device__ __forceinline__ KeyBlock(const AttentionShape& s, int splits, int block_index) {
    // Blocks of one head follow each other; the first keys come first, because under a causal mask
    // the most queries see them.
    const int key_blocks = tiles_of(s.keys) * splits, within = block_index % key_blocks;
    channel = within % splits * (s.padded_dim / splits);
    first = within / splits * kBlockRows;
    kv_plane = block_index / key_blocks;
    kv_head = kv_plane % s.kv_heads;
    batch = kv_plane / s.kv_heads;
    first_plane = kv_plane * (s.heads / s.kv_heads);
  }
};

// What the loop needs now and then: in shared memory, because registers are dear.
struct KeyPlan {
  KeyBlock block;
  KeyScales scales;
  int first, end;        // query tiles
  int whole, whole_end;  // those of which every pair counts, by bounds and window
  int group;             // query heads
};

// ---------------------------------------------------------------------------------- tile constants

template <class Recipe_, int kHeadDim_>
struct DkvConfig {
  using Recipe = Recipe_;
  using Dp = typename Recipe::Dp;
  static constexpr int kHeadDim = kHeadDim_;
  // Channels of a block: both sums take kChannels registers. More channels: more blocks, which
  // compute the scores again.
  static constexpr int kChannels =
      Recipe::kWideOperands || kHeadDim * Dp::kBytes == 512 || kHeadDim == 64 ? 64 : 128;
  static constexpr int kSplits = kHeadDim / kChannels;
  // Registers are what both sums leave, so rows of K and V are read again and again.
  static constexpr RowsIn kKeyRows = RowsIn::kShared;
  static constexpr RowsIn kValueRows =
      kHeadDim == 256 && Dp::kBytes == 2 ? RowsIn::kGlobal : RowsIn::kShared;
  static constexpr int kGroups = 2;  // of 8 queries, scored at once
  static constexpr int kMinBlocks = kHeadDim > 64 || Recipe::kWideOperands || Dp::kBytes == 2 ? 2 : 3;
  // Stops for ptxas (ptx::always) halfway through the scores and between both sums' products, where
  // registers would spill.
  static constexpr bool kStopHalfway = kChannels == 128;
  static constexpr bool kStopBetween = Recipe::kTileScales || kMinBlocks == 3;

  // ------------------------------------------------------------------------------ shared-memory map
  // Mask × 2 | maxima × 2 | KeyPlan | Q [64][kHeadDim] | dO [64][kHeadDim·kBytes] | terms [64]
  //   | x [kChannels][64] | y [kChannels][64] | K and V rows where not kept in registers
  using KeyRows = RowOperand<kBlockRows, kHeadDim, kKeyRows>;
  using ValueRows = RowOperand<kBlockRows, kHeadDim * Dp::kBytes, kValueRows>;
  using QueryTile = SharedTile<kTile, kHeadDim>;
  using GradientTile = SharedTile<kTile, kHeadDim * Dp::kBytes>;
  using ChannelTile = SharedTile<kChannels, kTile>;
  static constexpr int kMaskBytes = 192;
  static constexpr int kMaximaAt = 2 * kMaskBytes;
  static constexpr int kPlanAt = kMaximaAt + 2 * kBackwardWarps * 4;
  static constexpr int kQueriesAt = 512;
  static constexpr int kGradientsAt = kQueriesAt + QueryTile::kBytes;
  static constexpr int kTermsAt = kGradientsAt + GradientTile::kBytes;
  static constexpr int kXAt = kTermsAt + kTile * static_cast<int>(sizeof(QueryTerms));
  static constexpr int kYAt = kXAt + ChannelTile::kBytes;
  static constexpr int kKeysAt = kYAt + ChannelTile::kBytes;
  static constexpr int kValuesAt = kKeysAt + KeyRows::kSharedBytes;
  static constexpr size_t kSharedBytes = kValuesAt + ValueRows::kSharedBytes;
  static_assert(sizeof(Mask) <= kMaskBytes && kPlanAt + sizeof(KeyPlan) <= kQueriesAt,
                "the masks and the plan have their places");
  static_assert(kSharedBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 offer a block 99 KiB");
};

// ------------------------------------------------------------------------------------------ pieces

struct QueryTileIndex {
  int head;  // within the group
  int tile;
};

// The bits of the lane's keys that hold no NaN and no Inf; `codes` are those of the warp's first key.
template <int kHeadDim>
__device__ __forceinline__ uint32_t sound_keys(const int8_t* codes, int rows) {
  const int row = ptx::opaque_thread() % kWarpSize / 4;
  uint32_t bits = kAllSeen;
  if (row < rows && codes[row * kHeadDim] == kBadCode) bits &= ~kUpperRow;
  if (row + 8 < rows && codes[(row + 8) * kHeadDim] == kBadCode) bits &= kUpperRow;
  return bits;
}

// The same as seen_of_keys, in fewer registers: at head dimension 256 that spills on sm_120.
__device__ __forceinline__ uint32_t seen_pair_by_pair(const Mask& mask, int key, int query) {
  const int lane = ptx::opaque_thread() % kWarpSize;
  uint32_t seen = 0;
#pragma unroll 1
  for (int bit = 0; bit < 32; ++bit) {
    const int j = key + lane / 4 + (bit & 2) * 4;
    const int i = query + bit / 4 * 8 + lane % 4 * 2 + (bit & 1);
    seen |= (mask.visible(i, j) ? 1u : 0u) << bit;
  }
  return seen;
}

template <class Config>
__device__ __forceinline__ void load_scores_operands(const BackwardCall& p, int plane,
                                                     int tile, uint32_t shared) {
  const int thread = ptx::opaque_thread();
  constexpr int kHeadDim = Config::kHeadDim, kGradientBytes = kHeadDim * Config::Dp::kBytes;
  const int64_t row = static_cast<int64_t>(plane) * p.shape.queries + tile * kTile;
  const int64_t padded_row =
      (static_cast<int64_t>(plane) * tiles_of(p.shape.queries) + tile) * kTile;
  Config::QueryTile::template copy_run<kBackwardThreads>(
      shared + Config::kQueriesAt, p.q8 + row * kHeadDim, p.shape.queries - tile * kTile, thread);
  Config::GradientTile::template copy_run<kBackwardThreads>(
      shared + Config::kGradientsAt,
      static_cast<const unsigned char*>(p.w.d_out) + padded_row * kGradientBytes, kTile, thread);
  if (thread < kTile) {
    ptx::cp_async_16(shared + Config::kTermsAt + thread * sizeof(QueryTerms),
                     p.w.terms + padded_row + thread, true);
  }
}

template <class Config>
__device__ __forceinline__ void load_gradient_operands(const BackwardCall& p, int plane,
                                                       int tile, int channel, uint32_t shared) {
  const int thread = ptx::opaque_thread();
  const int64_t tokens = static_cast<int64_t>(tiles_of(p.shape.queries)) * kTile;
  const int64_t at =
      (static_cast<int64_t>(plane) * Config::kHeadDim + channel) * tokens + tile * kTile;
  Config::ChannelTile::template copy<kBackwardThreads>(shared + Config::kXAt, p.w.x + at, tokens,
                                                       Config::kChannels, thread);
  Config::ChannelTile::template copy<kBackwardThreads>(shared + Config::kYAt, p.w.y + at, tokens,
                                                       Config::kChannels, thread);
}

// ------------------------------------------------------------------------------------------- kernel

template <class Config>
__global__ void __launch_bounds__(kBackwardThreads, Config::kMinBlocks)
    backward_dkv(const BackwardCall p) {
  using Recipe = typename Config::Recipe;
  using Dp = typename Config::Dp;
  constexpr int kHeadDim = Config::kHeadDim;
  const AttentionShape& s = p.shape;

  unsigned char* const shared = ptx::dynamic_shared();
  const uint32_t shared_at = ptx::shared_address(shared);

  float dk[Config::kChannels / 8][4] = {}, dv[Config::kChannels / 8][4] = {};
  {
  const KeyBlock block(s, Config::kSplits, blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;

  // ------------------------------------------------------------------- which tiles of which heads
  // Heads may have dense masks of their own: those of a head and the next take turns in two places.
  const auto mask_of = [&](int head) -> Mask& {
    return *reinterpret_cast<Mask*>(shared + head % 2 * Config::kMaskBytes);
  };
  KeyPlan& plan = *reinterpret_cast<KeyPlan*>(shared + Config::kPlanAt);
  if (threadIdx.x == 0) {
    const int group = s.heads / s.kv_heads;
    for (int head = 0; head < min(group, 2); ++head) {
      mask_of(head) =
          Mask(s, p.masks, p.w.masks, block.batch, block.kv_head * group + head);
    }
    plan.block = block;
    plan.group = group;
    plan.scales = KeyScales::load<Dp>(p, block.kv_plane, block.first / kTile);
    mask_of(0).query_tiles(block.first, block.first + kBlockRows, kTile, plan.first, plan.end);
    mask_of(0).whole_query_tiles(block.first, plan.whole, plan.whole_end);
  }
  __syncthreads();
  // The next tile in which some key of the block is seen. Every head's first tile counts as one.
  const auto advance = [&](QueryTileIndex at) {
    const Mask& mask = mask_of(at.head);
    const bool has_gaps = mask.q_ids != nullptr || mask.state != nullptr;
    do {
      ++at.tile;
    } while (has_gaps && at.tile < plan.end &&
             mask.view(at.tile * kTile, kTile, plan.block.first) == TileView::kNothing);
    if (at.tile >= plan.end) at = {at.head + 1, plan.first};
    return at;
  };

  QueryTileIndex at = {plan.first < plan.end ? 0 : plan.group, plan.first};
  if (at.head < plan.group) load_scores_operands<Config>(p, block.first_plane, at.tile, shared_at);
  typename Config::KeyRows k;
  typename Config::ValueRows v;
  const int64_t key_row = static_cast<int64_t>(block.kv_plane) * s.keys + block.first;
  k.template load<kBackwardThreads>(p.k8 + key_row * kHeadDim, s.keys - block.first,
                                    shared_at + Config::kKeysAt);
  v.template load<kBackwardThreads>(
      static_cast<const unsigned char*>(p.v_dp) + key_row * kHeadDim * Dp::kBytes,
      s.keys - block.first, shared_at + Config::kValuesAt);
  ptx::cp_async_commit();

  // -------------------------------------------------------------------------------------- main loop
  while (at.head < plan.group) {
    const int plane = plan.block.first_plane + at.head;
    ptx::cp_async_wait_group<0>();  // Q, dO and terms of this thread's copies ...
    __syncthreads();                // ... and of all; nobody reads x and y any more
    load_gradient_operands<Config>(p, plane, at.tile, plan.block.channel, shared_at);
    ptx::cp_async_commit();
    if (at.tile == plan.first && at.head > 0 && threadIdx.x == 0) {
      // The masks of heads lie equally far apart: what was that of head - 1 becomes that of head + 1.
      Mask& other = mask_of(at.head + 1);
      const Mask& now = mask_of(at.head);
      other.dense = now.dense + (now.dense - other.dense);
      other.state = now.state + (now.state - other.state);
    }

    const int query = at.tile * kTile;
    // Not at head dimension 256: on sm_120 two words would spill.
    const TileView view = kHeadDim < 256 && at.tile >= plan.whole && at.tile < plan.whole_end
                              ? TileView::kAll
                              : mask_of(at.head).view(query, kTile, plan.block.first);
    const bool works =
        view != TileView::kNothing && plan.block.first + warp * kWarpRows < s.keys;
    typename Recipe::Operand probabilities, gradients;
    [[maybe_unused]] FloatTile e, g;
    if (works) {
      const int column0 = ptx::opaque_thread() % 4 * 2;
      uint32_t seen = kAllSeen;
      const KeyScales scales = plan.scales;
      const int key = plan.block.first + warp * kWarpRows;
      if (scales.any_bad) {
        seen = sound_keys<kHeadDim>(
            p.k8 + (static_cast<int64_t>(plan.block.kv_plane) * s.keys + key) * kHeadDim, s.keys - key);
      }
      if (view == TileView::kSome) {
        if constexpr (kHeadDim == 256) {
          seen &= seen_pair_by_pair(mask_of(at.head), key, query);
        } else {
          const bool sound[2] = {true, true};  // `seen` knows
          seen &= seen_of_keys(mask_of(at.head), key + ptx::opaque_thread() % kWarpSize / 4, query, sound,
                               ptx::opaque_thread() % 4);
        }
      }
      const auto* terms = reinterpret_cast<const QueryTerms*>(shared + Config::kTermsAt);
#pragma unroll
      for (int from = 0; from < kTileGroups; from += Config::kGroups) {
        if (Config::kStopHalfway && from == kTileGroups / 2) {
          if (!ptx::always(s.queries, from)) continue;
        }
        ScorePart<Dp, Config::kGroups> scores;
        scores.template multiply<typename Config::QueryTile, typename Config::GradientTile>(
            k, shared_at + Config::kQueriesAt, v, shared_at + Config::kGradientsAt, 8 * from);
#pragma unroll
        for (int pair = 0; pair < Config::kGroups; pair += 2) {
          float probability[2][4], gradient[2][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int n = pair + i / 2, column = i % 2;
            const QueryTerms term = terms[8 * (from + n) + column0 + column];
            const QueryTerms scaled = with_key_scales(term, scales.k, scales.v);
#pragma unroll
            for (int c = column; c < 4; c += 2) {
              scores.evaluate(n, c, scaled, probability[i / 2][c], gradient[i / 2][c]);
              if constexpr (Recipe::kTileScales) {
                e.value[from + n][c] = probability[i / 2][c] * term.gain;
                g.value[from + n][c] = gradient[i / 2][c];
              }
            }
          }
          if constexpr (!Recipe::kTileScales) {
            const int u = (from + pair) / 2;
            Recipe::Products::encode(probabilities, u, probability[0], probability[1]);
            Recipe::Products::encode(gradients, u, gradient[0], gradient[1]);
          }
        }
      }
      if (seen != kAllSeen) {
        if constexpr (Recipe::kTileScales) {
          e.hide(seen);
          g.hide(seen);
        } else {
          probabilities.hide(seen);
          gradients.hide(seen);
        }
      }
    }
    auto* maxima = reinterpret_cast<uint32_t*>(shared + Config::kMaximaAt);
    if constexpr (Recipe::kTileScales) {
      const uint32_t largest_e = works ? e.largest() : 0u, largest_g = works ? g.largest() : 0u;
      const int thread = ptx::opaque_thread();
      if (thread % kWarpSize == 0) {
        maxima[thread / kWarpSize] = largest_e;
        maxima[kBackwardWarps + thread / kWarpSize] = largest_g;
      }
    }

    ptx::cp_async_wait_group<0>();  // x and y
    __syncthreads();                // nobody reads Q, dO and terms any more
    const QueryTileIndex next = advance(at);
    if (next.head < plan.group) {
      load_scores_operands<Config>(p, plan.block.first_plane + next.head, next.tile, shared_at);
    }
    ptx::cp_async_commit();
    if (works) {
      float e_scale = 1.0f, g_scale = 1.0f;
      if constexpr (Recipe::kTileScales) {
        const TileScales of_queries =
            p.w.scales[static_cast<int64_t>(plane) * tiles_of(s.queries) + at.tile];
        const GroupScale e_codes = tile_codes(maxima), g_codes = tile_codes(maxima + kBackwardWarps);
        e.encode(probabilities, e_codes.inverse);
        g.encode(gradients, g_codes.inverse);
        e_scale = e_codes.scale * of_queries.d_out;
        g_scale = g_codes.scale * of_queries.q;
      }
      using Columns = typename Config::ChannelTile;
      multiply_tile<Recipe, Columns>(dv, probabilities, shared_at + Config::kXAt, e_scale,
                                     s.queries);
      if (!Config::kStopBetween || ptx::always(s.queries, 1)) {
        multiply_tile<Recipe, Columns>(dk, gradients, shared_at + Config::kYAt, g_scale,
                                       s.queries);
      }
    }
    at = next;
  }
  ptx::cp_async_wait_group<0>();

  }

  // --------------------------------------------------------------------------------------- epilogue
  const KeyBlock block(s, Config::kSplits, ptx::opaque(blockIdx.x));
  const int thread = ptx::opaque_thread(), lane = thread % kWarpSize;
  constexpr float kShare = Recipe::kTileScales ? 1.0f : 1.0f / 256.0f;  // of the e4m3 codes' scale
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = block.first + thread / kWarpSize * kWarpRows + lane / 4 + 8 * r;
    if (row >= s.keys) continue;
    const int64_t out =
        ((static_cast<int64_t>(block.batch) * s.keys + row) * s.kv_heads + block.kv_head) *
        s.head_dim;
#pragma unroll
    for (int n = 0; n < Config::kChannels / 8; ++n) {
      const int c = block.channel + 8 * n + lane % 4 * 2;
      float x[2], y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t scale_at = static_cast<int64_t>(block.kv_plane) * kHeadDim + c + i;
        x[i] = dv[n][2 * r + i] * (kShare * gradient_scale<Recipe>(p.w.x_max, scale_at));
        y[i] = dk[n][2 * r + i] * (p.scale * kShare * gradient_scale<Recipe>(p.w.y_max, scale_at));
      }
      store_channels(p.dv, p.dv_dtype, out, c, s.head_dim, x[0], x[1]);
      store_channels(p.dk, p.dk_dtype, out, c, s.head_dim, y[0], y[1]);
    }
  }
}

template <class Config>
const char* launch_dkv(const BackwardCall& p, Stream stream) {
  const unsigned blocks = static_cast<unsigned>(tiles_of(p.shape.keys)) * Config::kSplits *
                          p.shape.kv_heads * p.shape.batch;
  return launch(backward_dkv<Config>, blocks, kBackwardThreads, Config::kSharedBytes, stream, p);
}

}  // namespace sage::sm80
