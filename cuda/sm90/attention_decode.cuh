// A few queries against many keys on Hopper (docs/abi.md, section 3): split-K as in sm80/attention_decode.cuh, on wgmma.
// Keys and channels are the rows of its products, S = K·Qᵀ and O = Vᵀ·Pᵀ, so that 16 queries fill them: with queries as
// rows three quarters of 64 would be empty. docs/kernels/sm90_decode.md has the picture.
//
// Requirements
//   sm_90a; head dimension padded to 64 or 128; neither segments nor a dense mask; values in e4m3.
#pragma once

#include "common/launch.h"
#include "common/mask.cuh"
#include "common/scale.cuh"
#include "common/tensor_map.h"
#include "ptx/bulk_tensor.cuh"
#include "ptx/cvt.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm80/attention_decode.cuh"

namespace sage::sm90 {

// Kernel parameter.
struct DecodeCall {
  sm80::DecodeCall split;
  CUtensorMap q, k, v;
};

template <int kHeadDim_>
struct DecodeConfig {
  static constexpr int kHeadDim = kHeadDim_;
  struct Values {  // for combine_splits
    static constexpr PvFormat kFormat = PvFormat::kE4m3;
    static constexpr float kExponentBias = 8.0f;  // E·256
    static constexpr float kRowSumScale = 0x1p-8f, kOutputScale = 0x1p-8f;
  };
  static constexpr int kKeys = 128, kGroups = 2;  // of a tile; warpgroups, which take tiles in turn
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + kWarpSize;
  static constexpr int kRowTiles = kHeadDim / 64;  // of Vᵀ

  // Shared memory: kStages × {K [kKeys][kHeadDim] s8, Vᵀ [kHeadDim][kKeys] e4m3} | Q [16][kHeadDim] s8 | a group's P [16][kKeys]
  // e4m3 | maxima of its warps | barriers. At the end the groups' outputs lie in place of the stages.
  static constexpr int kTileBytes = kKeys * kHeadDim, kStageBytes = 2 * kTileBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes;
  static_assert(kStages % kGroups == 0, "a group has stages of its own");
  static constexpr int kProbabilityBytes = kDecodeRows * kKeys;
  static constexpr int kQueriesAt = kStages * kStageBytes;
  static constexpr int kProbabilitiesAt = kQueriesAt + kDecodeRows * kHeadDim;
  static constexpr int kMaximaAt = kProbabilitiesAt + kGroups * kProbabilityBytes;
  static constexpr int kBarriersAt = kMaximaAt + kGroups * 4 * kDecodeRows * static_cast<int>(sizeof(float));
  static constexpr size_t kSharedBytes = kBarriersAt + 8 * (2 * kStages + 1);
  static_assert(kProbabilitiesAt % 1024 == 0 && kSharedBytes <= 227 * 1024, "alignment of swizzled tiles, and room");
  static constexpr int kOutputStride = kHeadDim + 4;  // floats: lanes of a warp write to different banks
  static_assert(kGroups * kDecodeRows * kOutputStride * sizeof(float) <= kQueriesAt, "outputs fit the stages");

  static __device__ int full(int stage) { return kBarriersAt + 8 * stage; }
  static __device__ int empty(int stage) { return full(stage) + 8 * kStages; }
  static __device__ int queries() { return full(2 * kStages); }
};

// A block's place: up to 16 query rows that share a key head, and which of its splits.
struct DecodePlace {
  int split, b, kv_plane, first_row, rows_left;
  int64_t row;  // the first one's place in [B, N, T]

  __device__ explicit DecodePlace(const sm80::DecodeCall& call) {
    const AttentionShape& shape = call.p.shape;
    const int block = static_cast<int>(blockIdx.x), group_rows = shape.heads / shape.kv_heads * shape.queries;
    split = block % call.plan.splits;
    kv_plane = block / call.plan.splits / call.plan.row_tiles;
    b = kv_plane / shape.kv_heads;
    first_row = block / call.plan.splits % call.plan.row_tiles * kDecodeRows;
    rows_left = group_rows - first_row;
    row = static_cast<int64_t>(kv_plane) * group_rows + first_row;
  }
};

// What it works on: every splits-th tile of keys. So the blocks of a head read neighbouring tiles at the same time: rows of V are
// only 128 bytes of a tile.
template <class Config>
struct DecodeShare : DecodePlace {
  int splits, first, tiles;
  Mask mask;

  __device__ DecodeShare(const sm80::DecodeCall& call, const DecodePlace& place)
      : DecodePlace(place), splits(call.plan.splits), mask(call.p.shape, call.p.masks, call.p.workspace, b, 0) {
    int end;
    mask.key_tiles(0, call.p.shape.queries, Config::kKeys, first, end);
    first += split;
    tiles = first < end ? (end - first + splits - 1) / splits : 0;
  }

  __device__ int tile(int i) const { return first + i * splits; }
};

// What the block's first loads will wait for, while the kernel before this one ends.
__device__ __forceinline__ void prefetch(const DecodeCall& call, const DecodePlace& place) {
  for (const CUtensorMap* map : {&call.q, &call.k, &call.v}) ptx::prefetch_tensor_map(map);
  ptx::prefetch_global_l2(call.split.p.masks.bounds + 3 * static_cast<int64_t>(place.b));
  ptx::prefetch_global_l2(call.split.p.q_scale + place.row);
}

// Copies the block's queries and tiles. One thread.
template <class Config>
__device__ __forceinline__ void bring_tiles(const DecodeCall& call, const DecodeShare<Config>& at, uint32_t base) {
  ptx::mbarrier_arrive_expect_tx(base + Config::queries(), kDecodeRows * Config::kHeadDim);
  ptx::cp_async_bulk_tensor_3d(base + Config::kQueriesAt, &call.q, base + Config::queries(), 0, at.first_row, at.kv_plane);
#pragma unroll 1
  for (int i = 0; i < at.tiles; ++i) {
    const int stage = i % Config::kStages, key = at.tile(i) * Config::kKeys;
    const uint32_t full = base + Config::full(stage), to = base + stage * Config::kStageBytes;
    ptx::mbarrier_wait(base + Config::empty(stage), (i / Config::kStages & 1) ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, Config::kStageBytes);
    ptx::cp_async_bulk_tensor_3d(to, &call.k, full, 0, key, at.kv_plane);
    ptx::cp_async_bulk_tensor_3d(to + Config::kTileBytes, &call.v, full, key, 0, at.kv_plane);
  }
}

// A warpgroup's softmax and output. Lane 4g + t of warp w holds scores of keys 16w + g and 16w + g + 8 of 64, and outputs of as
// many channels: entry 4j + 2r + c of eight belongs to the key (channel) g + 8r and the query 8j + 2t + c, the thread's
// (2j + c)-th.
template <class Config>
class DecodeGroup {
  static constexpr int kHeadDim = Config::kHeadDim, kHalves = Config::kKeys / kTileKeys, kQueries = 4;
  using Maxima = float[4][kDecodeRows];                    // of a group's warps; at the end sums
  using Outputs = float[kDecodeRows][Config::kOutputStride];  // of a group

 public:
  __device__ DecodeGroup(const sm80::DecodeCall& call, const DecodeShare<Config>& at, unsigned char* shared)
      : call_(call),
        at_(at),
        shared_(shared),
        base_(ptx::shared_address(shared)),
        group_(static_cast<int>(ptx::uniform(threadIdx.x / 128))),
        warp_(static_cast<int>(threadIdx.x) / kWarpSize % 4),
        g_(static_cast<int>(threadIdx.x) % kWarpSize / 4),
        t_(static_cast<int>(threadIdx.x) % 4) {
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const bool used = row(q) < at.rows_left;
      const float scale = used ? call.p.q_scale[at.row + row(q)] : 0.0f;
      row_scale_[q] = scale * (call.p.scale * kLog2E);
      // Rows that do not exist see all, so that they never ask for a mask.
      seen_[q] = used ? at.mask.keys_of((at.first_row + row(q)) % call.p.shape.queries) : Span(0, INT_MAX - 1);
      m_[q] = -INFINITY;
      l_[q] = 0.0f;
    }
  }

  __device__ __forceinline__ void run() {
    float scales[kHalves];
    read_scales(scales, group_);
    ptx::mbarrier_wait(base_ + Config::queries(), 0);
#pragma unroll 1
    for (int i = group_; i < at_.tiles; i += Config::kGroups) {
      const int stage = i % Config::kStages;
      ptx::mbarrier_wait(base_ + Config::full(stage), i / Config::kStages & 1);
      float now[kHalves];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) now[h] = scales[h];
      read_scales(scales, i + Config::kGroups);
      tile(at_.tile(i) * Config::kKeys, stage * Config::kStageBytes, now);
      __syncwarp();
      if (g_ == 0 && t_ == 0) ptx::mbarrier_arrive(base_ + Config::empty(stage));
    }
    leave();
  }

 private:
  // Of the i-th tile, long before it is there.
  __device__ __forceinline__ void read_scales(float (&scales)[kHalves], int i) const {
    const int tile = at_.tile(i) * kHalves, all = mask_tiles(call_.p.shape.keys);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      scales[h] = i < at_.tiles && tile + h < all ? call_.p.k_scale[static_cast<int64_t>(at_.kv_plane) * all + tile + h] : 0.0f;
    }
  }

  __device__ __forceinline__ void tile(int key, int keys_at, const float (&scales)[kHalves]) {
    const uint32_t keys = (base_ + keys_at) / 16, values = keys + Config::kTileBytes / 16;
    const uint32_t queries = (base_ + Config::kQueriesAt) / 16;
    int s[kHalves][8];
    ptx::wgmma_fence();
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int step = 0; step < kHeadDim / 32; ++step) {
        const uint64_t a = ptx::shared_operand<kHeadDim, 0, 8 * kHeadDim>(keys + h * kTileKeys * kHeadDim / 16 + 2 * step);
        ptx::wgmma_m64k32_s32_s8(s[h], a, ptx::shared_operand<kHeadDim, 0, 8 * kHeadDim>(queries + 2 * step), step > 0);
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    float x[kHalves][8];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      ptx::keep_in_registers(s[h]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // Rounded by itself: the largest score minus m has to be zero.
        x[h][i] = __fmul_rn(static_cast<float>(s[h][i]), score_multiplier(row_scale_[query(i)], fabsf(scales[h])));
      }
    }
    bool whole = true;
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      whole = whole && seen_[q].contains(key) && seen_[q].contains(key + Config::kKeys - 1);
    }
    const bool bad = scales[0] < 0.0f || scales[kHalves - 1] < 0.0f;
    if (__any_sync(kFullWarp, bad || !whole)) hide(x, key, keys_at, scales);

    raise_references(x);
    probabilities(x);
    float sums[Config::kRowTiles][8];
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
      for (int step = 0; step < Config::kKeys / 32; ++step) {
        const uint64_t a = ptx::shared_operand<Config::kKeys, 0, 8 * Config::kKeys>(values + n * 64 * Config::kKeys / 16 + 2 * step);
        const uint64_t b = ptx::shared_operand<Config::kKeys, 0, 8 * Config::kKeys>((base_ + probabilities_at()) / 16 + 2 * step);
        ptx::wgmma_m64k32_f32_e4m3(sums[n], a, b, step > 0);
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    // Sums of one tile lose nothing that counts in the matrix unit; those of many would.
#pragma unroll
    for (int n = 0; n < Config::kRowTiles; ++n) {
      ptx::keep_in_registers(sums[n]);
#pragma unroll
      for (int i = 0; i < 8; ++i) o_[n][i] = fmaf(o_[n][i], shrink_[query(i)], sums[n][i]);
    }
  }

  // Replaces the scores that do not count by -inf, and poisons the rows that see a bad key.
  __device__ __forceinline__ void hide(float (&x)[kHalves][8], int key, int keys_at, const float (&scales)[kHalves]) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int within = h * kTileKeys + 16 * warp_ + g_ + 8 * r;
        const int code_at = keys_at + SharedTile<Config::kKeys, kHeadDim>::offset(within, 0);
        const bool bad = scales[h] < 0.0f && static_cast<int8_t>(shared_[code_at]) == kBadCode;
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const bool counts = seen_[q].contains(key + within);
          float& score = x[h][q / 2 * 4 + 2 * r + q % 2];
          if (counts && bad) l_[q] = NAN;
          score = counts && !bad ? score : -INFINITY;
        }
      }
    }
  }

  // Raises m to the largest scores of the tile, of all warps of the group.
  __device__ __forceinline__ void raise_references(const float (&x)[kHalves][8]) {
    float top[kQueries];
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      top[q] = -INFINITY;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        top[q] = fmaxf(top[q], fmaxf(x[h][q / 2 * 4 + q % 2], x[h][q / 2 * 4 + 2 + q % 2]));
      }
    }
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2) {
#pragma unroll
      for (int q = 0; q < kQueries; ++q) top[q] = fmaxf(top[q], __shfl_xor_sync(kFullWarp, top[q], step));
    }
    Maxima& all = maxima(group_);
    if (g_ == 0) write_rows(all[warp_], top);
    ptx::bar_sync(1 + group_, 128);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(&all[w][8 * j + 2 * t_]);
        top[2 * j] = w == 0 ? pair.x : fmaxf(top[2 * j], pair.x);
        top[2 * j + 1] = w == 0 ? pair.y : fmaxf(top[2 * j + 1], pair.y);
      }
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const float higher = fmaxf(m_[q], top[q]);
      shrink_[q] = higher == -INFINITY ? 1.0f : ptx::ex2(m_[q] - higher);
      m_[q] = higher;
      l_[q] *= shrink_[q];
    }
  }

  // Exponentials relative to m, their sums, and their codes: rows of queries, keys in the order of V's (`pi`).
  __device__ __forceinline__ void probabilities(const float (&x)[kHalves][8]) {
    unsigned char* const codes = shared_ + probabilities_at() + g_ / 2 * 4 + g_ % 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int q = 2 * j + c;
        const float m = m_[q] == -INFINITY ? 0.0f : m_[q];
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          float e[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) e[r] = ptx::ex2(x[h][4 * j + 2 * r + c] - m + Config::Values::kExponentBias);
          l_[q] += e[0] + e[1];
          const uint32_t pair = ptx::cvt_e4m3x2_f32(e[0], e[1]);
          unsigned char* const to = codes + SharedTile<kDecodeRows, Config::kKeys>::offset(row(q), 4 * h + warp_);
          to[0] = static_cast<unsigned char>(pair);
          to[2] = static_cast<unsigned char>(pair >> 8);
        }
      }
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(1 + group_, 128);
  }

  // Adds up what the groups have, and leaves it for combine_splits.
  __device__ __forceinline__ void leave() {
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2) {
#pragma unroll
      for (int q = 0; q < kQueries; ++q) l_[q] += __shfl_xor_sync(kFullWarp, l_[q], step);
    }
    auto& tops = *reinterpret_cast<float(*)[Config::kGroups][kDecodeRows]>(shared_ + Config::kProbabilitiesAt);
    ptx::bar_sync(3, Config::kConsumers);  // the groups' last tiles, codes and maxima have been read
    if (g_ == 0) write_rows(maxima(group_)[warp_], l_);
    if (g_ == 0 && warp_ == 0) write_rows(tops[group_], m_);
    auto* const outputs = reinterpret_cast<Outputs*>(shared_);
#pragma unroll
    for (int n = 0; n < Config::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = this->row(query(i));
        if (row < at_.rows_left) outputs[group_][row][64 * n + 16 * warp_ + g_ + i % 4 / 2 * 8] = o_[n][i];
      }
    }
    ptx::bar_sync(3, Config::kConsumers);
    const auto top_of = [&](int row) {
      float top = tops[0][row];
      for (int k = 1; k < Config::kGroups; ++k) top = fmaxf(top, tops[k][row]);
      return top;
    };
    const int thread = static_cast<int>(threadIdx.x), rows = min(at_.rows_left, kDecodeRows);
    constexpr int kFours = kHeadDim / 4;
    for (int i = thread; i < rows * kFours; i += Config::kConsumers) {
      const int row = i / kFours, channel = i % kFours * 4;
      const float top = top_of(row);
      float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int k = 0; k < Config::kGroups; ++k) {
        const float weight = sm80::weight_of_part(tops[k][row], top);
        const float4 x = *reinterpret_cast<const float4*>(&outputs[k][row][channel]);
        sum = {fmaf(x.x, weight, sum.x), fmaf(x.y, weight, sum.y), fmaf(x.z, weight, sum.z), fmaf(x.w, weight, sum.w)};
      }
      *reinterpret_cast<float4*>(call_.out + part_of(row) * kHeadDim + channel) = sum;
    }
    if (thread < rows) {
      const float top = top_of(thread);
      float l = 0.0f;
      for (int k = 0; k < Config::kGroups; ++k) {
        float sum = 0.0f;
        for (int w = 0; w < 4; ++w) sum += maxima(k)[w][thread];
        l = fmaf(sum, sm80::weight_of_part(tops[k][thread], top), l);
      }
      call_.m[part_of(thread)] = top;
      call_.l[part_of(thread)] = l;
    }
  }

  // The workspace's place of this part of a row.
  __device__ __forceinline__ int64_t part_of(int row) const {
    return (at_.row + row) * call_.plan.splits + at_.split;
  }

  __device__ __forceinline__ static constexpr int query(int i) { return i / 4 * 2 + i % 2; }  // of entry i
  __device__ __forceinline__ int row(int q) const { return q / 2 * 8 + 2 * t_ + q % 2; }
  __device__ __forceinline__ void write_rows(float (&rows)[kDecodeRows], const float (&x)[kQueries]) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      *reinterpret_cast<float2*>(&rows[8 * j + 2 * t_]) = make_float2(x[2 * j], x[2 * j + 1]);
    }
  }
  __device__ __forceinline__ Maxima& maxima(int group) const {
    return reinterpret_cast<Maxima*>(shared_ + Config::kMaximaAt)[group];
  }
  __device__ __forceinline__ int probabilities_at() const {
    return Config::kProbabilitiesAt + group_ * Config::kProbabilityBytes;
  }

  const sm80::DecodeCall& call_;
  const DecodeShare<Config>& at_;
  unsigned char* const shared_;
  const uint32_t base_;
  const int group_, warp_, g_, t_;
  Span seen_[kQueries] = {Span(0, -1), Span(0, -1), Span(0, -1), Span(0, -1)};
  float row_scale_[kQueries], m_[kQueries], l_[kQueries], shrink_[kQueries];
  float o_[Config::kRowTiles][8] = {};
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) attention_decode(const __grid_constant__ DecodeCall call) {
  extern __shared__ __align__(1024) unsigned char tiles_first[];
  unsigned char* const shared = tiles_first;
  const uint32_t base = ptx::shared_address(shared);
  const DecodePlace place(call.split);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(base + Config::full(i), 1);
      ptx::mbarrier_init(base + Config::empty(i), 4);  // warps of a group
    }
    ptx::mbarrier_init(base + Config::queries(), 1);
    ptx::fence_mbarrier_init();
  } else if (threadIdx.x == Config::kConsumers) {
    prefetch(call, place);
  }
  __syncthreads();
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const DecodeShare<Config> at(call.split, place);
  if (threadIdx.x < Config::kConsumers) {
    DecodeGroup<Config>(call.split, at, shared).run();
  } else if (threadIdx.x == Config::kConsumers) {
    bring_tiles<Config>(call, at, base);
  }
}

template <class Config>
const char* launch_decode(const AttendParams& params, const DecodePlan& plan, Stream stream) {
  const AttentionShape& s = params.shape;
  const int64_t planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  constexpr int kHeadDim = Config::kHeadDim;
  DecodeCall call = {sm80::DecodeCall(params, plan), {}, {}, {}};
  const int64_t group_rows = static_cast<int64_t>(s.heads / s.kv_heads) * s.queries;
  const int64_t padded_keys = static_cast<int64_t>(mask_tiles(s.keys)) * kTileKeys;
  const char* error = encode_tensor_map(call.q, {params.q8, 1, kHeadDim, group_rows, planes, kHeadDim, kDecodeRows});
  // The rest of 256 bytes of V would be another block's.
  TensorMapSpec keys = {params.k8, 1, kHeadDim, s.keys, planes, kHeadDim, Config::kKeys};
  TensorMapSpec values = {params.v_pv, 1, padded_keys, kHeadDim, planes, Config::kKeys, kHeadDim};
  keys.narrow = values.narrow = true;
  if (error == nullptr) error = encode_tensor_map(call.k, keys);
  if (error == nullptr) error = encode_tensor_map(call.v, values);
  if (error != nullptr) return error;
  const int64_t blocks = planes * plan.row_tiles * plan.splits;
  error = launch(attention_decode<Config>, dim3(static_cast<unsigned>(blocks)), Config::kThreads, Config::kSharedBytes,
                 stream, call, Start::kEarly);
  return error != nullptr ? error : sm80::launch_combine<Config>(call.split, stream);
}

}  // namespace sage::sm90
