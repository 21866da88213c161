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
#include "common/row_blocks.cuh"
#include "common/scale.cuh"
#include "common/store.cuh"
#include "common/tensor_map.h"
#include "common/tile.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma_fp4.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "sm120/forward_config.cuh"
#include "sm120/forward_softmax.cuh"
#include "sm120/forward_stream.cuh"

namespace sage::sm120 {

// A warp's view of its 16 rows; lane 4g + t holds shares of rows g and g + 8.
template <class Config>
class Consumer {
  using Slot = typename Config::Slot;
  static constexpr int kHeadDim = Config::kHeadDim, kChannels = Config::kChannels;

 public:
  __device__ __forceinline__ Consumer(const ForwardCall& call, unsigned char* shared)
      : p_(call.p),
        shared_(shared),
        base_(ptx::shared_address(shared)),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_row_(static_cast<int>(threadIdx.x) / kWarpSize * 16) {}

  // Ordinary tiles, of which every row sees every key, have a loop of their own.
  __device__ __forceinline__ void run() {
    const int group = warp_row_ / 64;
    const uint32_t whole = 3u << 2 * group;
    uint32_t view = wait_for_tile();
    while (!(view & kStop)) {
      begin_rows(slot_of(view), group);
      while (true) {
        while ((view & (whole | kEnds)) == whole) {
          attend_half(0);
          attend_half(1);
          release_tile();
          view = wait_for_tile();
        }
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
          const uint32_t all = 1u << (2 * group + half);
          if ((view & (all | all << 8)) == 0) continue;  // this warp sees no key; others may
          score(half);
          if (!(view & all)) {
            const Slot& block = slot_of(view);
            hide(s_, block.mask, block.row + warp_row_ + lane_ / 4,
                 from_lane_0(Config::notes(shared_)[stage()].key) + half * Config::kHalfKeys);
          }
          weigh(half);
        }
        release_tile();
        if (view & kEnds) break;
        view = wait_for_tile();
      }
      finish_rows(slot_of(view));
      ptx::mbarrier_arrive(base_ + Config::slot_empty(view >> kSlotBit & 1));
      view = wait_for_tile();
    }
  }

 private:
  __device__ __forceinline__ void attend_half(int half) {
    score(half);
    weigh(half);
  }

  // The warp's queries stay in registers. Lane 4g of four holds the scales of row g, 4g + 1 those of g + 8.
  __device__ __forceinline__ void begin_rows(const Slot& block, int group) {
    const int g = lane_ / 4, t = lane_ % 4, queries = p_.shape.queries;
    const int64_t first =
        (static_cast<int64_t>(block.mask.b) * p_.shape.heads + block.mask.n) * queries;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = block.row + warp_row_ + g + i % 2 * 8;
        const int64_t at = (first + row) * (kHeadDim / 2) + 32 * step + i / 2 * 16 + 4 * t;
        q_[step][i] = row < queries ? *reinterpret_cast<const uint32_t*>(p_.q4 + at) : 0;
      }
      const int row = block.row + warp_row_ + g + t % 2 * 8;
      const int64_t at = (first + row) * (kHeadDim / 16) + 4 * step;
      q_scale_[step] = row < queries ? *reinterpret_cast<const uint32_t*>(p_.q_scale + at) : 0;
    }
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) o_[n][c] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      m_[r] = kNoMaximum;
      l_[r] = 0.0f;
    }
    multiplier_ = block.multiplier[group];
  }

  // s = Q·Kᵀ + ΔS.
  __device__ __forceinline__ void score(int half) {
    const unsigned char* const tile = shared_ + stage() * Config::kStageBytes;
    const uint32_t keys = ptx::shared_address(tile);
    const auto* delta = reinterpret_cast<const float4*>(
        tile + Config::kDeltaAt + warp_row_ / 64 * (4 * Config::kKeys)) + lane_ % 4;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const int key = half * Config::kHalfKeys + 32 * group, n = 4 * group;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 start = delta[8 * (2 * half + group) + 4 * i];
        s_[n + 2 * i][0] = s_[n + 2 * i][2] = start.x;
        s_[n + 2 * i][1] = s_[n + 2 * i][3] = start.y;
        s_[n + 2 * i + 1][0] = s_[n + 2 * i + 1][2] = start.z;
        s_[n + 2 * i + 1][1] = s_[n + 2 * i + 1][3] = start.w;
      }
      const Scales k_scale = reinterpret_cast<const Scales*>(
          tile + Config::kKeyScalesAt)[32 * (2 * half + group) + lane_];
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) {
        uint32_t b[2][4];
        Config::KeyTile::load_b16_interleaved(b[0], keys, key, 0, step);
        Config::KeyTile::load_b16_interleaved(b[1], keys, key, 1, step);
        products(&s_[n], q_[step], b, q_scale_[step], k_scale.x[step]);
      }
    }
  }

  // The softmax of the scores, and o += P·V.
  __device__ __forceinline__ void weigh(int half) {
    float top[2][2], before[2] = {m_[0], m_[1]};
    block_maxima(s_, top);
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = fmaxf(top[r][0], top[r][1]);
      best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, 2)) * multiplier_;
      changed = changed || best > m_[r];
      m_[r] = fmaxf(m_[r], best);
    }
    if (__any_sync(kFullWarp, changed)) {  // rarely, after the first few tiles
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float shrink = ptx::ex2(before[r] - m_[r]);
        l_[r] *= shrink;
#pragma unroll
        for (int n = 0; n < kChannels / 8; ++n) {
          o_[n][2 * r] *= shrink;
          o_[n][2 * r + 1] *= shrink;
        }
      }
    }
    uint32_t p[4], p_scale;
    probabilities(s_, top, multiplier_, m_, p, p_scale, l_);

    const unsigned char* const tile = shared_ + stage() * Config::kStageBytes;
    const uint32_t values = ptx::shared_address(tile) + Config::kValuesAt;
    const auto* scales =
        reinterpret_cast<const uint32_t*>(tile + Config::kValueScalesAt) + half + 2 * lane_;
#pragma unroll
    for (int n = 0; n < kChannels / 8; n += 4) {
      uint32_t b[2][4];
      Config::ValueTile::load_b16_interleaved(b[0], values, 8 * n, 0, half);
      Config::ValueTile::load_b16_interleaved(b[1], values, 8 * n, 1, half);
      products(&o_[n], p, b, p_scale, scales[16 * n]);
    }
  }

  // d += A·B for 32 columns, whose scales one register of each lane holds.
  __device__ __forceinline__ static void products(float (*d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2][4], uint32_t a_scale,
                                                  uint32_t b_scale) {
    ptx::mma_m16n8k64_e2m1<0>(d[0], a, {b[0][0], b[0][1]}, d[0], a_scale, b_scale);
    ptx::mma_m16n8k64_e2m1<1>(d[1], a, {b[0][2], b[0][3]}, d[1], a_scale, b_scale);
    ptx::mma_m16n8k64_e2m1<2>(d[2], a, {b[1][0], b[1][1]}, d[2], a_scale, b_scale);
    ptx::mma_m16n8k64_e2m1<3>(d[3], a, {b[1][2], b[1][3]}, d[3], a_scale, b_scale);
  }

  __device__ __forceinline__ void finish_rows(const Slot& block) const {
    const AttentionShape& shape = p_.shape;
    const Mask& mask = block.mask;
    const int t = lane_ % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(l_[r]);
      const int row = block.row + warp_row_ + lane_ / 4 + 8 * r;
      if (row >= shape.queries) continue;
      const bool empty = total == 0.0f || row >= mask.queries;
      if (t == 0 && block.channel == 0) {
        const int64_t at = ptx::opaque(
            (mask.b * shape.heads + mask.n)) * static_cast<int64_t>(shape.queries) + row;
        const float lse = (m_[r] - kTopLog2 + log2f(total)) * kLn2 + p_.lse_shift[at];
        p_.lse[at] = empty ? -INFINITY : lse;
      }
      const float factor = empty ? 0.0f : block.value_tensor / total;
      const int64_t out_at =
          ((static_cast<int64_t>(mask.b) * shape.queries + row) * shape.heads + mask.n) *
          shape.head_dim;
      // Of every 32 channels the lane holds eight in a row, as it does of keys.
#pragma unroll
      for (int n = 0; n < kChannels / 8; n += 4) {
        const int channel = block.channel + 8 * n + 8 * t;
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float mean = block.value_means[channel + k];
          x[k] = empty ? 0.0f : fmaf(o_[n + k / 2][2 * r + k % 2], factor, mean);
        }
        store_eight(p_.out, p_.out_dtype, out_at + channel, make_float4(x[0], x[1], x[2], x[3]),
                    make_float4(x[4], x[5], x[6], x[7]), shape.head_dim - channel,
                    shape.head_dim % 8 == 0);
      }
    }
  }

  __device__ __forceinline__ const Slot& slot_of(uint32_t view) const {
    return Config::slots(shared_)[view >> kSlotBit & 1];
  }

  // What the rows see of the next tile, when it is there.
  __device__ __forceinline__ uint32_t wait_for_tile() {
    ptx::mbarrier_wait(base_ + Config::full(stage()), tile_ / Config::kStages % 2);
    return from_lane_0(Config::notes(shared_)[stage()].view);
  }

  // All lanes of the warp have done with the tile.
  __device__ __forceinline__ void release_tile() {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(base_ + Config::empty(stage()));
    ++tile_;
  }

  __device__ __forceinline__ int stage() const { return static_cast<int>(tile_ % Config::kStages); }

  struct alignas(4 * Config::kSteps) Scales {
    uint32_t x[Config::kSteps];
  };

  const AttendFp4Params& p_;
  unsigned char* const shared_;
  const uint32_t base_;
  const int lane_, warp_row_;
  uint32_t tile_ = 0;  // tiles so far
  uint32_t q_[Config::kSteps][4], q_scale_[Config::kSteps];
  float s_[kKeyGroups][4];
  float o_[kChannels / 8][4];
  float m_[2], l_[2], multiplier_ = 0.0f;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_fwd_fp4(const __grid_constant__ ForwardCall call) {
  unsigned char* const shared = ptx::dynamic_shared();
  const uint32_t base = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      // Every lane of the producer arrives when its copies have landed; lane 0 also with the note.
      ptx::mbarrier_init(base + Config::full(i), kWarpSize + 1);
      ptx::mbarrier_init(base + Config::empty(i), Config::kConsumers);
    }
    for (int i = 0; i < Config::kSlots; ++i) {
      ptx::mbarrier_init(base + Config::slot_empty(i), Config::kConsumers * kWarpSize);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x / kWarpSize >= Config::kConsumers) {
    if constexpr (Config::kMovesRegisters) ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x / kWarpSize == Config::kConsumers) Producer<Config>(call, shared).run();
  } else {
    if constexpr (Config::kMovesRegisters) ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    Consumer<Config>(call, shared).run();
  }
}

template <class Config>
const char* launch_attention_fwd_fp4(const AttendFp4Params& params, Stream stream) {
  const AttentionShape& s = params.shape;
  constexpr int kHeadDim = Config::kHeadDim;
  const int64_t kv_planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  ForwardCall call = {};
  call.p = params;
  const int64_t head_bytes = static_cast<int64_t>(s.keys) * kHeadDim;
  const char* error =
      plan_row_blocks(call.work, s, params.masks, Config::kRows, 1, head_bytes, multiprocessors());
  if (error != nullptr || call.work.items == 0) return error;
  if (call.work.items > INT32_MAX / Config::kSplits) {
    return "batch · heads · query length needs more than 2^31 blocks; split the batch.";
  }
  if (has_bulk_copies() && s.keys > 0) {
    error = encode_tensor_map(
        call.k, {params.k4, 1, kHeadDim / 2, s.keys, kv_planes, kHeadDim / 2, Config::kKeys});
    if (error != nullptr) return error;
    const int64_t padded_keys = static_cast<int64_t>(mask_tiles(s.keys)) * kTileKeys;
    error = encode_tensor_map(call.v, {params.v4, 1, padded_keys / 2, kHeadDim, kv_planes,
                                       Config::kKeys / 2, Config::kChannels});
    if (error != nullptr) return error;
  }
  const int items = call.work.items * Config::kSplits;
  const int blocks = multiprocessors() < items ? multiprocessors() : items;
  return launch(attention_fwd_fp4<Config>, dim3(blocks), Config::kThreads, Config::kSharedBytes, stream,
                call);
}

// With 256 channels a warp needs more registers: there are fewer.
template <int kConsumers>
const char* attend_with(const AttendFp4Params& params, Stream stream) {
  switch (params.shape.padded_dim) {
    case 64:
      return launch_attention_fwd_fp4<ForwardConfig<64, kConsumers>>(params, stream);
    case 128:
      return launch_attention_fwd_fp4<ForwardConfig<128, kConsumers>>(params, stream);
    case 256:
      return launch_attention_fwd_fp4<ForwardConfig<256, kConsumers == 12 ? 8 : 4>>(params, stream);
    default:
      return "the padded head dimension must be 64, 128 or 256";
  }
}

}  // namespace sage::sm120
