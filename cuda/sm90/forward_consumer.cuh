// The consumers of the forward kernel of Hopper: scores, softmax and P·V of 64 query rows a warpgroup, and what becomes of
// finished rows. docs/kernels/sm90_forward.md has the picture.
#pragma once

#include "common/mask.cuh"
#include "common/scale.cuh"
#include "common/tile.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/forward_config.cuh"
#include "sm90/forward_softmax.cuh"
#include "sm90/forward_stream.cuh"
#include "sm90/forward_sums.cuh"
#include "sm90/forward_values.cuh"
#include "sm90/store_rows.cuh"
#include "sm90/turns.cuh"

namespace sage::sm90 {

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
      if (ended_) fetch_for_end(lse_shift);
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
    choose_floor();
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
    summed_ += Config::kKeys;
    ended_ = flags_ & kEnds;
    wait_for_tile();
    int slot = slot_;
    if (__builtin_expect(ended_, 0) && !(Config::notes(shared_)[stage_].flags & kStop)) {
      slot ^= 1;
      ptx::mbarrier_wait(base_ + Config::slot_full(slot), slot_phase_ ^ (slot == 0));
    }
    read_note();
    choose_floor();
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
    ptx::keep_in_registers(o_.d);
    release(Config::v_empty(before(stage_)));
  }

  __device__ __forceinline__ void shrink() {
    if (shrink_.any) o_.shrink(shrink_.by);
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
        const float x = (__int_as_float(best) - Config::kStart) * multiplier[h][r];
        top[r] = h == 0 ? x : fmaxf(top[r], x);
      }
      if constexpr (Values::kBounded) highest_[r] = fmaxf(highest_[r], top[r]);
      top[r] = quad_max(fmaxf(top[r], floor_[r]));
    }
    shrink_ = raise_reference(top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float m = m_[r] == -INFINITY ? 0.0f : m_[r];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        shift[h][r] = fmaf(-Config::kStart, multiplier[h][r], Values::kExponentBias - m);
      }
      l_[r] *= shrink_.by[r];
    }
    exponentials<Config>(s_, multiplier, shift, zero_, l_, p);
  }

  // The least that a row's reference may be in the next tile, by what is known before its scores are there.
  __device__ __forceinline__ void choose_floor() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      floor_[r] = m_[r];
      if constexpr (Values::kBounded) {
        if (l_[r] > Values::kMostProbability / Values::kUnit) floor_[r] += Values::kRaise;
      }
    }
  }

  // Q·Kᵀ of this warpgroup's rows, on top of kStart.
  __device__ __forceinline__ void issue_scores(int slot) {
    constexpr int kRow = kHeadDim;  // bytes
    const uint32_t a = units_ + (slot * Config::kQueryBytes + group_ * 64 * kRow) / 16;
    const uint32_t b = units_ + (Config::kKeysAt + stage_ * Config::kKeyBytes) / 16;
    const uint64_t start = ptx::shared_operand<0, 0, 0>(units_ + Config::kStartAt / 16);
    ptx::wgmma_fence();
    ptx::wgmma_m64k32_f32_e4m3(s_, start, start);
#pragma unroll
    for (int step = 0; step < kHeadDim / 32; ++step) {
      ptx::wgmma_m64k32_s32_s8(s_, ptx::shared_operand<kRow, 0, 8 * kRow>(a + 2 * step),
                               ptx::shared_operand<kRow, 0, 8 * kRow>(b + 2 * step), 1);
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ void begin_rows() {
    const Slot& slot = Config::slots(shared_)[slot_];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      m_[r] = floor_[r] = highest_[r] = -INFINITY;
      l_[r] = exact_l_[r] = 0.0f;
      row_scale_[r] = slot.q_scale[warp_row_ + lane_ / 4 + 8 * r] * (params_.scale * kLog2E * Config::kStartUnits);
    }
    summed_ = 0;
    exact_ = false;
  }

  // Raises m to `top`, which is not below it.
  __device__ __forceinline__ Shrink raise_reference(const float (&top)[2]) {
    Shrink shrink;
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      changed = changed || top[r] != m_[r];
      shrink.by[r] = top[r] == -INFINITY ? 1.0f : ptx::ex2(m_[r] - top[r]);
      m_[r] = top[r];
    }
    shrink.any = __any_sync(kFullWarp, changed);
    return shrink;
  }

  // What the float32 sums have to be multiplied with for the reference of now.
  __device__ __forceinline__ float shrink_of_exact(int r) const {
    return !exact_ || exact_m_[r] == -INFINITY ? 0.0f : ptx::ex2(exact_m_[r] - m_[r]);
  }

  // The matrix unit's sums with those in shared memory, of which each thread has its own.
  __device__ __forceinline__ void read_sums(float (&total)[kHeadDim / 2]) {
    const float shrink[2] = {shrink_of_exact(0), shrink_of_exact(1)};
    const float4* const sums = reinterpret_cast<const float4*>(warp_region()) + lane_;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const FourOutputs x = o_.at(n);
      float4 sum = make_float4(x.upper.x, x.upper.y, x.lower.x, x.lower.y);
      if (exact_) {
        const float4 old = sums[n * kWarpSize];
        sum = make_float4(fmaf(old.x, shrink[0], sum.x), fmaf(old.y, shrink[0], sum.y),
                          fmaf(old.z, shrink[1], sum.z), fmaf(old.w, shrink[1], sum.w));
      }
      total[4 * n] = sum.x, total[4 * n + 1] = sum.y, total[4 * n + 2] = sum.z, total[4 * n + 3] = sum.w;
    }
  }

  // Leaves them all in shared memory.
  __device__ __forceinline__ void add_exactly() {
    float total[kHeadDim / 2];
    read_sums(total);
    float4* const sums = reinterpret_cast<float4*>(warp_region()) + lane_;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      sums[n * kWarpSize] = make_float4(total[4 * n], total[4 * n + 1], total[4 * n + 2], total[4 * n + 3]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      exact_l_[r] = fmaf(exact_l_[r], shrink_of_exact(r), l_[r]);
      exact_m_[r] = m_[r];
      // With sums that are empty again no reference needs to be above the maximum.
      m_[r] = floor_[r] = quad_max(highest_[r]);
      l_[r] = 0.0f;
    }
    exact_ = true;
    summed_ = 0;
  }

  // ---------------------------------------------------------------------------------- epilogue

  // What finish_rows needs, early, because memory is far away.
  __device__ __forceinline__ void fetch_for_end(float (&shift)[2]) const {
    const Slot& slot = Config::slots(shared_)[slot_];
    const int64_t plane = static_cast<int64_t>(slot.mask.b) * params_.shape.heads + slot.mask.n;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = slot.row + warp_row_ + lane_ / 4 + 8 * r;
      shift[r] = row < params_.shape.queries ? params_.lse_shift[plane * params_.shape.queries + row] : 0.0f;
    }
    constexpr int kLine = 128 / sizeof(float);
    if (lane_ < kHeadDim / kLine) ptx::prefetch_global_l1(v_scale(slot) + lane_ * kLine);
  }

  __device__ __forceinline__ const float* v_scale(const Slot& slot) const {
    return params_.v_scale + static_cast<int64_t>(slot.kv_plane) * kHeadDim;
  }

  __device__ __forceinline__ void finish_rows(const Slot& slot, const float (&lse_shift)[2]) {
    const AttentionShape& shape = params_.shape;
    const Mask& mask = slot.mask;
    const int lane = ptx::opaque(lane_), g = lane / 4, t = lane % 4;
    const auto* const scales = reinterpret_cast<const float2*>(v_scale(slot)) + t;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int within = warp_row_ + g + 8 * r, row = slot.row + within;
      float l = quad_sum(fmaf(exact_l_[r], shrink_of_exact(r), l_[r])) * Values::kUnit, m = m_[r];
      if (row >= mask.queries) {
        l = 0.0f;
        m = -INFINITY;
      } else if (l != 0.0f && isnan(slot.q_scale[within])) {
        l = NAN;
      }
      factor[r] = l == 0.0f ? 0.0f : Values::kUnit / l;
      if constexpr (Values::kBounded) {  // from the reference to the maximum
        const float highest = quad_max(highest_[r]);
        if (m != -INFINITY && m != highest) {
          l *= ptx::ex2(m - highest);
          m = highest;
        }
      }
      if (t == 0 && row < shape.queries) {
        const int64_t at = (static_cast<int64_t>(mask.b) * shape.heads + mask.n) * shape.queries + row;
        params_.l[at] = l;
        params_.m[at] = m;
        params_.lse[at] = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2 + lse_shift[r];
      }
    }
    const auto output = [&](int n, const FourOutputs& sums) {
      const float2 scale = __ldg(scales + 4 * n);  // prefetched
      float2 mean = {0.0f, 0.0f};
      if constexpr (Values::kFormat == PvFormat::kE4m3) ptx::cvt_f32_bf16x2(mean.x, mean.y, slot.v_mean[4 * n + t]);
      const auto scaled = [&](float2 sum, float by) {
        return by == 0.0f ? float2{0.0f, 0.0f}
                          : float2{fmaf(sum.x * by, scale.x, mean.x), fmaf(sum.y * by, scale.y, mean.y)};
      };
      return FourOutputs{scaled(sums.upper, factor[0]), scaled(sums.lower, factor[1])};
    };
    const int64_t first =
        ((static_cast<int64_t>(mask.b) * shape.queries + slot.row + warp_row_) * shape.heads +
         mask.n) * shape.head_dim;
    const auto store = [&](const auto& outputs) {
      store_rows<kHeadDim>(warp_region(), outputs, params_.out, params_.out_dtype, first,
                           shape.queries - slot.row - warp_row_, static_cast<int64_t>(shape.heads) * shape.head_dim,
                           shape.head_dim);
    };
    if (Values::kExactKeys > 0 && exact_) {
      float total[kHeadDim / 2];
      read_sums(total);  // before outputs take their place
      store([&](int n) { return output(n, FromArray<kHeadDim>{total}(n)); });
    } else {
      store([&](int n) { return output(n, o_.at(n)); });
    }
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
  typename Values::template Sums<kHeadDim> o_;
  uint32_t p0_[Config::kProbabilities], p1_[Config::kProbabilities];
  // What probabilities are relative to, what they add up to, the least that m_ may be next, and the highest scores of this
  // thread, which m_ equals but for floors.
  float m_[2], l_[2], floor_[2], highest_[2];
  float row_scale_[2];
  float exact_l_[2], exact_m_[2];  // of the sums in shared memory: what l_ and m_ were
  Shrink shrink_;   // due before the next product with V
  int summed_ = 0;  // keys in o_
  bool exact_ = false;  // there are sums in shared memory
};

}  // namespace sage::sm90
