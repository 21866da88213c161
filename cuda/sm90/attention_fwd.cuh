// Forward attention for Hopper (docs/abi.md, section 3): wgmma, bulk tensor copies, warp roles.
// Sources of the algorithm: SageAttention2 (arXiv 2411.10958), FlashAttention-3 (arXiv 2407.08608).
// docs/kernels/sm90_forward.md has the picture.
//
// Requirements
//   sm_90a; head dimension padded to 64 or 128; at least one query and one key;
//   mask summaries computed beforehand on the same stream (common/mask.cuh).
#pragma once

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/mask.cuh"
#include "common/scale.cuh"
#include "common/softmax.cuh"
#include "common/tensor_map.h"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/forward_config.cuh"
#include "sm90/forward_softmax.cuh"
#include "sm90/forward_stream.cuh"
#include "sm90/forward_values.cuh"
#include "sm90/store_rows.cuh"
#include "sm90/turns.cuh"

namespace sage::sm90 {

// --------------------------------------------------------------------------------------- consumers

// A warpgroup's view of its 64 rows; a thread holds shares of rows g and g + 8 of its warp's 16.
template <class Config>
class Consumer {
  using Values = typename Config::Values;
  using Slot = typename Config::Slot;
  static constexpr int kScores = Config::kScores, kHeadDim = Config::kHeadDim;

  // What a row's output so far has to be multiplied with.
  struct Shrink {
    float by[2];
    bool any;
  };

 public:
  __device__ __forceinline__ Consumer(const ForwardCall& call, unsigned char* shared, int group)
      : params_(call.p),
        zero_(call.zero),
        shared_(shared),
        base_(ptx::shared_address(shared)),
        units_(base_ / 16),
        group_(group),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        warp_row_(64 * group + static_cast<int>(threadIdx.x) / kWarpSize % 4 * 16) {}

  // The loop over ordinary tiles is a piece of code of its own, without a branch to anything rare: what
  // lies between costs misses of the instruction cache. Both halves of it are written out, so that
  // probabilities alternate between registers that are known to the compiler. Nothing is under way in
  // the matrix unit where a loop closes: ptxas gives up overlapping products with anything otherwise.
  __device__ __forceinline__ void run() {
    wait_for_tile();
    read_note();
    if (flags_ & kStop) return;
    if constexpr (Config::kBuffers == 1) Turns<Config::kGroups>::begin(group_);
    ptx::mbarrier_wait(base_ + Config::slot_full(0), 0);
    begin_rows();
    prime_scores();
    issue_scores(0);
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_registers(s_);
    while (true) {
      if (flags_ & (kHide << group_)) {
        const Slot& slot = Config::slots(shared_)[slot_];
        hide<Config>(s_, slot.mask, slot.row + warp_row_ + lane_ / 4,
                       Config::notes(shared_)[stage_].key, flags_ & kBadKeys,
                       shared_ + Config::keys(stage_), l_);
      }
      softmax(p0_);
      shrink();
      if constexpr (Config::kBuffers == 1) {
        while (true) {
          if (__builtin_expect(serial_step(), 0)) break;
          softmax(p0_);
          shrink();
        }
      } else {
        while (true) {
          if (__builtin_expect(begin_step(p0_), 0)) break;
          softmax(p1_);
          end_step(p1_);
          if (__builtin_expect(begin_step(p1_), 0)) break;
          softmax(p0_);
          end_step(p0_);
        }
      }
      float lse_shift[2];
      if (ended_) load_lse_shift(lse_shift);
      if constexpr (Config::kBuffers == 2) wait_for_output();
      if (ended_) {
        finish_rows(Config::slots(shared_)[slot_], lse_shift);
        release(Config::slot_empty(slot_));
        if (flags_ & kStop) return;
        slot_phase_ ^= slot_;
        slot_ ^= 1;
        begin_rows();
      } else if (exact_sum_is_due()) {
        add_exactly();
        summed_ = 0;
      }
    }
  }

 private:
  // Issues the scores of the next tile and, behind them, P·V of the one at hand, whose probabilities are
  // in `p`; waits for the scores. Returns whether something rare is due before their softmax.
  __device__ __forceinline__ bool begin_step(uint32_t (&p)[Config::kProbabilities]) {
    const int stage = stage_;
    ended_ = flags_ & kEnds;
    wait_for_tile();
    int slot = slot_;
    if (__builtin_expect(ended_, 0) && !(Config::notes(shared_)[stage_].flags & kStop)) {
      slot ^= 1;
      ptx::mbarrier_wait(base_ + Config::slot_full(slot), slot_phase_ ^ (slot == 0));
    }
    issue_scores(slot);  // after the end: of whatever lies there
    ptx::keep_in_registers(p);
    ptx::wgmma_fence();
    Values::template multiply<Config>(
        o_, p, units_ + (Config::kValuesAt + stage * Config::kValueBytes) / 16, summed_ != 0);
    ptx::wgmma_commit_group();
    summed_ += Config::kKeys;
    read_note();
    ptx::wgmma_wait_group<1>();
    ptx::keep_in_registers(s_);
    return ended_ || flags_ & (kHide << group_) || exact_sum_is_due();
  }

  // P·V of the tile at hand, then the scores of the next, one warpgroup after the other: while one multiplies the
  // others evaluate.
  __device__ __forceinline__ bool serial_step() {
    Turns<Config::kGroups>::wait(group_);
    ptx::keep_in_registers(p0_);
    ptx::wgmma_fence();
    Values::template multiply<Config>(
        o_, p0_, units_ + (Config::kValuesAt + stage_ * Config::kValueBytes) / 16, summed_ != 0);
    ptx::wgmma_commit_group();
    prime_scores();
    summed_ += Config::kKeys;
    ended_ = flags_ & kEnds;
    wait_for_tile();
    int slot = slot_;
    if (__builtin_expect(ended_, 0) && !(Config::notes(shared_)[stage_].flags & kStop)) {
      slot ^= 1;
      ptx::mbarrier_wait(base_ + Config::slot_full(slot), slot_phase_ ^ (slot == 0));
    }
    read_note();
    wait_for_output();
    issue_scores(slot);
    ptx::wgmma_wait_group<0>();
    Turns<Config::kGroups>::pass(group_);
    ptx::keep_in_registers(s_);
    return ended_ || flags_ & (kHide << group_) || exact_sum_is_due();
  }

  __device__ __forceinline__ bool exact_sum_is_due() const {
    return Values::kExactKeys > 0 && summed_ == Values::kExactKeys;
  }

  // Waits for P·V. Probabilities have no sign: what they add to the number of a barrier, on which nobody
  // waits, is zero. But ptxas, which does not know it, cannot move the wait above the exponentials.
  __device__ __forceinline__ void end_step(const uint32_t (&p)[Config::kProbabilities]) {
    ptx::bar_arrive(1 + group_ + static_cast<int>(p[Config::kProbabilities - 1] >> 31), 128);
    wait_for_output();
    shrink();
  }

  // Waits for P·V of the tile before.
  __device__ __forceinline__ void wait_for_output() {
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_registers(o_);
    release(Config::v_empty(before(stage_)));
  }

  __device__ __forceinline__ void shrink() {
    if (!shrink_.any) return;
#pragma unroll
    for (int i = 0; i < Config::kOutputs; ++i) o_[i] *= shrink_.by[i >> 1 & 1];
  }

  __device__ __forceinline__ static int before(int stage) {
    return stage == 0 ? Config::kStages - 1 : stage - 1;
  }

  // Moves on to the next tile, when it is there.
  __device__ __forceinline__ void wait_for_tile() {
    stage_ = next_stage_;
    ptx::mbarrier_wait(base_ + Config::full(stage_), phase_);
    if (++next_stage_ == Config::kStages) {
      next_stage_ = 0;
      phase_ ^= 1;
    }
  }

  __device__ __forceinline__ void read_note() {
    flags_ = ptx::uniform(Config::notes(shared_)[stage_].flags);
  }

  // Probabilities of the tile whose scores are in s_, and the state of the rows.
  __device__ __forceinline__ void softmax(uint32_t (&p)[Config::kProbabilities]) {
    const TileNote note = Config::notes(shared_)[stage_];
    release(Config::k_empty(stage_));

    constexpr int kHalves = Config::kKeys / kTileKeys;
    float multiplier[kHalves][2], shift[kHalves][2], top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        multiplier[h][r] = score_multiplier(row_scale_[r], note.scale[h]);
        int best = max(s_[32 * h + 2 * r], s_[32 * h + 2 * r + 1]);
#pragma unroll
        for (int n = 1; n < 8; ++n) {
          best = max(max(best, s_[32 * h + 4 * n + 2 * r]), s_[32 * h + 4 * n + 2 * r + 1]);
        }
        const float x = accumulated(best + Config::kScoreOffset) * multiplier[h][r];
        top[r] = h == 0 ? x : fmaxf(top[r], x);
      }
      top[r] = quad_max(top[r]);
    }
    shrink_ = raise_maximum(top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float m = m_[r] == -INFINITY ? 0.0f : m_[r];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        shift[h][r] = fmaf(-kMagic, multiplier[h][r], Values::kExponentBias - m);
      }
      l_[r] *= shrink_.by[r];
    }
    exponentials<Config>(s_, multiplier, shift, zero_, l_, p);
  }

  __device__ __forceinline__ void prime_scores() {
    if constexpr (Config::kPrimed) {
#pragma unroll
      for (int& score : s_) score = kMagicBits;
      ptx::keep_in_registers(s_);
    }
  }

  // Q·Kᵀ of this warpgroup's rows.
  __device__ __forceinline__ void issue_scores(int slot) {
    constexpr int kRow = kHeadDim;  // bytes
    const uint32_t a = units_ + (slot * Config::kQueryBytes + group_ * 64 * kRow) / 16;
    const uint32_t b = units_ + (Config::kKeysAt + stage_ * Config::kKeyBytes) / 16;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 32; ++step) {
      ptx::wgmma_m64k32_s32_s8(s_, ptx::shared_operand<kRow, 0, 8 * kRow>(a + 2 * step),
                               ptx::shared_operand<kRow, 0, 8 * kRow>(b + 2 * step),
                               Config::kPrimed || step > 0);
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ void begin_rows() {
    const Slot& slot = Config::slots(shared_)[slot_];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      m_[r] = -INFINITY;
      l_[r] = 0.0f;
      row_scale_[r] = slot.q_scale[warp_row_ + lane_ / 4 + 8 * r] * (params_.scale * kLog2E);
    }
    summed_ = 0;
    exact_ = false;
  }

  // Raises m to cover `top`.
  __device__ __forceinline__ Shrink raise_maximum(const float (&top)[2]) {
    Shrink shrink;
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float higher = fmaxf(m_[r], top[r]);
      changed = changed || higher != m_[r];
      shrink.by[r] = higher == -INFINITY ? 1.0f : ptx::ex2(m_[r] - higher);
      m_[r] = higher;
    }
    shrink.any = __any_sync(kFullWarp, changed);
    return shrink;
  }

  // Adds the matrix unit's sums to those in shared memory, of which each thread has its own.
  __device__ __forceinline__ void add_exactly() {
    float4* const sums = reinterpret_cast<float4*>(warp_region());
    float shrink[2] = {0.0f, 0.0f};
    if (exact_) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        shrink[r] = exact_m_[r] == -INFINITY ? 0.0f : ptx::ex2(exact_m_[r] - m_[r]);
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kOutputs; i += 4) {
      float4& sum = sums[i / 4 * kWarpSize + lane_];
      float4 x = make_float4(o_[i], o_[i + 1], o_[i + 2], o_[i + 3]);
      if (exact_) {
        const float4 old = sum;
        x = make_float4(fmaf(old.x, shrink[0], x.x), fmaf(old.y, shrink[0], x.y),
                        fmaf(old.z, shrink[1], x.z), fmaf(old.w, shrink[1], x.w));
      }
      sum = x;
    }
    exact_ = true;
    exact_m_[0] = m_[0];
    exact_m_[1] = m_[1];
  }

  // ---------------------------------------------------------------------------------- epilogue

  // Early: memory is far away.
  __device__ __forceinline__ void load_lse_shift(float (&shift)[2]) const {
    const Slot& slot = Config::slots(shared_)[slot_];
    const int64_t plane = static_cast<int64_t>(slot.mask.b) * params_.shape.heads + slot.mask.n;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = slot.row + warp_row_ + lane_ / 4 + 8 * r;
      shift[r] = row < params_.shape.queries ? params_.lse_shift[plane * params_.shape.queries + row] : 0.0f;
    }
  }

  __device__ __forceinline__ void finish_rows(const Slot& slot, const float (&lse_shift)[2]) {
    const AttentionShape& shape = params_.shape;
    const Mask& mask = slot.mask;
    const int lane = ptx::opaque(lane_), g = lane / 4, t = lane % 4;
    if (Values::kExactKeys > 0 && exact_) {
      add_exactly();
      const float4* const sums = reinterpret_cast<const float4*>(warp_region());
#pragma unroll
      for (int i = 0; i < Config::kOutputs; i += 4) {
        const float4 x = sums[i / 4 * kWarpSize + lane_];
        o_[i] = x.x, o_[i + 1] = x.y, o_[i + 2] = x.z, o_[i + 3] = x.w;
      }
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int within = warp_row_ + g + 8 * r, row = slot.row + within;
      float l = quad_sum(l_[r]) * Values::kUnit, m = m_[r];
      if (row >= mask.queries) {
        l = 0.0f;
        m = -INFINITY;
      } else if (l != 0.0f && isnan(slot.q_scale[within])) {
        l = NAN;
      }
      if (t == 0 && row < shape.queries) {
        const int64_t at = (static_cast<int64_t>(mask.b) * shape.heads + mask.n) * shape.queries + row;
        params_.l[at] = l;
        params_.m[at] = m;
        params_.lse[at] = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2 + lse_shift[r];
      }
      factor[r] = l == 0.0f ? 0.0f : Values::kUnit / l;
    }
#pragma unroll
    for (int i = 0; i < Config::kOutputs; ++i) {
      const int r = i >> 1 & 1;
      const float scale = slot.v_scale[i / 4 * 8 + 2 * t + (i & 1)];
      float2 mean = {0.0f, 0.0f};
      if constexpr (Values::kFormat == PvFormat::kE4m3) {
        mean = __ldg(reinterpret_cast<const float2*>(slot.v_mean + i / 4 * 8 + 2 * t));
      }
      o_[i] = factor[r] == 0.0f ? 0.0f : fmaf(o_[i] * factor[r], scale, i & 1 ? mean.y : mean.x);
    }
    const int64_t first =
        ((static_cast<int64_t>(mask.b) * shape.queries + slot.row + warp_row_) * shape.heads +
         mask.n) * shape.head_dim;
    const int rows = shape.queries - slot.row - warp_row_;
    store_rows<kHeadDim>(warp_region(), o_, params_.out, params_.out_dtype, first, rows,
                         static_cast<int64_t>(shape.heads) * shape.head_dim, shape.head_dim);
  }

  // All lanes of the warp have done with it.
  __device__ __forceinline__ void release(int barrier) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(base_ + barrier);
  }

  __device__ __forceinline__ unsigned char* warp_region() {
    return shared_ + Config::kWarpsAt + warp_row_ / 16 * Config::kWarpBytes;
  }

  const AttendParams& params_;
  const float zero_;
  unsigned char* const shared_;
  const uint32_t base_, units_;  // where shared memory begins, in bytes and in 16-byte units
  const int group_, lane_, warp_row_;
  int stage_ = 0, next_stage_ = 0;  // of the tile at hand, and of the one after it
  uint32_t phase_ = 0;              // of next_stage_
  int slot_ = 0;
  uint32_t slot_phase_ = 0;
  uint32_t flags_ = 0;  // of the tile at hand
  bool ended_ = false;  // the tile before it was the last of its row block
  int s_[kScores];
  float o_[Config::kOutputs];
  uint32_t p0_[Config::kProbabilities], p1_[Config::kProbabilities];
  float m_[2], l_[2], row_scale_[2], exact_m_[2];
  Shrink shrink_;  // due before the next product with V
  int summed_ = 0;      // keys in o_
  bool exact_ = false;  // there are sums in shared memory
};

// -------------------------------------------------------------------------------------------
// kernel

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_fwd(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(1024) unsigned char tiles_first[];
  unsigned char* const shared = tiles_first;
  const uint32_t base = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(base + Config::full(i), 1);
      ptx::mbarrier_init(base + Config::k_empty(i), 4 * Config::kGroups);
      ptx::mbarrier_init(base + Config::v_empty(i), 4 * Config::kGroups);
    }
    for (int i = 0; i < Config::kSlots; ++i) {
      ptx::mbarrier_init(base + Config::slot_full(i), kWarpSize);
      ptx::mbarrier_init(base + Config::slot_empty(i), 4 * Config::kGroups);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group = static_cast<int>(ptx::uniform(threadIdx.x / 128));
  if (group == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) Producer<Config>(call, shared).run();
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    Consumer<Config>(call, shared, group - 1).run();
  }
}

template <class Config>
const char* launch_attention_fwd(const AttendParams& params, Stream stream) {
  using Values = typename Config::Values;
  const AttentionShape& s = params.shape;
  const int64_t planes = static_cast<int64_t>(s.batch) * s.heads;
  const int64_t kv_planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  if (planes == 0 || s.queries == 0) return nullptr;
  ForwardCall call = {};
  call.p = params;
  call.zero = 0.0f;
  const int64_t head_bytes =
      static_cast<int64_t>(s.keys) * Config::kHeadDim * (1 + Values::kElementBytes);
  const char* error =
      plan_row_blocks(call.work, s, params.masks, Config::kRows, head_bytes, multiprocessors());
  if (error != nullptr) return error;
  constexpr int kHeadDim = Config::kHeadDim;
  error = encode_tensor_map(
      call.q, {params.q8, 1, kHeadDim, s.queries, planes, kHeadDim, Config::kRows});
  if (error == nullptr) {
    error = encode_tensor_map(call.k,
                              {params.k8, 1, kHeadDim, s.keys, kv_planes, kHeadDim, Config::kKeys});
  }
  if (error == nullptr) {
    const int64_t padded_keys = static_cast<int64_t>(mask_tiles(s.keys)) * kTileKeys;
    error = encode_tensor_map(
        call.v, Values::kElementBytes == 1
                    ? TensorMapSpec{params.v_pv, 1, padded_keys, kHeadDim, kv_planes, Config::kKeys,
                                    kHeadDim}
                    : TensorMapSpec{params.v_pv, 2, kHeadDim, s.keys, kv_planes, 64, Config::kKeys});
  }
  if (error != nullptr) return error;
  const int blocks = multiprocessors() < call.work.items ? multiprocessors() : call.work.items;
  return launch(attention_fwd<Config>, dim3(blocks), Config::kThreads, Config::kSharedBytes, stream,
                call);
}

}  // namespace sage::sm90
