// The product P·V of one 16 × 64 tile of probabilities per row tile, in the formats that sm_80
// knows. Each struct says how V lies in shared memory, how accumulators become A operands (without
// shuffles: docs/kernels/sm80_forward.md), how a tile's product enters the output, and what fits the
// registers: a block's output channels (kMaxChannels), two row tiles a warp at 128 of them (kTwoRowTiles).
#pragma once

#include "common/params.h"
#include "common/softmax.cuh"
#include "common/tile.cuh"
#include "numerics/e4m3.h"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"
#include "ptx/mma_sync.cuh"

namespace sage::sm80 {

// A operands of 16-bit products: four steps of 16 keys.
struct Probabilities16 {
  uint32_t a[4][4];
};

// A operands of 8-bit products: two steps of 32 keys.
struct Probabilities8 {
  uint32_t a[2][4];
};

// V as [channels][64 keys] bytes, keys permuted by pi inside groups of 16.
struct TransposedValues {
  template <int kChannels>
  using Tile = SharedTile<kChannels, kTileKeys>;

  static __device__ __forceinline__ uint32_t padded(int keys) {
    return static_cast<uint32_t>(keys + kTileKeys - 1) / kTileKeys * kTileKeys;
  }

  // Bytes of V of one (batch, key head).
  static __device__ __forceinline__ int64_t plane_bytes(int head_dim, int keys) {
    return static_cast<int64_t>(head_dim) * padded(keys);
  }

  template <int kChannels, int kThreads>
  static __device__ __forceinline__ void copy(uint32_t shared, const unsigned char* plane, int key,
                                              int keys, int thread = threadIdx.x) {
    Tile<kChannels>::template copy<kThreads>(shared, plane + key, padded(keys), kChannels, thread);
  }
};

// V as [64 keys][channels] of 16 bits.
struct NaturalValues {
  static constexpr int kMaxChannels = 256;
  static constexpr bool kTwoRowTiles = true;
  template <int kHeadDim>
  using Tile = SharedTile<kTileKeys, 2 * kHeadDim>;

  static __device__ __forceinline__ int64_t plane_bytes(int head_dim, int keys) {
    return static_cast<int64_t>(keys) * 2 * head_dim;
  }

  template <int kHeadDim, int kThreads>
  static __device__ __forceinline__ void copy(uint32_t shared, const unsigned char* plane, int key,
                                              int keys, int thread = threadIdx.x) {
    Tile<kHeadDim>::template copy_run<kThreads>(shared, plane + plane_bytes(kHeadDim, key), keys - key, thread);
  }
};

// Conversions for e4m3 products in f16 on architectures without e4m3 instructions.
struct BitConversions {
  // The bits of an e4m3 code, moved to f16's place, read as value·2^-8.
  static constexpr float kValueScale = 0x1p-8f;

  // Two probabilities rounded to e4m3, as f16.
  static __device__ __forceinline__ uint32_t round(float low, float high) {
    return ptx::cvt_f16x2_f32(round_e4m3(low), round_e4m3(high));
  }

  // Four codes, the tokens 2t, 2t+1, 8+2t, 9+2t of a group of 16, to the two registers of B.
  static __device__ __forceinline__ void widen(uint32_t (&b)[2], uint32_t codes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t high = ptx::prmt(codes, 0, i == 0 ? 0x1404 : 0x3424);  // codes·256
      b[i] = (high & 0x80008000u) | ((high & 0x7f007f00u) >> 1);
    }
  }
};

// e4m3 probabilities and values through f16 products, which hold both exactly.
template <bool kHalfAccumulators, class Conversions>
struct E4m3ThroughHalf : TransposedValues {
  static constexpr PvFormat kFormat = PvFormat::kE4m3;
  static constexpr bool kF16Accumulate = kHalfAccumulators;
  static constexpr bool kTileMaximum = false;
  static constexpr int kMaxChannels = kHalfAccumulators ? 128 : 256;
  static constexpr bool kTwoRowTiles = !kHalfAccumulators;
  static constexpr float kExponentBias = 8.0f;    // E·256
  static constexpr float kRowSumScale = 0x1p-8f;  // what undoes it in l
  static constexpr float kOutputScale = 0x1p-8f / Conversions::kValueScale;
  using Probabilities = Probabilities16;

  static __device__ __forceinline__ void pack(Probabilities& p, const float (&e)[kKeyGroups][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float* pair = &e[i / 4 * 2 + i % 4 / 2][i % 2 * 2];
      p.a[i / 4][i % 4] = Conversions::round(pair[0], pair[1]);
    }
  }

  template <int kChannels, int kRowTiles>
  static __device__ __forceinline__ void multiply(float (&o)[kRowTiles][kChannels / 8][4],
                                                  const Probabilities (&p)[kRowTiles],
                                                  const float (&)[kRowTiles][2], uint32_t tile) {
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      // Without a stop, ptxas starts so many loads and conversions early that registers spill.
      if ((kChannels >= 128 || kHalfAccumulators) && n % 2 == 0) __syncwarp();
      uint32_t codes[4], b[4][2];
      Tile<kChannels>::load_b8(codes, tile, 8 * n, 0);
#pragma unroll
      for (int step = 0; step < 4; ++step) Conversions::widen(b[step], codes[step]);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        if constexpr (kHalfAccumulators) {
          float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            ptx::mma_m16n8k16_f32_f16(sum, p[r].a[2 * half], b[2 * half], sum);
            ptx::mma_m16n8k16_f32_f16(sum, p[r].a[2 * half + 1], b[2 * half + 1], sum);
            round_as_half(sum);
          }
#pragma unroll
          for (int c = 0; c < 4; ++c) o[r][n][c] += sum[c];
        } else {
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            ptx::mma_m16n8k16_f32_f16(o[r][n], p[r].a[step], b[step], o[r][n]);
          }
        }
      }
    }
  }

  // To f16 in the units of p·v, and back.
  static __device__ __forceinline__ void round_as_half(float (&sum)[4]) {
    constexpr float kScale = Conversions::kValueScale;
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      ptx::cvt_f32_f16x2(sum[c], sum[c + 1],
                         ptx::cvt_f16x2_f32(sum[c] / kScale, sum[c + 1] / kScale));
      sum[c] *= kScale;
      sum[c + 1] *= kScale;
    }
  }
};

using E4m3 = E4m3ThroughHalf<false, BitConversions>;
using E4m3F16Accumulate = E4m3ThroughHalf<true, BitConversions>;

template <PvFormat kFormat_>
struct Values16 : NaturalValues {
  static constexpr PvFormat kFormat = kFormat_;
  static constexpr bool kF16Accumulate = false;
  static constexpr bool kTileMaximum = false;
  static constexpr float kExponentBias = 0.0f;
  static constexpr float kRowSumScale = 1.0f;
  static constexpr float kOutputScale = 1.0f;
  using Probabilities = Probabilities16;

  static __device__ __forceinline__ void pack(Probabilities& p, const float (&e)[kKeyGroups][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float* pair = &e[i / 4 * 2 + i % 4 / 2][i % 2 * 2];
      p.a[i / 4][i % 4] = kFormat == PvFormat::kF16 ? ptx::cvt_f16x2_f32(pair[0], pair[1])
                                                    : ptx::cvt_bf16x2_f32(pair[0], pair[1]);
    }
  }

  template <int kChannels, int kRowTiles>
  static __device__ __forceinline__ void multiply(float (&o)[kRowTiles][kChannels / 8][4],
                                                  const Probabilities (&p)[kRowTiles],
                                                  const float (&)[kRowTiles][2], uint32_t tile) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int n = 0; n < kChannels / 8; n += 2) {
        uint32_t b[4];
        Tile<kChannels>::load_b16_transposed(b, tile, 16 * step, n);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          add_product(o[r][n], p[r].a[step], {b[0], b[1]});
          add_product(o[r][n + 1], p[r].a[step], {b[2], b[3]});
        }
      }
    }
  }

  static __device__ __forceinline__ void add_product(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
    if constexpr (kFormat == PvFormat::kF16) {
      ptx::mma_m16n8k16_f32_f16(d, a, b, d);
    } else {
      ptx::mma_m16n8k16_f32_bf16(d, a, b, d);
    }
  }
};

using F16 = Values16<PvFormat::kF16>;
using Bf16 = Values16<PvFormat::kBf16>;

// INT8 probabilities relative to the row's maximum in the tile, INT8 values with a scale per tile;
// `weight` carries both scales of each row.
struct Int8 : TransposedValues {
  static constexpr PvFormat kFormat = PvFormat::kInt8;
  static constexpr bool kF16Accumulate = false;
  static constexpr bool kTileMaximum = true;
  static constexpr int kMaxChannels = 128;
  static constexpr bool kTwoRowTiles = false;
  static constexpr float kExponentBias = 0.0f;
  static constexpr float kRowSumScale = 1.0f;
  static constexpr float kOutputScale = 1.0f;
  using Probabilities = Probabilities8;

  // The codes of four probabilities, e[n] first: the low bytes of 1.5·2^23 + 127·e.
  static __device__ __forceinline__ uint32_t codes(float e0, float e1, float e2, float e3) {
    const auto code = [](float e) { return __float_as_uint(fmaf(e, 127.0f, kMagic)); };
    return ptx::prmt(ptx::prmt(code(e0), code(e1), 0x0040), ptx::prmt(code(e2), code(e3), 0x0040),
                     0x5410);
  }

  static __device__ __forceinline__ void pack(Probabilities& p, const float (&e)[kKeyGroups][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = i / 4 * 4 + i % 4 / 2 * 2, c = i % 2 * 2;
      p.a[i / 4][i % 4] = codes(e[n][c], e[n][c + 1], e[n + 1][c], e[n + 1][c + 1]);
    }
  }

  template <int kChannels, int kRowTiles>
  static __device__ __forceinline__ void multiply(float (&o)[kRowTiles][kChannels / 8][4],
                                                  const Probabilities (&p)[kRowTiles],
                                                  const float (&weight)[kRowTiles][2],
                                                  uint32_t tile) {
    const int zero[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
    for (int n = 0; n < kChannels / 8; ++n) {
      if (n % 2 == 0) __syncwarp();  // the same stop as above
      uint32_t b[4];
      Tile<kChannels>::load_b8(b, tile, 8 * n, 0);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        int sum[4];
        ptx::mma_m16n8k32_s32_s8(sum, p[r].a[0], {b[0], b[1]}, zero);
        ptx::mma_m16n8k32_s32_s8(sum, p[r].a[1], {b[2], b[3]}, sum);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          o[r][n][c] = fmaf(accumulated(sum[c]), weight[r][c >> 1], o[r][n][c]);
        }
      }
    }
  }
};

}  // namespace sage::sm80
