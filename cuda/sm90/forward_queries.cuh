// Queries that come as they are: three warps of the loader's warpgroup quantize them, a row block ahead of the consumers, and
// write their codes where the copy engine would put given ones. A block's first row block is written by the consumers,
// who have nothing else to do then.
#pragma once

#include "common/row_blocks.cuh"
#include "common/tile.cuh"
#include "ptx/global.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "quantize/query_tokens.cuh"
#include "sm90/forward_stream.cuh"

namespace sage::sm90 {

template <class Config>
class QueryWriter {
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kWidth = 2 * kChannels;  // channels of a thread, of each of its rows
  static constexpr int kThreadsPerToken = kHeadDim / kWidth, kAtOnce = kWarpSize / kThreadsPerToken;
  static constexpr int kWarps = 3;
  static constexpr int kTokens = 2;   // rows of a thread at the same time: more do not fit its registers
  static constexpr int kPart = 16;    // rows that a warp of consumers begins with
  static constexpr int kBarrier = 8;  // nothing else in the kernel uses it
  using Codes = SharedTile<Config::kRows, kHeadDim>;

 public:
  static constexpr int kArrivals = kWarps * kWarpSize;  // of threads, for a row block

  __device__ QueryWriter(const ForwardCall& call, unsigned char* shared)
      : call_(call), shared_(shared), base_(ptx::shared_address(shared)) {}

  // The row blocks after the first, by warps 1 to 3 of the block.
  __device__ __forceinline__ void run() {
    if (call_.p.q_dtype == Dtype::kBf16) {
      later<Piece<Dtype::kBf16>>();
    } else {
      later<Piece<Dtype::kF16>>();
    }
  }

  // The block's first row block, by warp `warp` of the consumers'.
  __device__ __forceinline__ void first(int warp) {
    const Rows rows = row_block(0);
    if (call_.p.q_dtype == Dtype::kBf16) {
      write<Piece<Dtype::kBf16>, kPart / kAtOnce>(rows, 0, warp * kPart, (warp + 1) * kPart, kPart, [] {});
    } else {
      write<Piece<Dtype::kF16>, kPart / kAtOnce>(rows, 0, warp * kPart, (warp + 1) * kPart, kPart, [] {});
    }
    ptx::fence_proxy_async_shared();
    ptx::bar_sync(kBarrier, 128 * Config::kGroups);
    if (warp < kWarps) ptx::mbarrier_arrive(base_ + Config::slot_full(0));
  }

 private:
  struct Rows {
    uint32_t begin;  // of the first of them, in the query tensor, in eights of elements
    uint32_t both;   // count() and valid() in a register

    __device__ int count() const { return static_cast<int>(both & 0xffffu); }  // 0 where there is no row block
    __device__ int valid() const { return static_cast<int>(both >> 16); }      // as many of them count
  };

  __device__ __forceinline__ static int lane() { return ptx::opaque_thread() % kWarpSize; }
  __device__ __forceinline__ static int writer() { return ptx::opaque_thread() / kWarpSize - 1; }
  __device__ __forceinline__ static int channel() { return lane() % kThreadsPerToken * kWidth; }

  // The block's turn-th.
  __device__ __forceinline__ Rows row_block(int turn) const {
    const AttentionShape& s = call_.p.shape;
    // Opaque, as more here: nothing that follows from it is to wait in a register.
    const int item = call_.work.item(turn, ptx::opaque(static_cast<int>(blockIdx.x)), ptx::opaque_blocks());
    if (item < 0) return {};
    const RowBlock block = call_.work.plan.at(s, item, Config::kRows);
    const int64_t begin = ((static_cast<int64_t>(block.b) * s.queries + block.row) * s.heads + block.n) * s.head_dim;
    const int valid = max(min(call_.p.masks.bounds[3 * static_cast<int64_t>(block.b)] - block.row, block.rows), 0);
    return {static_cast<uint32_t>(begin / kChannels), static_cast<uint32_t>(block.rows | valid << 16)};
  }

  template <class Piece>
  __device__ __forceinline__ void later() {
    Rows known = {};  // of the lane's turn among the 32 at hand: to find a row block takes many divisions
    const auto known_of = [&](int lane) -> Rows {
      return {__shfl_sync(kFullWarp, known.begin, lane), __shfl_sync(kFullWarp, known.both, lane)};
    };
#pragma unroll 1
    for (int turn = 1;; ++turn) {
      const int at = (turn - 1) % kWarpSize, slot = turn % Config::kSlots;
      if (at == 0) known = row_block(turn + lane());
      const Rows rows = known_of(at);
      if (rows.count() == 0) return;
      ask_for(rows);
      constexpr int kStep = kTokens * kAtOnce;
      write<Piece, kTokens>(rows, slot, writer() * kStep, Config::kRows, kWarps * kStep, [&] {
        ptx::mbarrier_wait(base_ + Config::rows_done(slot), (turn / Config::kSlots & 1) ^ 1);
      });
      ptx::fence_proxy_async_shared();
      ptx::mbarrier_arrive(base_ + Config::slot_full(slot));
    }
  }

  __device__ __forceinline__ const uint16_t* queries(const Rows& rows) const {
    return static_cast<const uint16_t*>(call_.p.q) + static_cast<int64_t>(rows.begin) * kChannels;
  }

  // Has a row block's queries come to the L2 cache.
  __device__ __forceinline__ void ask_for(const Rows& rows) const {
    constexpr int kLine = 64, kLines = kHeadDim / kLine;  // channels; of a row
    const AttentionShape& s = call_.p.shape;
    const int stride = s.heads * s.head_dim;
    const auto* const from = queries(rows);
#pragma unroll 1
    for (int line = writer() * kWarpSize + lane(); line < rows.count() * kLines; line += kWarps * kWarpSize) {
      const int channel = line % kLines * kLine;
      if (channel < s.head_dim) ptx::prefetch_global_l2(from + line / kLines * stride + channel);
    }
  }

  // Codes and scales of rows `begin` and on, kCount · kAtOnce of every `step`, before `end`. wait() returns when the slot is
  // free.
  template <class Piece, int kCount, class Wait>
  __device__ __forceinline__ void write(const Rows& rows, int slot, int begin, int end, int step, const Wait& wait) {
    const AttentionShape& s = call_.p.shape;
    end = min(end, (rows.count() + 63) / 64 * 64);  // of warpgroups that have rows
    const int first = begin + lane() / kThreadsPerToken, stride = s.heads * s.head_dim;
    // As many rows count from the first on; the others, and channels beyond the head dimension, are zeros.
    int left = (channel() < s.head_dim ? min(rows.valid(), end) : 0) - first;
    const auto* from = queries(rows) + first * stride + channel();
    struct Share {  // of a row
      Piece low, high;
    };
    Share rows_at_hand[kCount];
    const auto load = [&](int i, Share& share) {
      const auto* const at = from + i * kAtOnce * stride;
      ptx::load_global_or_zero(share.low.words, at, i * kAtOnce < left);
      ptx::load_global_or_zero(share.high.words, at + kChannels, i * kAtOnce < left);
    };
#pragma unroll
    for (int i = 0; i < kCount; ++i) load(i, rows_at_hand[i]);
    uint32_t codes = base_ + Config::queries(slot) + Codes::offset(first, channel() / kChunkBytes);
    const int own = lane() % kThreadsPerToken;  // the thread finds the scale of its own-th token, if it has as many
    uint32_t scale_at = base_ + Config::scale(slot) + (first + own * kAtOnce) * static_cast<int>(sizeof(float));
    wait();
#pragma unroll 1
    for (int row = begin; row < end; row += step) {
      // The next rows come while the codes of these are written: the last into registers of their own, the others into those
      // that are free by then.
      from += step * stride;
      left -= step;
      Share last;
      load(kCount - 1, last);
      const float scale = quantize_tokens<Piece, kCount, kThreadsPerToken>(
          [&](int i) { return Piece::larger(rows_at_hand[i].low.magnitude(), rows_at_hand[i].high.magnitude()); },
          [](float largest) { return largest; },
          [&](int i, float inverse) {
            float x[kChannels];
            rows_at_hand[i].low.unpack(x);
            const uint2 low = int8_codes(x, inverse);
            rows_at_hand[i].high.unpack(x);
            const uint2 high = int8_codes(x, inverse);
            ptx::store_shared((codes ^ Codes::twist(i * kAtOnce) * kChunkBytes) + i * kAtOnce * kHeadDim,
                              make_uint4(low.x, low.y, high.x, high.y));
            if (i < kCount - 1) load(i, rows_at_hand[i]);
          });
      rows_at_hand[kCount - 1] = last;
      if (own < kCount) ptx::store_shared(scale_at, scale);
      codes += step * kHeadDim;
      scale_at += step * static_cast<int>(sizeof(float));
    }
  }

  const ForwardCall& call_;
  unsigned char* const shared_;
  const uint32_t base_;
};

}  // namespace sage::sm90
