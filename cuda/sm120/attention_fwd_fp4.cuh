// FP4 attention (docs/nvfp4.md, "What is computed"), after SageAttention3 (arXiv 2505.11594), sections 3.2 to
// 3.4. Made for the block-scaled FP4 products of sm_120a; everywhere else the same source runs on the
// emulated product of ptx/mma_fp4.cuh. docs/kernels/sm120_fp4.md has the picture.
//
// Requirements
//   head dimension padded to 64, 128 or 256; every pointer to codes 16-byte aligned;
//   mask summaries computed beforehand on the same stream (common/mask.cuh).
#pragma once

#include "common/launch.h"
#include "common/mask.cuh"
#include "common/params_fp4.h"
#include "common/scale.cuh"
#include "common/store.cuh"
#include "common/tile.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/cvt.cuh"
#include "ptx/cvt_fp4.cuh"
#include "ptx/math.cuh"
#include "ptx/mma_fp4.cuh"
#include "ptx/shared.cuh"

namespace sage::sm120 {

inline constexpr float kTopLog2 = 11.392317422778762f;  // log2(448·6): P is in units of 1/2688
inline constexpr float kTop = 448.0f * 6.0f;
inline constexpr float kSixLog2 = 2.584962500721156f;
inline constexpr float kSmallestScale = 0x1p-9f;  // of e4m3

// What a block knows about itself; in shared memory, because registers are dear.
struct BlockState {
  Mask mask;
  int row;         // its first query
  int channel;     // the first of its outputs
  int first, end;  // the tiles of keys that bounds and window leave to it
  const uint8_t *keys, *key_scales;
  const uint8_t *values, *value_scales;  // from `channel` on
  const float *delta, *value_means;      // of its queries; of all channels
  float multiplier;                      // from products to the log2 domain
  float value_tensor;
};

template <int kHeadDim_>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "docs/abi.md pads to these");
  // Output channels of a block. Fewer than all: more blocks, which compute the scores again.
  static constexpr int kChannels = kHeadDim < 128 ? kHeadDim : 128;
  static constexpr int kSplits = kHeadDim / kChannels;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16 * kWarps;
  static_assert(kFp4Queries % kRows == 0, "a block's queries share one tensor scale and one ΔS");
  static constexpr int kSteps = kHeadDim / 64;        // products along the channels of Q and K
  static constexpr int kKeyScaleBytes = kHeadDim / 16;  // of a key
  static constexpr int kStages = 2;
  // The emulated product needs registers of its own, 256 channels more queries.
  static constexpr int kMinBlocks = ptx::kHasFp4 && kHeadDim < 256 ? 3 : 2;

  // kStages × { K codes [64][Hp/2] | V codes [channels][32] | K scales [64][Hp/16] | V scales [channels][4]
  // | ΔS [64] } | BlockState
  using KeyTile = SharedTile<kTileKeys, kHeadDim / 2>;
  using ValueTile = SharedTile<kChannels, kTileKeys / 2>;
  static constexpr int kValuesAt = KeyTile::kBytes;
  static constexpr int kKeyScalesAt = kValuesAt + ValueTile::kBytes;
  static constexpr int kValueScalesAt = kKeyScalesAt + kTileKeys * kKeyScaleBytes;
  static constexpr int kDeltaAt = kValueScalesAt + 4 * kChannels;
  static constexpr int kStageBytes = kDeltaAt + 4 * kTileKeys;
  static_assert(kStageBytes % 128 == 0, "tiles start at multiples of 128 bytes");
  static constexpr int kStateAt = kStages * kStageBytes;
  static constexpr size_t kSharedBytes = kStateAt + sizeof(BlockState);
};

template <class Config>
__device__ BlockState make_state(const AttendFp4Params& p, int block) {
  const AttentionShape& shape = p.shape;
  // Blocks of one head follow each other, so that its keys stay in L2; the last rows come first, because
  // under a causal mask they see the most keys.
  const int row_blocks = (shape.queries + Config::kRows - 1) / Config::kRows;
  const int share = block % Config::kSplits;
  block /= Config::kSplits;
  const int n = block / row_blocks % shape.heads, b = block / row_blocks / shape.heads;
  BlockState s = {Mask(shape, p.masks, p.workspace, b, n)};
  s.channel = share * Config::kChannels;
  s.row = (row_blocks - 1 - block % row_blocks) * Config::kRows;
  s.mask.key_tiles(s.row, s.row + Config::kRows, kTileKeys, s.first, s.end);
  const int64_t plane = static_cast<int64_t>(b) * shape.kv_heads + n / (shape.heads / shape.kv_heads);
  const int64_t padded_keys = static_cast<int64_t>(mask_tiles(shape.keys)) * kTileKeys;
  const int64_t queries = (static_cast<int64_t>(b) * shape.heads + n) * query_blocks(shape) +
                          s.row / kFp4Queries;
  const int64_t row = plane * Config::kHeadDim + s.channel;
  s.keys = p.k4 + plane * shape.keys * (Config::kHeadDim / 2);
  s.key_scales = p.k_scale + plane * shape.keys * Config::kKeyScaleBytes;
  s.values = p.v4 + row * (padded_keys / 2);
  s.value_scales = p.v_scale + row * (padded_keys / kFp4Block);
  s.delta = p.delta + queries * shape.keys;
  s.value_means = p.v_mean + plane * Config::kHeadDim;
  s.value_tensor = p.v_tensor[plane];
  // Not 0: -inf, the score of a hidden key, times 0 would be NaN.
  s.multiplier = fmaxf(p.q_tensor[queries] * (p.scale * kLog2E) * p.k_tensor[plane], 0x1p-126f);
  return s;
}

// Starts the copies of the tile of keys that begins at `key`.
template <class Config>
__device__ __forceinline__ void copy_tile(const BlockState& block, uint32_t stage, int key, int keys) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t padded_keys = static_cast<int64_t>(mask_tiles(keys)) * kTileKeys;
  Config::KeyTile::template copy<Config::kThreads>(
      stage, block.keys + static_cast<int64_t>(key) * (Config::kHeadDim / 2), Config::kHeadDim / 2,
      keys - key);
  Config::ValueTile::template copy<Config::kThreads>(
      stage + Config::kValuesAt, block.values + key / 2, static_cast<uint32_t>(padded_keys / 2),
      Config::kChannels);
  for (int c = thread; c < Config::kChannels; c += Config::kThreads) {
    ptx::cp_async<4>(stage + Config::kValueScalesAt + 4 * c,
                     block.value_scales + (c * padded_keys + key) / kFp4Block, true);
  }
  const int j = thread % kTileKeys;
  const bool valid = key + j < keys;
  if (thread < kTileKeys) {
    constexpr int kBytes = Config::kKeyScaleBytes;
    ptx::cp_async<kBytes>(stage + Config::kKeyScalesAt + kBytes * j,
                          block.key_scales + static_cast<int64_t>(key + j) * kBytes, valid);
  } else {
    ptx::cp_async<4>(stage + Config::kDeltaAt + 4 * j, block.delta + key + j, valid);
  }
}

// A warp's 16 × 64 scores: lane 4g + t has of row g in s[n][0..1], and of row g + 8 in s[n][2..3], the keys
// 32·(n/4) + 8t + 2·(n%4) + {0, 1}: eight in a row for every four n.
__device__ __forceinline__ int key_of(int n, int c) {
  return n / 4 * 32 + static_cast<int>(threadIdx.x) % 4 * 8 + n % 4 * 2 + (c & 1);
}

inline constexpr int kKeyGroups = kTileKeys / 8;

// s = Q·Kᵀ + ΔS.
template <class Config>
__device__ __forceinline__ void score(float (&s)[kKeyGroups][4],
                                      const uint32_t (&q)[Config::kSteps][4],
                                      const uint32_t (&q_scale)[Config::kSteps],
                                      const unsigned char* stage) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const uint32_t keys = ptx::shared_address(stage);
  const auto* delta = reinterpret_cast<const float2*>(stage + Config::kDeltaAt);
#pragma unroll
  for (int n = 0; n < kKeyGroups; ++n) {
    const float2 start = delta[key_of(n, 0) / 2];
    s[n][0] = s[n][2] = start.x;
    s[n][1] = s[n][3] = start.y;
  }
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    // Lane 4g + t has the scales of the key that is column g of the t-th eight.
    const int g = lane / 4, key = 32 * group + g / 2 * 8 + lane % 4 * 2 + g % 2;
    const auto* scales = reinterpret_cast<const uint32_t*>(stage + Config::kKeyScalesAt +
                                                           key * Config::kKeyScaleBytes);
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const uint32_t k_scale = scales[step];
      uint32_t b[2][4];
      Config::KeyTile::load_b16_interleaved(b[0], keys, 32 * group, 0, step);
      Config::KeyTile::load_b16_interleaved(b[1], keys, 32 * group, 1, step);
      auto& x = s;
      const int n = 4 * group;
      ptx::mma_m16n8k64_e2m1<0>(x[n], q[step], {b[0][0], b[0][1]}, x[n], q_scale[step], k_scale);
      ptx::mma_m16n8k64_e2m1<1>(x[n + 1], q[step], {b[0][2], b[0][3]}, x[n + 1], q_scale[step],
                                k_scale);
      ptx::mma_m16n8k64_e2m1<2>(x[n + 2], q[step], {b[1][0], b[1][1]}, x[n + 2], q_scale[step],
                                k_scale);
      ptx::mma_m16n8k64_e2m1<3>(x[n + 3], q[step], {b[1][2], b[1][3]}, x[n + 3], q_scale[step],
                                k_scale);
    }
  }
}

// Replaces the scores that do not count by -inf. `query` is the row of s[.][0..1], `key` the tile's first.
__device__ __forceinline__ void hide(float (&s)[kKeyGroups][4], const Mask& mask, int query, int key) {
  uint32_t seen = 0;  // bit 4n + c for s[n][c]
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    const int n = bit / 4, c = bit % 4;
    seen = seen << 1 | (mask.visible(query + (c >> 1) * 8, key + key_of(n, c)) ? 1u : 0u);
  }
#pragma unroll
  for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[n][c] = seen >> (4 * n + c) & 1u ? s[n][c] : -INFINITY;
  }
}

// The largest score of each block of 16 keys that this lane shares with lane ^ 1: top[r][u] for row g + 8r and
// keys 32u + 16·(t/2) ... NaN scores do not count.
__device__ __forceinline__ void block_maxima(const float (&s)[kKeyGroups][4], float (&top)[2][2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      float x = fmaxf(s[4 * u][2 * r], s[4 * u][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < 4; ++n) x = fmaxf(fmaxf(x, s[4 * u + n][2 * r]), s[4 * u + n][2 * r + 1]);
      top[r][u] = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
    }
  }
}

// P as an A operand with its scales, and each row's sum over the lane's keys. In units of 1/2688 of the row's
// largest probability so far, 2^(s·multiplier − m) is at most 2688. A block's scale is its largest number
// over 6, rounded; dividing by it is free, because its logarithm goes into the exponent of every number,
// and the sum takes it back.
__device__ __forceinline__ void probabilities(const float (&s)[kKeyGroups][4], const float (&top)[2][2],
                                              float multiplier, const float (&m)[2],
                                              uint32_t (&p)[4], uint32_t& scales, float (&sum)[2]) {
  float shift[2], wanted[4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shift[r] = kTopLog2 - (m[r] == -INFINITY ? 0.0f : m[r]);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      wanted[2 * r + u] = ptx::ex2(fmaf(top[r][u], multiplier, shift[r] - kSixLog2));
    }
  }
  const uint32_t mine = ptx::cvt_e4m3x4_f32(wanted[0], wanted[1], wanted[2], wanted[3]);
  float rounded[4];
  ptx::cvt_f32_e4m3x4(rounded, mine);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] = 0.0f;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      // A scale that rounds to 0 makes products of 0, whatever the codes; the sum wants a number.
      const float scale = fmaxf(rounded[2 * r + u], kSmallestScale);
      const float start = shift[r] - ptx::lg2(scale);
      float e[8], total = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        e[i] = ptx::ex2(fmaf(s[4 * u + i / 2][2 * r + i % 2], multiplier, start));
        total += e[i];
      }
      sum[r] = fmaf(total, scale, sum[r]);
      p[2 * u + r] = ptx::cvt_e2m1x8_f32(e);
    }
  }
  // Lanes 0 and 2 of four have the four blocks of row g between them, so have lanes 1 and 3 of row g + 8.
  const uint32_t other = __shfl_xor_sync(kFullWarp, mine, 2);
  scales = ptx::prmt(mine, other, threadIdx.x % 2 == 0 ? 0x5140 : 0x7362);
}

// o += P·V.
template <class Config>
__device__ __forceinline__ void multiply(float (&o)[Config::kChannels / 8][4], const uint32_t (&p)[4],
                                         uint32_t p_scale, const unsigned char* stage) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const uint32_t values = ptx::shared_address(stage) + Config::kValuesAt;
  const auto* scales = reinterpret_cast<const uint32_t*>(stage + Config::kValueScalesAt);
#pragma unroll
  for (int n = 0; n < Config::kChannels / 8; n += 4) {
    const uint32_t v_scale = scales[8 * n + lane % 4 * 8 + lane / 4];
    uint32_t b[2][4];
    Config::ValueTile::load_b16(b[0], values, 8 * n, 0);
    Config::ValueTile::load_b16(b[1], values, 8 * n + 16, 0);
    ptx::mma_m16n8k64_e2m1<0>(o[n], p, {b[0][0], b[0][1]}, o[n], p_scale, v_scale);
    ptx::mma_m16n8k64_e2m1<1>(o[n + 1], p, {b[0][2], b[0][3]}, o[n + 1], p_scale, v_scale);
    ptx::mma_m16n8k64_e2m1<2>(o[n + 2], p, {b[1][0], b[1][1]}, o[n + 2], p_scale, v_scale);
    ptx::mma_m16n8k64_e2m1<3>(o[n + 3], p, {b[1][2], b[1][3]}, o[n + 3], p_scale, v_scale);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    attention_fwd_fp4(const AttendFp4Params p) {
  constexpr int kHeadDim = Config::kHeadDim, kChannels = Config::kChannels;
  const AttentionShape& shape = p.shape;
  unsigned char* const shared = ptx::dynamic_shared();
  BlockState& block = *reinterpret_cast<BlockState*>(shared + Config::kStateAt);
  if (threadIdx.x == 0) block = make_state<Config>(p, static_cast<int>(blockIdx.x));
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  const int warp_row = block.row + static_cast<int>(threadIdx.x) / kWarpSize * 16;

  // The warp's queries stay in registers. Lane 4g of four holds the scales of row g, 4g + 1 those of g + 8.
  const int64_t query_rows =
      (static_cast<int64_t>(block.mask.b) * shape.heads + block.mask.n) * shape.queries;
  uint32_t q[Config::kSteps][4], q_scale[Config::kSteps];
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp_row + g + i % 2 * 8;
      const int64_t at = (query_rows + row) * (kHeadDim / 2) + 32 * step + i / 2 * 16 + 4 * t;
      q[step][i] = row < shape.queries ? *reinterpret_cast<const uint32_t*>(p.q4 + at) : 0;
    }
    const int row = warp_row + g + t % 2 * 8;
    const int64_t at = (query_rows + row) * (kHeadDim / 16) + 4 * step;
    q_scale[step] = row < shape.queries ? *reinterpret_cast<const uint32_t*>(p.q_scale + at) : 0;
  }

  float o[kChannels / 8][4] = {};
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f};
  const uint32_t ring = ptx::shared_address(shared);
  const auto seen_from = [&](int tile) {  // the first tile in which some query sees some key, or the end
    if (block.mask.spans_only()) return tile;
    while (tile < block.end && block.mask.view(block.row, Config::kRows, tile * kTileKeys) ==
                                   TileView::kNothing) {
      ++tile;
    }
    return tile;
  };
  int tile = seen_from(block.first);
  if (tile < block.end) copy_tile<Config>(block, ring, tile * kTileKeys, shape.keys);
  ptx::cp_async_commit();
  for (int stage = 0; tile < block.end; stage ^= 1) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // all copies of the tile are there; nobody reads the other stage any more
    const int next = seen_from(tile + 1), key = tile * kTileKeys;
    if (next < block.end) {
      copy_tile<Config>(block, ring + (stage ^ 1) * Config::kStageBytes, next * kTileKeys, shape.keys);
    }
    ptx::cp_async_commit();
    tile = next;
    const TileView view = block.mask.view(warp_row, 16, key);
    if (view == TileView::kNothing) continue;  // for this warp only: others may see keys
    const unsigned char* const at = shared + stage * Config::kStageBytes;

    float s[kKeyGroups][4];
    score<Config>(s, q, q_scale, at);
    if (view == TileView::kSome) hide(s, block.mask, warp_row + g, key);
    const float multiplier = block.multiplier;
    float top[2][2], shrink[2];
    block_maxima(s, top);
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = fmaxf(top[r][0], top[r][1]);
      best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 2)) * multiplier;
      const float higher = fmaxf(m[r], best);
      changed = changed || higher != m[r];
      shrink[r] = higher == -INFINITY ? 1.0f : ptx::ex2(m[r] - higher);
      m[r] = higher;
    }
    if (__any_sync(kFullWarp, changed)) {  // rarely, after the first few tiles
#pragma unroll
      for (int n = 0; n < kChannels / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[n][c] *= shrink[c >> 1];
      }
      l[0] *= shrink[0];
      l[1] *= shrink[1];
    }
    uint32_t probability[4], scales;
    float sum[2];
    probabilities(s, top, multiplier, m, probability, scales, sum);
    l[0] += sum[0];
    l[1] += sum[1];
    multiply<Config>(o, probability, scales, at);
  }
  ptx::cp_async_wait_group<0>();

  // ---------------------------------------------------------------------------------------- epilogue
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = quad_sum(l[r]);
    const int row = warp_row + g + 8 * r;
    if (row >= shape.queries) continue;
    const bool empty = total == 0.0f || row >= block.mask.queries;
    if (t == 0 && block.channel == 0) {
      const float lse = (m[r] - kTopLog2 + log2f(total)) * kLn2 + p.lse_shift[query_rows + row];
      p.lse[query_rows + row] = empty ? -INFINITY : lse;
    }
    const float factor = empty ? 0.0f : block.value_tensor / total;
    const int64_t out_at =
        ((static_cast<int64_t>(block.mask.b) * shape.queries + row) * shape.heads + block.mask.n) *
        shape.head_dim;
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      const int channel = block.channel + 8 * n + 2 * t;
      float x[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        x[k] = empty ? 0.0f : fmaf(o[n][2 * r + k], factor, block.value_means[channel + k]);
      }
      if (shape.head_dim % 2 == 0) {
        if (channel < shape.head_dim) store_two(p.out, p.out_dtype, out_at + channel, x[0], x[1]);
      } else {
        if (channel < shape.head_dim) store_one(p.out, p.out_dtype, out_at + channel, x[0]);
        if (channel + 1 < shape.head_dim) store_one(p.out, p.out_dtype, out_at + channel + 1, x[1]);
      }
    }
  }
}

template <int kHeadDim>
const char* launch_attention_fwd_fp4(const AttendFp4Params& params, Stream stream) {
  using Config = ForwardConfig<kHeadDim>;
  const AttentionShape& shape = params.shape;
  const int64_t blocks = static_cast<int64_t>(shape.batch) * shape.heads * Config::kSplits *
                         ((shape.queries + Config::kRows - 1) / Config::kRows);
  if (blocks > INT32_MAX) {
    return "batch · heads · query length needs more than 2^31 blocks; split the batch";
  }
  return launch(attention_fwd_fp4<Config>, dim3(static_cast<unsigned>(blocks)), Config::kThreads,
                Config::kSharedBytes, stream, params);
}

}  // namespace sage::sm120
