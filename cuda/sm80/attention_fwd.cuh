// Forward attention on mma.sync (docs/abi.md, section 3), for sm_80 and every later architecture;
// the Values struct of the configuration supplies the format of P·V. Sources of the algorithm:
// SageAttention2 (arXiv 2411.10958), FlashAttention-2 (arXiv 2307.08691).
// docs/kernels/sm80_forward.md has the picture.
//
// Requirements
//   head dimension padded to 64, 128 or 256; every pointer to codes 16-byte aligned;
//   mask summaries computed beforehand on the same stream (common/mask.cuh).
#pragma once

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/mask.cuh"
#include "common/scale.cuh"
#include "common/softmax.cuh"
#include "common/store.cuh"
#include "common/tile.cuh"
#include "numerics/bf16.h"
#include "ptx/cp_async.cuh"
#include "ptx/cvt.cuh"
#include "ptx/mma_sync.cuh"
#include "ptx/shared.cuh"

namespace sage::sm80 {

// What a block knows about itself. It lies in shared memory: every tile needs a little of it, and
// registers are dear.
struct BlockState {
  Mask mask;
  int row, rows;   // the queries [row, row + rows)
  int channel;     // the first of its outputs
  int first, end;  // the tiles of keys that bounds and window leave to them
  const int8_t* keys;
  const unsigned char* values;
  const float* key_scales;
  const float* value_scales;  // per channel, or per tile
  const float* value_means;   // per channel

  template <class Config>
  static __device__ BlockState make(const AttendParams& p, int block) {
    using Values = typename Config::Values;
    const AttentionShape& shape = p.shape;
    // Blocks of one head follow each other, so that its keys stay in L2; the last rows come first,
    // because under a causal mask they see the most keys.
    const int row_blocks = (shape.queries + Config::kRows - 1) / Config::kRows;
    const int share = block % Config::kSplits;
    block /= Config::kSplits;
    const int n = block / row_blocks % shape.heads, b = block / row_blocks / shape.heads;
    BlockState s = {Mask(shape, p.masks, p.workspace, b, n)};
    s.rows = Config::kRows;
    s.channel = share * Config::kChannels;
    s.row = (row_blocks - 1 - block % row_blocks) * s.rows;
    s.mask.key_tiles(s.row, s.row + s.rows, kTileKeys, s.first, s.end);
    const int64_t plane =
        static_cast<int64_t>(b) * shape.kv_heads + n / (shape.heads / shape.kv_heads);
    const int64_t tiles = plane * mask_tiles(shape.keys);
    s.keys = p.k8 + plane * shape.keys * Config::kHeadDim;
    s.values = static_cast<const unsigned char*>(p.v_pv) +
               plane * Values::plane_bytes(Config::kHeadDim, shape.keys) +
               Values::plane_bytes(s.channel, shape.keys);  // channels follow each other, if split
    s.key_scales = p.k_scale + tiles;
    s.value_scales = p.v_scale + (Values::kTileMaximum ? tiles : plane * Config::kHeadDim);
    s.value_means = p.v_mean + plane * Config::kHeadDim;
    return s;
  }

  // The first tile from `tile` on in which some query of the block sees some key, or `end`.
  __device__ int visible_from(int tile) const {
    if (mask.q_ids == nullptr && mask.state == nullptr) return tile;
    while (tile < end && mask.view(row, rows, tile * kTileKeys) == TileView::kNothing) ++tile;
    return tile;
  }
};

// The same for a warp.
template <int kWarpRows>
struct WarpState {
  int whole, whole_end;  // tiles of keys that bounds and window leave whole: nobody asks about masks there
  float row_scales[kWarpRows];
};

// ---------------------------------------------------------------------------------- tile constants

template <class Values_, int kHeadDim_>
struct ForwardConfig {
  using Values = Values_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "docs/abi.md pads to these");

  // Output channels of a block. Fewer than all: more blocks, which compute the scores again.
  static constexpr int kChannels =
      kHeadDim < Values::kMaxChannels ? kHeadDim : Values::kMaxChannels;
  static constexpr int kSplits = kHeadDim / kChannels;

  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  // 16-row tiles of a warp: two halve the traffic from shared memory per product, but the output
  // accumulators (kChannels / 2 registers each) must leave room for everything else.
  static constexpr int kRowTiles = kHeadDim == 64 || (kHeadDim == 128 && Values::kTwoRowTiles) ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  // A tile takes thousands of clocks, a copy hundreds: one tile ahead is enough where shared memory
  // would otherwise limit the blocks of a multiprocessor. 16-bit V of 256 channels leaves room for
  // one stage only: correct, not fast.
  static constexpr bool kWideValues = kHeadDim == 256 && Values::template Tile<256>::kBytes > 16384;
  static constexpr int kStages = kHeadDim == 64 ? 3 : kWideValues ? 1 : 2;
  // Blocks of a multiprocessor, which bound the registers: 16-bit probabilities take twice as many,
  // weights per tile a few more.
  static constexpr bool kLeanValues =
      sizeof(typename Values::Probabilities) <= 32 && !Values::kTileMaximum;
  static constexpr int kMinBlocks = kHeadDim == 128 && kLeanValues ? 3 : 2;

  // ------------------------------------------------------------------------------ shared-memory
  // map kStages × { K tile [64 keys][kHeadDim] s8 | V tile of kChannels, as Values wants it }
  // | Q tile [kRows][kHeadDim] s8 | kWarps × WarpState | BlockState
  using QueryTile = SharedTile<kRows, kHeadDim>;
  using KeyTile = SharedTile<kTileKeys, kHeadDim>;
  using ValueTile = typename Values::template Tile<kChannels>;
  static constexpr int kStageBytes = KeyTile::kBytes + ValueTile::kBytes;
  static constexpr int kQueriesAt = kStages * kStageBytes;
  static constexpr int kWarpStatesAt = kQueriesAt + QueryTile::kBytes;
  static constexpr int kStateAt = kWarpStatesAt + kWarps * static_cast<int>(sizeof(WarpState<kWarpRows>));
  static constexpr size_t kSharedBytes = kStateAt + sizeof(BlockState);
  static_assert(kSharedBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 offer a block 99 KiB");
};

// ------------------------------------------------------------------------------------------ pieces

// s = Q·Kᵀ for the warp's rows and 64 keys, accumulators as common/scale.cuh describes them.
template <class Config>
__device__ __forceinline__ void score(int (&s)[Config::kRowTiles][kKeyGroups][4],
                                      uint32_t query_tile, int warp_row, uint32_t key_tile) {
  const int zero[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
  for (int step = 0; step < Config::kHeadDim / 32; ++step) {
    uint32_t q[Config::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < Config::kRowTiles; ++r) {
      Config::QueryTile::load_a(q[r], query_tile, warp_row + 16 * r, step);
    }
#pragma unroll
    for (int n = 0; n < kKeyGroups; n += 2) {
      uint32_t b[4];
      Config::KeyTile::load_b16(b, key_tile, 8 * n, step);
#pragma unroll
      for (int r = 0; r < Config::kRowTiles; ++r) {
        if (step == 0) {
          ptx::mma_m16n8k32_s32_s8(s[r][n], q[r], {b[0], b[1]}, zero);
          ptx::mma_m16n8k32_s32_s8(s[r][n + 1], q[r], {b[2], b[3]}, zero);
        } else {
          ptx::mma_m16n8k32_s32_s8(s[r][n], q[r], {b[0], b[1]}, s[r][n]);
          ptx::mma_m16n8k32_s32_s8(s[r][n + 1], q[r], {b[2], b[3]}, s[r][n + 1]);
        }
      }
    }
  }
}

// -------------------------------------------------------------------------------------------
// kernel

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attention_fwd(const AttendParams p) {
  using Values = typename Config::Values;
  constexpr int kRowTiles = Config::kRowTiles, kHeadDim = Config::kHeadDim;
  constexpr int kChannels = Config::kChannels;
  const AttentionShape& shape = p.shape;

  BlockState& block = *reinterpret_cast<BlockState*>(ptx::dynamic_shared() + Config::kStateAt);
  if (threadIdx.x == 0) block = BlockState::make<Config>(p, static_cast<int>(blockIdx.x));
  __syncthreads();
  const int g = static_cast<int>(threadIdx.x) % kWarpSize / 4;
  const int warp_at = static_cast<int>(threadIdx.x) / kWarpSize * Config::kWarpRows;
  const int warp_row = block.row + warp_at;

  // --------------------------------------------------------------------------- queries and their
  // scales
  const int64_t query_rows =
      (static_cast<int64_t>(block.mask.b) * shape.heads + block.mask.n) * shape.queries;
  const uint32_t ring = ptx::shared_address(ptx::dynamic_shared());
  Config::QueryTile::template copy<Config::kThreads>(
      ring + Config::kQueriesAt, p.q8 + (query_rows + block.row) * kHeadDim, kHeadDim,
      shape.queries - block.row);  // belongs to the first group of copies
  auto& warp = reinterpret_cast<WarpState<Config::kWarpRows>*>(
      ptx::dynamic_shared() + Config::kWarpStatesAt)[threadIdx.x / kWarpSize];
  if constexpr (kRowTiles == 2) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, row = warp_row + lane;
    warp.row_scales[lane] = (row < shape.queries ? p.q_scale[query_rows + row] : 0.0f) * (p.scale * kLog2E);
    if (lane == 0) block.mask.whole_tiles(warp_row, Config::kWarpRows, warp.whole, warp.whole_end);
  }
  float row_scale[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < (kRowTiles == 1 ? 2 : 0); ++i) {
    const int row = warp_row + g + 8 * i;
    const float scale = row < shape.queries ? p.q_scale[query_rows + row] : 0.0f;
    row_scale[i / 2][i % 2] = scale * (p.scale * kLog2E);
  }
  float o[kRowTiles][kChannels / 8][4] = {};
  RowSoftmax softmax[kRowTiles];

  // -------------------------------------------------------------------------------------- main
  // loop Step n starts the copies of the tile that step n + kStages - 1 computes with; the first
  // kStages - 1 steps, the negative ones, do nothing else.
  constexpr int kAhead = Config::kStages - 1;
  int queue[kAhead + 1] = {};  // tiles under way, the next one to compute with first
  int next = block.first - 1;
  for (int step = -kAhead, stage = 0;; ++step) {
    if (step >= 0) {
      if (kAhead > 0 && queue[0] >= block.end) break;
      ptx::cp_async_wait_group<kAhead == 0 ? 0
                                           : kAhead - 1>();  // this tile's copies of this thread
      __syncthreads();  // ... and of all others; and nobody reads the stage that is filled next
    }
    next = block.visible_from(next + 1);
    if (next < block.end) {
      const int filled = step < 0 ? step + kAhead : (stage == 0 ? kAhead : stage - 1);
      const uint32_t at = ring + filled * Config::kStageBytes;
      const int key = next * kTileKeys;
      // Registers: of two row tiles nothing that follows from the thread's number is kept between tiles.
      const int thread = kRowTiles == 2 ? ptx::opaque_thread() : static_cast<int>(threadIdx.x);
      const int8_t* const keys = block.keys + static_cast<int64_t>(key) * kHeadDim;
      if constexpr (kRowTiles == 2) {
        Config::KeyTile::template copy_run<Config::kThreads>(at, keys, shape.keys - key, thread);
      } else {
        Config::KeyTile::template copy<Config::kThreads>(at, keys, kHeadDim, shape.keys - key);
      }
      Values::template copy<kChannels, Config::kThreads>(at + Config::KeyTile::kBytes, block.values,
                                                         key, shape.keys, thread);
    }
    ptx::cp_async_commit();  // empty groups too: the count of groups stays that of tiles
    queue[kAhead] = next;
    const int tile = queue[0];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) queue[i] = queue[i + 1];
    if (step < 0) continue;
    if constexpr (kAhead ==
                  0) {  // nothing overlaps: the tile that was just started is computed with
      if (tile >= block.end) break;
      ptx::cp_async_wait_group<0>();
      __syncthreads();
    }

    const int key = tile * kTileKeys, stage_at = stage * Config::kStageBytes;
    stage = stage + 1 == Config::kStages ? 0 : stage + 1;
    const float key_scale = block.key_scales[tile];  // needed after the products: no need to wait
    const float tile_scale = fabsf(key_scale);
    const bool has_bad_keys = key_scale < 0.0f;
    const float value_scale =
        Values::kTileMaximum ? block.value_scales[tile] * (1.0f / 127.0f) : 1.0f;
    const TileView view = kRowTiles == 2 && tile >= warp.whole && tile < warp.whole_end
                              ? TileView::kAll
                              : block.mask.view(warp_row, Config::kWarpRows, key);
    if (view == TileView::kNothing) continue;  // for this warp only: others may see keys

    int s[kRowTiles][kKeyGroups][4];
    score<Config>(s, ring + Config::kQueriesAt, warp_at, ring + stage_at);

    const bool hide = has_bad_keys || view == TileView::kSome;
    uint32_t bad = 0;
    if (has_bad_keys) bad = bad_keys<typename Config::KeyTile>(ptx::dynamic_shared() + stage_at);
    typename Values::Probabilities probabilities[kRowTiles];
    float weight[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      RowSoftmax& rows = softmax[r];
      if (hide) rows.hide(s[r], block.mask, warp_row + 16 * r + g, key, bad);

      int best[2];
      float multiplier[2], top[2], shift[2], shrink[2];
      row_maximum(s[r], best);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        multiplier[c] = score_multiplier(kRowTiles == 1 ? row_scale[r][c] : warp.row_scales[16 * r + 8 * c + g], tile_scale);
        top[c] = accumulated(best[c]) * multiplier[c];
      }
      if (rows.raise_maximum(top, shrink)) {
#pragma unroll
        for (int n = 0; n < kChannels / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) o[r][n][c] *= shrink[c >> 1];
        }
        rows.l[0] *= shrink[0];
        rows.l[1] *= shrink[1];
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        // 0 where they are equal, for rows that have seen nothing yet, too: -inf.
        const float below = top[c] == rows.m[c] ? 0.0f : top[c] - rows.m[c];
        shift[c] = Values::kExponentBias + (Values::kTileMaximum ? 0.0f : below);
        weight[r][c] = Values::kTileMaximum ? ptx::ex2(below) : 1.0f;
      }

      float e[kKeyGroups][4], sum[2];
      exponentials(s[r], best, multiplier, shift, e, sum);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        rows.l[c] = fmaf(sum[c], weight[r][c], rows.l[c]);
        weight[r][c] *= value_scale;
      }
      Values::pack(probabilities[r], e);
    }
    Values::template multiply<kChannels, kRowTiles>(o, probabilities, weight,
                                                    ring + stage_at + Config::KeyTile::kBytes);
  }
  ptx::cp_async_wait_group<0>();

  // ---------------------------------------------------------------------------------------
  // epilogue
  const Mask& mask = block.mask;
  // Found again: else ptxas keeps rows and their addresses in registers throughout the loop.
  const int thread = ptx::opaque_thread(), t = thread % 4;
  const int first_row =
      block.row + thread / kWarpSize * Config::kWarpRows + thread % kWarpSize / 4;
  const int first_channel = Config::kSplits == 1 ? 0 : block.channel;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int r = i / 2, c = i % 2, row = first_row + 8 * i;
    float l = quad_sum(softmax[r].l[c]) * Values::kRowSumScale;
    float m = softmax[r].m[c];
    if (row >= shape.queries) continue;
    const int64_t at = (static_cast<int64_t>(mask.b) * shape.heads + mask.n) * shape.queries + row;
    if (row >= mask.queries) {
      l = 0.0f;
      m = -INFINITY;
    } else if (l != 0.0f && isnan(p.q_scale[at])) {
      l = NAN;
    }
    if (t == 0 && first_channel == 0) {
      p.l[at] = l;
      p.m[at] = m;
      p.lse[at] = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2 + p.lse_shift[at];
    }
    const float factor = l == 0.0f ? 0.0f : Values::kOutputScale / l;
    const int64_t out_at =
        ((static_cast<int64_t>(mask.b) * shape.queries + row) * shape.heads + mask.n) *
        shape.head_dim;
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      const int channel = first_channel + 8 * n + 2 * t;
      float x[2];
      for (int k = 0; k < 2; ++k) {
        const float scale = Values::kTileMaximum ? 1.0f : block.value_scales[channel + k];
        const float mean = Values::kFormat == PvFormat::kE4m3 ? block.value_means[channel + k] : 0.0f;
        x[k] = l == 0.0f ? 0.0f : fmaf(o[r][n][2 * c + k] * factor, scale, mean);
      }
      store_channels(p.out, p.out_dtype, out_at, channel, shape.head_dim, x[0], x[1]);
    }
  }
}

template <class Config>
const char* launch_attention_fwd(const AttendParams& params, Stream stream) {
  const AttentionShape& shape = params.shape;
  const int64_t blocks = static_cast<int64_t>(shape.batch) * shape.heads * Config::kSplits *
                         ((shape.queries + Config::kRows - 1) / Config::kRows);
  if (blocks > INT32_MAX) {
    return "sage_jax: batch · heads · query length needs more than 2^31 blocks; split the batch.";
  }
  return launch(attention_fwd<Config>, dim3(static_cast<unsigned>(blocks)), Config::kThreads,
                Config::kSharedBytes, stream, params);
}

// The table's entry of an instance of the kernel; `architecture` is the oldest that runs it.
template <class Values, int kHeadDim>
constexpr ForwardKernel forward_kernel(int architecture) {
  return {architecture, Values::kFormat, Values::kF16Accumulate, kHeadDim,
          &launch_attention_fwd<ForwardConfig<Values, kHeadDim>>};
}

}  // namespace sage::sm80
