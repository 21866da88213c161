// Forward attention for a few queries and many keys (decoding): split-K, as Flash-Decoding (Dao et al., 2023)
// does it for 16 bits, on the 8-bit tensors of docs/abi.md, section 3. A block takes up to 16 query rows that
// share a key head (tokens of all heads of its group) and a range of keys; each of its warps walks every
// kWarps-th tile of 64 keys with a softmax state of its own. Partial results are added in a fixed order by a
// second kernel. Probabilities are rounded relative to the maximum that a warp has seen so far.
//
// Requirements
//   sm_80; head dimension padded to 64 or 128; neither segments nor a dense mask; pv e4m3, f16 or bf16.
#pragma once

#include "common/decode.h"
#include "common/seen.cuh"
#include "ptx/grid_dependency.cuh"
#include "quantize/rows.cuh"
#include "sm80/attention_fwd.cuh"

namespace sage::sm80 {

struct DecodeCall {
  AttendParams p;
  DecodePlan plan;
  float* out;  // [B, N, T, splits, Hp], relative to m and unnormalised
  float* m;    // [B, N, T, splits]
  float* l;

  DecodeCall(const AttendParams& params, const DecodePlan& plan) : p(params), plan(plan) {
    const AttentionShape& s = p.shape;
    const int64_t rows = static_cast<int64_t>(s.batch) * s.heads * s.queries * plan.splits;
    out = static_cast<float*>(p.workspace);
    m = out + rows * s.padded_dim;
    l = m + rows;
  }
};

template <class Values_, int kHeadDim_>
struct DecodeConfig {
  using Values = Values_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = 1;
  static constexpr int kWarps = 256 / kHeadDim;
  static constexpr int kRing = 96 * 1024;  // bytes for the rings of all warps: what one block of sm_86 can have
  static constexpr int kThreads = kWarps * kWarpSize;
  using QueryTile = SharedTile<kDecodeRows, kHeadDim>;
  using KeyTile = SharedTile<kTileKeys, kHeadDim>;
  using ValueTile = typename Values::template Tile<kHeadDim>;
  // Every warp has a ring of its own and waits for nobody.
  static constexpr int kStageBytes = KeyTile::kBytes + ValueTile::kBytes;
  static constexpr int kStages = kWarps * kStageBytes * 3 <= kRing ? 3 : 2;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kQueriesAt = kWarps * kWarpBytes;
  static constexpr size_t kSharedBytes = kQueriesAt + QueryTile::kBytes;
  static_assert(kSharedBytes <= kRing + 3 * 1024, "a ring has two stages at least");
  static_assert(kDecodeRows * kHeadDim * 4 <= kWarpBytes, "a warp's output fits its ring");
};

// Replaces the scores that do not count by kNoScore, and poisons the rows that see a bad key.
template <class KeyTile>
__device__ __forceinline__ void hide_outside(int (&s)[kKeyGroups][4], RowSoftmax& rows,
                                             const Span& upper, const Span& lower, int key,
                                             const unsigned char* bad_tile) {
  const uint32_t seen = seen_in_spans(upper, lower, key);
  const uint32_t bad = bad_tile != nullptr ? bad_keys<KeyTile>(bad_tile) : 0;
#pragma unroll
  for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool counts = seen >> (4 * n + c) & 1u, hidden = bad >> (2 * n + (c & 1)) & 1u;
      if (counts && hidden) rows.l[c >> 1] = NAN;
      s[n][c] = counts && !hidden ? s[n][c] : kNoScore;
    }
  }
}

// 2^(m − top), what a part's sums count for: 0 of a part that has seen no key.
__device__ __forceinline__ float weight_of_part(float m, float top) { return m == -INFINITY ? 0.0f : ptx::ex2(m - top); }

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) attention_decode(const DecodeCall call) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  using Values = typename Config::Values;
  constexpr int kHeadDim = Config::kHeadDim, kWarps = Config::kWarps, kStages = Config::kStages;
  __shared__ float tops[kWarps][kDecodeRows], sums[kWarps][kDecodeRows];
  const AttendParams& p = call.p;
  const AttentionShape& shape = p.shape;
  const int splits = call.plan.splits, block = static_cast<int>(blockIdx.x);
  const int split = block % splits, row_tile = block / splits % call.plan.row_tiles;
  const int64_t kv_plane = block / splits / call.plan.row_tiles;
  const int b = static_cast<int>(kv_plane / shape.kv_heads);
  const int group_rows = shape.heads / shape.kv_heads * shape.queries;
  const int first_row = row_tile * kDecodeRows, rows_left = group_rows - first_row;
  // Rows of all heads of the group lie one after the other.
  const int64_t row_at = kv_plane * group_rows + first_row;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, g = lane / 4, t = lane % 4;

  // --------------------------------------------------------------------------- the block's keys
  const Mask mask(shape, p.masks, p.workspace, b, 0);
  int first, end;
  mask.key_tiles(0, shape.queries, kTileKeys, first, end);
  const int share = (end - first + splits - 1) / splits;
  first += split * share;
  end = min(end, first + share);
  const int8_t* const keys = p.k8 + kv_plane * shape.keys * kHeadDim;
  const auto* const values = static_cast<const unsigned char*>(p.v_pv) +
                             kv_plane * Values::plane_bytes(kHeadDim, shape.keys);
  const float* const key_scales = p.k_scale + kv_plane * mask_tiles(shape.keys);

  // ------------------------------------------------------------------------------------ queries
  const uint32_t shared = ptx::shared_address(ptx::dynamic_shared());
  const uint32_t ring = shared + warp * Config::kWarpBytes;
  if (warp == 0) {
    Config::QueryTile::template copy<kWarpSize>(shared + Config::kQueriesAt,
                                                p.q8 + row_at * kHeadDim, kHeadDim, rows_left, lane);
  }
  ptx::cp_async_commit();
  float row_scale[2];
  const auto span_of = [&](int row) {
    return row < rows_left ? mask.keys_of((first_row + row) % shape.queries) : Span(0, -1);
  };
  const Span seen[2] = {span_of(g), span_of(g + 8)};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float scale = g + 8 * r < rows_left ? p.q_scale[row_at + g + 8 * r] : 0.0f;
    row_scale[r] = scale * (p.scale * kLog2E);
  }

  // ---------------------------------------------------------------------------------- main loop
  float o[1][kHeadDim / 8][4] = {};
  RowSoftmax rows;
  const auto start_copies = [&](int tile, int stage) {
    if (tile < end) {
      const uint32_t at = ring + stage * Config::kStageBytes;
      const int key = tile * kTileKeys;
      Config::KeyTile::template copy<kWarpSize>(
          at, keys + static_cast<int64_t>(key) * kHeadDim, kHeadDim, shape.keys - key, lane);
      Values::template copy<kHeadDim, kWarpSize>(at + Config::KeyTile::kBytes, values, key,
                                                 shape.keys, lane);
    }
    ptx::cp_async_commit();  // empty groups too: the count of groups stays that of tiles
  };
#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) start_copies(first + warp + i * kWarps, i);
  ptx::cp_async_wait_group<kStages - 1>();  // the queries
  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int tile = first + warp; tile < end; tile += kWarps) {
    ptx::cp_async_wait_group<kStages - 2>();
    __syncwarp();  // copies of all lanes are there, and nobody reads the stage that is filled next
    start_copies(tile + (kStages - 1) * kWarps, stage == 0 ? kStages - 1 : stage - 1);
    const int key = tile * kTileKeys, stage_at = warp * Config::kWarpBytes + stage * Config::kStageBytes;
    stage = stage + 1 == kStages ? 0 : stage + 1;
    const float key_scale = key_scales[tile];

    int s[1][kKeyGroups][4];
    score<Config>(s, shared + Config::kQueriesAt, 0, shared + stage_at);
    const auto whole = [&](const Span& x) { return x.contains(key) && x.contains(key + kTileKeys - 1); };
    const bool bad = key_scale < 0.0f;
    if (bad || __any_sync(kFullWarp, !whole(seen[0]) || !whole(seen[1]))) {
      hide_outside<typename Config::KeyTile>(s[0], rows, seen[0], seen[1], key,
                                             bad ? ptx::dynamic_shared() + stage_at : nullptr);
    }
    int best[2];
    float multiplier[2], top[2], shift[2], shrink[2];
    row_maximum(s[0], best);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      multiplier[r] = score_multiplier(row_scale[r], fabsf(key_scale));
      top[r] = accumulated(best[r]) * multiplier[r];
    }
    if (rows.raise_maximum(top, shrink)) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[0][n][c] *= shrink[c >> 1];
      }
      rows.l[0] *= shrink[0];
      rows.l[1] *= shrink[1];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // 0 where they are equal, for rows that have seen nothing yet, too: -inf.
      shift[r] = Values::kExponentBias + (top[r] == rows.m[r] ? 0.0f : top[r] - rows.m[r]);
    }
    float e[kKeyGroups][4], sum[2];
    exponentials(s[0], best, multiplier, shift, e, sum);
    rows.l[0] += sum[0];
    rows.l[1] += sum[1];
    typename Values::Probabilities probabilities[1];
    const float weight[1][2] = {{1.0f, 1.0f}};
    Values::pack(probabilities[0], e);
    __syncwarp();  // or ptxas loads V so early that registers spill
    Values::template multiply<kHeadDim, 1>(o, probabilities, weight,
                                           shared + stage_at + Config::KeyTile::kBytes);
  }
  ptx::cp_async_wait_group<0>();

  // -------------------------------------------------------------------------- the block's sums
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float l = quad_sum(rows.l[r]);
    if (t != 0) continue;
    tops[warp][g + 8 * r] = rows.m[r];
    sums[warp][g + 8 * r] = l;
  }
  __syncthreads();  // the rings are free as well
  const auto top_of = [&](int row) {
    float top = tops[0][row];
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w][row]);
    return top;
  };
  auto* const outputs = reinterpret_cast<float*>(ptx::dynamic_shared());  // [kWarps][16][kHeadDim]
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = g + 8 * r;
    const float weight = weight_of_part(rows.m[r], top_of(row));
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        outputs[(warp * kDecodeRows + row) * kHeadDim + 8 * n + 2 * t + c] =
            o[0][n][2 * r + c] * weight;
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kDecodeRows * kHeadDim; i += Config::kThreads) {
    const int row = i / kHeadDim;
    if (row >= rows_left) continue;
    float sum = outputs[i];
    for (int w = 1; w < kWarps; ++w) sum += outputs[w * kDecodeRows * kHeadDim + i];
    call.out[((row_at + row) * splits + split) * kHeadDim + i % kHeadDim] = sum;
  }
  const int row = static_cast<int>(threadIdx.x);
  if (row < kDecodeRows && row < rows_left) {
    const float top = top_of(row);
    float l = 0.0f;
    for (int w = 0; w < kWarps; ++w) l += sums[w][row] * weight_of_part(tops[w][row], top);
    call.m[(row_at + row) * splits + split] = top;
    call.l[(row_at + row) * splits + split] = l;
  }
}

// A channel of a query row, once the parts are added up: what that takes besides sums, and where it goes.
template <class Config>
class RowEnd {
  using Values = typename Config::Values;

 public:
  // `row` of [B, N, T].
  __device__ RowEnd(const AttendParams& p, int64_t row, int channel) : p_(p), row_(row), channel_(channel) {
    const AttentionShape& shape = p.shape;
    const int64_t plane = row / shape.queries;
    query_ = static_cast<int>(row % shape.queries);
    n_ = static_cast<int>(plane % shape.heads);
    b_ = static_cast<int>(plane / shape.heads);
    const int64_t kv_plane = static_cast<int64_t>(b_) * shape.kv_heads + n_ / (shape.heads / shape.kv_heads);
    scale_at_ = kv_plane * Config::kHeadDim + channel;
  }

  // While the kernel before this one still works.
  __device__ __forceinline__ void prefetch() const {
    ptx::prefetch_global_l2(p_.v_scale + scale_at_);
    if (Values::kFormat == PvFormat::kE4m3) ptx::prefetch_global_l2(p_.v_mean + scale_at_);
    if (channel_ != 0) return;
    ptx::prefetch_global_l2(p_.q_scale + row_);
    ptx::prefetch_global_l2(p_.lse_shift + row_);
    ptx::prefetch_global_l2(p_.masks.bounds + 3 * static_cast<int64_t>(b_));
  }

  // Before the sums are there.
  __device__ __forceinline__ void read() {
    queries_ = min(p_.masks.bounds[3 * static_cast<int64_t>(b_)], p_.shape.queries);
    q_scale_ = p_.q_scale[row_];
    lse_shift_ = p_.lse_shift[row_];
    if (channel_ >= p_.shape.head_dim) return;
    v_scale_ = p_.v_scale[scale_at_];
    v_mean_ = Values::kFormat == PvFormat::kE4m3 ? p_.v_mean[scale_at_] : 0.0f;
  }

  // `sum` and `l` relative to m.
  __device__ __forceinline__ void store(float sum, float m, float l) const {
    l *= Values::kRowSumScale;
    if (query_ >= queries_) {
      l = 0.0f;
      m = -INFINITY;
    } else if (l != 0.0f && isnan(q_scale_)) {
      l = NAN;
    }
    if (channel_ == 0) {
      p_.l[row_] = l;
      p_.m[row_] = m;
      p_.lse[row_] = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2 + lse_shift_;
    }
    const AttentionShape& shape = p_.shape;
    if (channel_ >= shape.head_dim) return;
    const float x = l == 0.0f ? 0.0f : fmaf(sum * (Values::kOutputScale / l), v_scale_, v_mean_);
    const int64_t token = static_cast<int64_t>(b_) * shape.queries + query_;
    store_one(p_.out, p_.out_dtype, (token * shape.heads + n_) * shape.head_dim + channel_, x);
  }

 private:
  const AttendParams& p_;
  const int64_t row_;
  const int channel_;
  int b_, n_, query_, queries_ = 0;
  int64_t scale_at_;
  float q_scale_ = 0.0f, lse_shift_ = 0.0f, v_scale_ = 0.0f, v_mean_ = 0.0f;
};

// One block adds the parts of one query row: a warp some of the parts, a lane some of the channels. Everything that is
// read from memory is asked for before anything is waited for, because its latency is most of what this takes.
template <class Config>
struct CombineConfig {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kChannels = Config::kHeadDim / kWarpSize;  // of a lane
  static constexpr int kAhead = 4;                                // parts of a warp that are read at once
};

template <class Config>
__global__ void __launch_bounds__(CombineConfig<Config>::kThreads) combine_splits(const DecodeCall call) {
  using Combine = CombineConfig<Config>;
  constexpr int kHeadDim = Config::kHeadDim, kWarps = Combine::kWarps, kChannels = Combine::kChannels;
  __shared__ float parts[kWarps][kHeadDim];
  const int splits = call.plan.splits;
  const int64_t row = blockIdx.x, part = row * splits;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int channel = static_cast<int>(threadIdx.x);
  RowEnd<Config> end(call.p, row, channel);
  if (channel < kHeadDim) end.prefetch();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();

  float ahead[Combine::kAhead][kChannels];
  const auto read = [&](int i, float (&x)[kChannels]) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      x[c] = i < splits ? call.out[(part + i) * kHeadDim + c * kWarpSize + lane] : 0.0f;
    }
  };
#pragma unroll
  for (int k = 0; k < Combine::kAhead; ++k) read(warp + k * kWarps, ahead[k]);
  if (channel < kHeadDim) end.read();

  // Every warp looks at all maxima and sums: of its own lanes' parts.
  float m = -INFINITY, l = 0.0f;
  for (int i = lane; i < splits; i += kWarpSize) m = fmaxf(m, call.m[part + i]);
  m = lanes_max<kWarpSize>(m);
  const auto weight_of = [&](int i) { return weight_of_part(call.m[part + i], m); };
  for (int i = lane; i < splits; i += kWarpSize) l = fmaf(call.l[part + i], weight_of(i), l);
  l = lanes_sum<kWarpSize>(l);
  float o[kChannels] = {};
  const auto add = [&](int i, const float (&x)[kChannels]) {
    const float weight = i < splits ? weight_of(i) : 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) o[c] = fmaf(x[c], weight, o[c]);
  };
#pragma unroll
  for (int k = 0; k < Combine::kAhead; ++k) add(warp + k * kWarps, ahead[k]);
  for (int i = warp + Combine::kAhead * kWarps; i < splits; i += kWarps) {
    float x[kChannels];
    read(i, x);
    add(i, x);
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) parts[warp][c * kWarpSize + lane] = o[c];
  __syncthreads();
  if (channel >= kHeadDim) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w][channel];

  end.store(sum, m, l);
}

template <class Config>
const char* launch_combine(const DecodeCall& call, Stream stream) {
  const AttentionShape& s = call.p.shape;
  const int64_t rows = static_cast<int64_t>(s.batch) * s.heads * s.queries;
  return launch(combine_splits<Config>, dim3(static_cast<unsigned>(rows)), CombineConfig<Config>::kThreads, 0, stream,
                call, Start::kEarly);
}

template <class Config>
const char* launch_split(const AttendParams& params, const DecodePlan& plan, Stream stream) {
  const AttentionShape& s = params.shape;
  const DecodeCall call(params, plan);
  const int64_t blocks = static_cast<int64_t>(s.batch) * s.kv_heads * plan.row_tiles * plan.splits;
  const char* const error =
      launch(attention_decode<Config>, dim3(static_cast<unsigned>(blocks)), Config::kThreads,
             Config::kSharedBytes, stream, call, Start::kEarly);
  return error != nullptr ? error : launch_combine<Config>(call, stream);
}

}  // namespace sage::sm80
