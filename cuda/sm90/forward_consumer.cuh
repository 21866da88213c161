// The consumers of the forward kernel of Hopper: scores, softmax and P·V of 64 query rows a warpgroup.
// docs/kernels/sm90_forward.md has the picture.
#pragma once

#include "common/mask.cuh"
#include "common/scale.cuh"
#include "common/tile.cuh"
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
#include "sm90/store_tiles.cuh"

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
      : call_(call),
        params_(call.p),
        zero_(call.zero),
        shared_(shared),
        base_(ptx::shared_address(shared)),
        units_(base_ / 16),
        group_(group),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize) {}

  __device__ __forceinline__ void run() {
    wait_for_tile();
    read_note();
    if (flags_ & kStop) return;
    ptx::mbarrier_wait(base_ + Config::slot_full(0), 0);
    while (!(flags_ & kStop)) {
      if (has_rows()) {
        begin_rows();
        issue_scores(slot_);
        ptx::wgmma_wait_group<0>();
        ptx::keep_in_registers(s_);
        row_blocks();
      } else {
        pass_over_row_block();
        next_slot();
      }
    }
    wait_for_sent_tiles();
  }

 private:
  // From a row block's first tile, whose scores are there, to the end of the stream or to a row block of which this warpgroup
  // has no rows.
  //
  // The loop over ordinary tiles is a piece of code of its own, without a branch to anything rare: what lies between costs
  // misses of the instruction cache. With two buffers of probabilities both halves of it are written out, so that the buffers
  // are registers that are known to the compiler; with one, P·V has to be done before exponentials are. Only P·V of a tile is
  // under way in the matrix unit where the loop is left, and nothing where it closes: ptxas gives up overlapping products with
  // anything otherwise.
  __device__ __forceinline__ void row_blocks() {
    while (true) {
      if (sees_nothing()) {
        skip_softmax();
      } else {
        if (flags_ & (kHide << group_)) {
          const Slot& slot = Config::slots(shared_)[slot_];
          hide<Config>(s_, slot.mask, slot.row + warp_row() + lane_ / 4, Config::notes(shared_)[stage_].key,
                       flags_ / (kNone << 2 * group_), flags_ / (kSome << 2 * group_), flags_ & kBadKeys,
                       shared_ + Config::keys(stage_), l_);
        }
        softmax(p0_);
        shrink();
      }
      if constexpr (Config::kBuffers == 1) {
        while (true) {
          if (__builtin_expect(begin_step(p0_), 0)) break;
          softmax<true>(p0_);
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
      wait_for_output();
      if (ended_) {
        finish_rows();
        next_slot();
        if (flags_ & kStop || !has_rows()) return;
        begin_rows();
      } else if (long_sums_are_due()) {
        add_to_long_sums();
      }
    }
  }

  // Whether some of the row block's rows are this warpgroup's.
  __device__ __forceinline__ bool has_rows() const {
    return ptx::uniform(64 * group_ < Config::slots(shared_)[slot_].rows);
  }

  __device__ __forceinline__ void next_slot() {
    slot_phase_ ^= slot_;
    slot_ ^= 1;
  }

  // Lets the others have the tiles of a row block of which it has none.
  __device__ __forceinline__ void pass_over_row_block() {
    do {
      release(Config::k_empty(stage_));
      advance();
      release(Config::v_empty(before(stage_)));
      read_note();
    } while (!ended_);
    ptx::mbarrier_arrive(base_ + Config::rows_done(slot_));
  }

  // Issues the scores of the next tile and, behind them, P·V of the one at hand, whose probabilities are
  // in `p`; waits for the scores. Returns whether something rare is due before their softmax.
  __device__ __forceinline__ bool begin_step(uint32_t (&p)[Config::kProbabilities]) {
    const int stage = stage_;
    const int slot = advance();
    issue_scores(slot);  // after the end: of whatever lies there
    ptx::keep_in_registers(p);
    ptx::wgmma_fence();
    Values::template multiply<Config>(
        o_, p, units_ + Config::kValuesAt / 16 + stage * (Config::kValueBytes / 16), summed_ != 0);
    ptx::wgmma_commit_group();
    summed_ += Config::kKeys;
    read_note();
    choose_floor();
    ptx::wgmma_wait_group<1>();
    ptx::keep_in_registers(s_);
    return ended_ || flags_ & (kHide << group_) || long_sums_are_due();
  }

  __device__ __forceinline__ bool long_sums_are_due() const {
    return Values::kLongKeys > 0 && summed_ == Values::kLongKeys;
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

  // The same; returns the slot whose queries meet that tile.
  __device__ __forceinline__ int advance() {
    ended_ = flags_ & kEnds;
    wait_for_tile();
    int slot = slot_;
    if (__builtin_expect(ended_, 0) && !(Config::notes(shared_)[stage_].flags & kStop)) {
      slot ^= 1;
      ptx::mbarrier_wait(base_ + Config::slot_full(slot), slot_phase_ ^ (slot == 0));
    }
    return slot;
  }

  __device__ __forceinline__ void read_note() {
    flags_ = ptx::uniform(Config::notes(shared_)[stage_].flags);
  }

  // Probabilities of the tile whose scores are in s_, and the state of the rows. With one buffer of probabilities those of the
  // tile before may still be an operand of P·V: `kUnderWay`.
  template <bool kUnderWay = false>
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
    if constexpr (kUnderWay) wait_for_output();
    exponentials<Config>(s_, multiplier, shift, zero_, l_, p);
  }

  // Whether no row of the warpgroup sees any key of the tile at hand: they are past the last row, or the tile is beyond their
  // diagonal, or a mask says so. Such a tile is hidden from them (kHide) as well.
  __device__ __forceinline__ bool sees_nothing() const {
    constexpr uint32_t kAll = (1u << Config::kKeys / kTileKeys) - 1;
    return (flags_ / (kNone << 2 * group_) & kAll) == kAll;
  }

  // What the softmax of such a tile comes to: no probabilities, and rows as they were.
  __device__ __forceinline__ void skip_softmax() {
    release(Config::k_empty(stage_));
#pragma unroll
    for (uint32_t& p : p0_) p = 0;
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
    const uint32_t a = units_ + Config::kQueriesAt / 16 + slot * (Config::kQueryBytes / 16) + group_ * (64 * kRow / 16);
    const uint32_t b = units_ + Config::kKeysAt / 16 + stage_ * (Config::kKeyBytes / 16);
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
      l_[r] = 0.0f;
      row_scale_[r] = slot.scale[warp_row() + lane() / 4 + 8 * r] * (params_.scale * kLog2E * Config::kStartUnits);
    }
    summed_ = 0;
    long_ = false;
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

  // Ends the rows' l, and adds the long sums to the matrix unit's.
  __device__ __forceinline__ void take_long_sums(float (&l)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) l[r] = quad_sum(l_[r]);
    if constexpr (Values::kLongKeys > 0) {
      if (!long_) return;
      float shrink[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float old_l = __shfl_sync(kFullWarp, kept_, lane() & ~3 | r);
        const float old_m = __shfl_sync(kFullWarp, kept_, lane() & ~3 | 2 | r);
        shrink[r] = old_m == -INFINITY ? 0.0f : ptx::ex2(old_m - m_[r]);
        l[r] = fmaf(old_l, shrink[r], l[r]);
      }
      o_.add_long(long_sums(), shrink);
    }
  }

  // The matrix unit's sums become part of the long ones.
  __device__ __forceinline__ void add_to_long_sums() {
    if constexpr (Values::kLongKeys > 0) {
      float l[2];
      take_long_sums(l);
      if (!long_) {
        o_.lengthen();
        wait_for_sent_tiles();
      }
      o_.store(long_sums());
      const int t = lane() % 4;
      kept_ = t < 2 ? (t == 0 ? l[0] : l[1]) : (t == 2 ? m_[0] : m_[1]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // With sums that are empty again no reference needs to be above the maximum.
        m_[r] = floor_[r] = quad_max(highest_[r]);
        l_[r] = 0.0f;
      }
      long_ = true;
      summed_ = 0;
    }
  }

  // ---------------------------------------------------------------------------------- epilogue

  __device__ __forceinline__ void finish_rows() {
    Slot& slot = Config::slots(shared_)[slot_];
    float l[2], m[2], factor[2];
    take_long_sums(l);
    wait_for_sent_tiles();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      l[r] *= Values::kUnit;
      m[r] = m_[r];
      if (slot.row + warp_row() + lane() / 4 + 8 * r >= slot.mask.queries) {
        l[r] = 0.0f;
        m[r] = -INFINITY;
      } else if (l[r] != 0.0f && isnan(row_scale_[r])) {
        l[r] = NAN;
      }
      factor[r] = l[r] == 0.0f ? 0.0f : __fdividef(Values::kUnit, l[r]);
      if (Values::kLongKeys > 0 && long_) factor[r] *= HalfSums<kHeadDim>::kLongUnit;
      if constexpr (Values::kBounded && !Config::kInterpolates) {  // from the reference to the maximum
        const float highest = quad_max(highest_[r]);
        if (m[r] != -INFINITY && m[r] != highest) {
          l[r] *= ptx::ex2(m[r] - highest);
          m[r] = highest;
        }
      }
    }
    if (!Config::kInterpolates && lane() % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Config::finished(shared_, slot_, warp_row() + lane() / 4 + 8 * r) = make_float2(l[r], m[r]);
      }
    }
    const int b = slot.mask.b, n = slot.mask.n, row = slot.row + warp_row();
    const int64_t channel = static_cast<int64_t>(slot.kv_plane) * kHeadDim + 2 * (lane() % 4);
    ptx::mbarrier_arrive(base_ + Config::rows_done(slot_));

    const auto* const scales = reinterpret_cast<const float2*>(params_.v_scale + channel);  // prefetched
    const auto* const means = reinterpret_cast<const float2*>(params_.v_mean + channel);
    const auto scaled = [&](int n, float x, float y, float by) {
      const float2 scale = scales[4 * n], mean = Values::kFormat == PvFormat::kE4m3 ? means[4 * n] : float2{0.0f, 0.0f};
      return float2{fmaf(x * by, scale.x, mean.x), fmaf(y * by, scale.y, mean.y)};
    };
    const auto outputs = [&](int n) {
      if (n == kHeadDim / 16) __syncwarp();  // all would be asked for at once otherwise, and registers spill
      const FourOutputs x = o_.at(n);
      return FourOutputs{scaled(n, x.upper.x, x.upper.y, factor[0]), scaled(n, x.lower.x, x.lower.y, factor[1])};
    };
    if (call_.tiled_out) {
      if (params_.out_dtype == Dtype::kBf16) {
        write_tiles<kHeadDim, true>(warp_region(), outputs);
      } else {
        write_tiles<kHeadDim, false>(warp_region(), outputs);
      }
      if (__any_sync(kFullWarp, factor[0] == 0.0f || factor[1] == 0.0f)) {
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (factor[r] == 0.0f) clear_tile_row<kHeadDim>(warp_region(), r);
        }
      }
      send_tiles<kHeadDim>(call_.out, warp_region(), n * kHeadDim, row, b);
    } else {
      const int64_t first = ((static_cast<int64_t>(b) * params_.shape.queries + row) * params_.shape.heads + n) *
                            params_.shape.head_dim;
      store_rows<kHeadDim>(
          warp_region(),
          [&](int n) {
            if (n == kHeadDim / 32) __syncwarp();  // as in `outputs`
            return seen_only(outputs(n), factor);
          },
          params_.out, params_.out_dtype, first,
          params_.shape.queries - row, static_cast<int64_t>(params_.shape.heads) * params_.shape.head_dim,
          params_.shape.head_dim);
    }
  }

  // Rows that see nothing are 0.
  __device__ __forceinline__ static FourOutputs seen_only(const FourOutputs& x, const float (&factor)[2]) {
    return {factor[0] == 0.0f ? float2{0.0f, 0.0f} : x.upper, factor[1] == 0.0f ? float2{0.0f, 0.0f} : x.lower};
  }

  // All lanes of the warp have done with it.
  __device__ __forceinline__ void release(int barrier) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(base_ + barrier);
  }

  // Found again where they are seldom needed: registers are full.
  __device__ __forceinline__ static int lane() { return ptx::opaque_thread() % kWarpSize; }
  __device__ __forceinline__ int warp_row() const {
    return 64 * group_ + ptx::opaque_thread() / kWarpSize % 4 * 16;
  }
  __device__ __forceinline__ unsigned char* warp_region() {
    return Config::warp_region(shared_, warp_row() / 16);
  }

  // The thread's share of its rows' sums over more keys than the matrix unit may add up.
  __device__ __forceinline__ uint4* long_sums() { return reinterpret_cast<uint4*>(warp_region()) + lane(); }

  const ForwardCall& call_;
  const AttendParams& params_;
  const float zero_;
  unsigned char* const shared_;
  const uint32_t base_, units_;  // where shared memory begins, in bytes and in 16-byte units
  const int group_, lane_;
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
  float kept_ = 0.0f;  // of the long sums: in lanes 4g to 4g + 3 of a warp l of row g, l of row g + 8, m of row g, m of row g + 8
  Shrink shrink_;   // due before the next product with V
  int summed_ = 0;  // keys in o_
  bool long_ = false;  // there are long sums
};

}  // namespace sage::sm90
