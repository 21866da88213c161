// What the gradient kernels of Hopper share (train8 with INT8 dO·Vᵀ; docs/abi.md, section 4): the two
// score products, what follows from them, and exact sums.
//
// A warpgroup owns 64 rows (queries for dQ, keys for dK and dV) and meets tiles of 64 columns. Lane
// 4g + t of a warp holds in s[4n], s[4n + 1] row g and columns 8n + 2t, 8n + 2t + 1, in s[4n + 2],
// s[4n + 3] row g + 8: bit i of a mask of what counts belongs to s[i].
#pragma once

#include <cuda.h>

#include <type_traits>

#include "common/mask.cuh"
#include "common/scale.cuh"
#include "common/seen.cuh"
#include "common/tile.cuh"
#include "numerics/int8.h"
#include "ptx/bulk_tensor.cuh"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm80/backward_operands.cuh"
#include "sm80/backward_workspace.h"
#include "sm90/backward_work.cuh"
#include "sm90/forward_stream.cuh"
#include "sm90/forward_values.cuh"
#include "sm90/store_rows.cuh"
#include "sm90/store_tiles.cuh"

namespace sage::sm90 {

inline constexpr int kGradientTile = 64;    // columns
inline constexpr int kGradientValues = kGradientTile / 2;  // of a thread, in a tile
inline constexpr int kGradientRegisters = kGradientTile / 8;  // of a thread's 8-bit operand
// Sums in the matrix unit keep about 14 bits: after this many tiles they go to exact ones.
inline constexpr int kExactTiles = 16;
inline constexpr int kSharedLimit = 227 * 1024;  // what an sm_90 offers a block

// A block of so many consumer warpgroups and a loader. setmaxnreg moves registers from the loader to them.
template <int kGroups_, int kProducerRegisters_, int kConsumerRegisters_>
struct GradientBlock {
  static constexpr int kGroups = kGroups_, kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = kProducerRegisters_, kConsumerRegisters = kConsumerRegisters_;
  static constexpr int kLaunchRegisters = kGroups == 4 ? 96 : kGroups == 3 ? 128 : 168;  // the most that kThreads leave to each
  static_assert(kProducerRegisters + kGroups * kConsumerRegisters <= (kGroups + 1) * kLaunchRegisters,
                "a block has the registers that it was launched with");
  // Flags of notes; kHide << group, kNone << group: its rows see nothing of the tile.
  static constexpr int kHide = 1, kBadKeys = 16, kStop = 64, kNone = 256;
  static constexpr int kHideAll = (kHide << kGroups) - kHide;
  static_assert(kHideAll < kBadKeys, "each flag has a bit of its own");
};

// s = A·Bᵀ: 64 rows by 64 columns of INT8, both tiles [64][kHeadDim] at addresses in 16-byte units.
template <int kHeadDim>
__device__ __forceinline__ void multiply_scores(int (&s)[kGradientValues], uint32_t a, uint32_t b) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 32; ++step) {
    ptx::wgmma_m64k32_s32_s8(s, ptx::shared_operand<kHeadDim, 0, 8 * kHeadDim>(a + 2 * step),
                             ptx::shared_operand<kHeadDim, 0, 8 * kHeadDim>(b + 2 * step),
                             step > 0);
  }
}

// sums += operand · columnsᵀ, columns [kHeadDim][64] of e4m3 at an address in 16-byte units.
template <int kHeadDim>
__device__ __forceinline__ void multiply_gradients(float (&sums)[kHeadDim / 2],
                                                   const uint32_t (&operand)[kGradientRegisters],
                                                   uint32_t columns, int accumulate) {
#pragma unroll
  for (int step = 0; step < kGradientTile / 32; ++step) {
    ptx::wgmma_m64k32_f32_e4m3(sums, operand + 4 * step,
                               ptx::shared_operand<64, 0, 8 * 64>(columns + 2 * step),
                               step == 0 ? accumulate : 1);
  }
}

// A line through accumulators. A conversion takes as long as the addition of common/scale.cuh; here it is preferred,
// because its result needs no other start, which would have to be computed, and rounded, for each line.
struct Line {
  float slope, start;
  __device__ __forceinline__ float at(int accumulator) const {
    return fmaf(static_cast<float>(accumulator), slope, start);
  }
};

// Clears the codes of what does not count.
__device__ __forceinline__ void hide_codes(uint32_t (&operand)[kGradientRegisters], uint32_t seen) {
#pragma unroll
  for (int i = 0; i < kGradientRegisters; ++i) operand[i] &= sm80::seen_bytes(seen, i / 2, i % 2);
}

// Two values as exact sums keep them: bf16, in one word. The upper is the word itself as a float, with the bits of the lower
// behind its own: less than a unit of bf16, which is as good as nothing, since what a word does not hold is kept elsewhere.
__device__ __forceinline__ float lower_of(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float upper_of(uint32_t word) { return __uint_as_float(word); }

// Exact sums: the matrix unit's are added to others in shared memory, of which each thread has its own. Those are bf16;
// x keeps what they cannot hold, and goes on from there, so nothing is lost.
template <int kValues>
__device__ __forceinline__ void add_exactly(unsigned char* region, float (&x)[kValues], bool first) {
  uint4* const sums = reinterpret_cast<uint4*>(region) + threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kValues; i += 8) {
    uint4& sum = sums[i / 8 * kWarpSize];
    uint4 old = make_uint4(0, 0, 0, 0);
    if (!first) old = sum;
    uint32_t words[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float &x0 = x[i + 2 * j], &x1 = x[i + 2 * j + 1];
      x0 += lower_of(words[j]), x1 += upper_of(words[j]);
      words[j] = ptx::cvt_bf16x2_f32(x0, x1);
      x0 -= lower_of(words[j]), x1 -= upper_of(words[j]);
    }
    sum = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// x plus the exact sums, where there are any.
template <int kValues>
__device__ __forceinline__ void collect(const unsigned char* region, float (&x)[kValues], bool exact) {
  if (!exact) return;
  const uint4* const sums = reinterpret_cast<const uint4*>(region) + threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kValues; i += 8) {
    const uint4 sum = sums[i / 8 * kWarpSize];
    const uint32_t words[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[i + 2 * j] += lower_of(words[j]), x[i + 2 * j + 1] += upper_of(words[j]);
    }
  }
}

// The gradients of a warp's 16 rows to memory, through its region.
//   map, tiled   as the host has chosen
//   outputs      outputs(n): a thread's FourOutputs of channels 8n to 8n + 7
//   row          of `length` ones of each of `heads` heads
template <int kHeadDim, class Outputs>
__device__ __forceinline__ void store_gradients(const CUtensorMap& map, bool tiled, unsigned char* region,
                                                const Outputs& outputs, void* out, Dtype dtype, int b, int row, int length,
                                                int head, int heads, int head_dim) {
  if (!tiled) {
    const int64_t stride = static_cast<int64_t>(heads) * head_dim;
    store_rows<kHeadDim>(region, outputs, out, dtype, (static_cast<int64_t>(b) * length + row) * stride + head * head_dim,
                         length - row, stride, head_dim);
    return;
  }
  __syncwarp();  // exact sums that lay there have been read
  if (dtype == Dtype::kBf16) {
    write_tiles<kHeadDim, true>(region, outputs);
  } else {
    write_tiles<kHeadDim, false>(region, outputs);
  }
  send_tiles<kHeadDim>(map, region, head * kHeadDim, row, b);
}

// Asks for `count` values in memory, before they are needed. By all lanes of a warp.
__device__ __forceinline__ void fetch_early(const float* first, int count) {
  constexpr int kLine = 128 / sizeof(float);
  const int at = ptx::opaque_thread() % kWarpSize * kLine;
  if (at < count) ptx::prefetch_global_l1(first + at);
}

// All lanes of the warp have done with what the barrier guards.
__device__ __forceinline__ void release(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(barrier);
}

// The scale of an e4m3 channel, from its largest magnitude.
__device__ __forceinline__ float channel_scale(float maximum) { return group_scale(maximum, 448.0f).scale; }

// factor[i] = common · scale of channel i, for kChannels channels. By all lanes of a warp; all loads before the first use.
template <int kChannels>
__device__ __forceinline__ void describe_factors(float* factor, const float* maxima, float common) {
  float maximum[kChannels / kWarpSize];
#pragma unroll
  for (int i = 0; i < kChannels / kWarpSize; ++i) maximum[i] = maxima[i * kWarpSize + threadIdx.x % kWarpSize];
#pragma unroll
  for (int i = 0; i < kChannels / kWarpSize; ++i) {
    factor[i * kWarpSize + threadIdx.x % kWarpSize] = common * channel_scale(maximum[i]);
  }
}

}  // namespace sage::sm90
