// The probabilities and score gradients of a 16 × 64 tile as the 8-bit A operand of the gradient
// products, straight from the accumulators of the score products; and those products.
//
// Lane 4g + t holds of accumulator tile n (8 columns): row g, columns 8n + 2t, 8n + 2t + 1 in c[0],
// c[1]; row g + 8 in c[2], c[3]. Two such tiles make one register of four codes a row, whose columns
// 2t, 2t + 1, 8 + 2t, 8 + 2t + 1 of a group of 16 the matrix unit takes for k = 4t..4t+3: the order
// `pi` in which x, y, z are stored.
#pragma once

#include <cstdint>

#include "common/tile.cuh"
#include "numerics/e4m3.h"
#include "numerics/int8.h"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"
#include "ptx/mma_sync.cuh"

namespace sage::sm80 {

// Which of a lane's 32 values of a 16 × 64 tile count: bit 4n + c for c[c] of accumulator tile n.
inline constexpr uint32_t kAllSeen = 0xffffffffu;
inline constexpr uint32_t kUpperRow = 0x33333333u;  // the bits of row g; of row g + 8: the others

// The four bits of column group `u` and row g (r = 0) or g + 8 (r = 1), as 0x00 or 0xff bytes.
__device__ __forceinline__ uint32_t seen_bytes(uint32_t seen, int u, int r) {
  const uint32_t group = seen >> (8 * u + 2 * r);
  return (((group & 3u) | (group >> 2 & 12u)) * 0x00204081u & 0x01010101u) * 0xffu;
}

// 16 × 64 codes of one byte: r[v] is the A operand of columns [32v, 32v + 32).
struct ByteOperand {
  uint32_t r[2][4];

  __device__ __forceinline__ uint32_t& at(int u, int row) { return r[u / 2][u % 2 * 2 + row]; }

  // Zeroes what does not count.
  __device__ __forceinline__ void hide(uint32_t seen) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      at(u, 0) &= seen_bytes(seen, u, 0);
      at(u, 1) &= seen_bytes(seen, u, 1);
    }
  }
};

// e4m3 operands for matrix units that take them: their sums keep few bits, so each tile of 64 tokens
// is summed afresh and then added in float.
struct E4m3Native {
  static constexpr float kProductScale = 1.0f;    // of what the products give
  static constexpr bool kWideOperands = false;    // operands of 8 registers, not 16
  static constexpr bool kByGroups = false;        // products of all 64 tokens at once
  using Operand = ByteOperand;

  // Columns [16u, 16u + 16) from accumulator tiles 2u and 2u + 1.
  static __device__ __forceinline__ void encode(Operand& a, int u, const float (&low)[4],
                                                const float (&high)[4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      a.at(u, r) = ptx::cvt_e4m3x2_f32(low[2 * r], low[2 * r + 1]) |
                   static_cast<uint32_t>(ptx::cvt_e4m3x2_f32(high[2 * r], high[2 * r + 1])) << 16;
    }
  }

  // sum += a · b for 8 columns of b: registers 0, 1 hold k in [0, 32), 2, 3 the others.
  static __device__ __forceinline__ void multiply_add(float (&sum)[4], const Operand& a,
                                                      const uint32_t (&b)[4]) {
    const float zero[4] = {};
    float tile[4];
    ptx::mma_m16n8k32_f32_e4m3(tile, a.r[0], {b[0], b[1]}, zero);
    ptx::mma_m16n8k32_f32_e4m3(tile, a.r[1], {b[2], b[3]}, tile);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += tile[c];
  }
};

// A operands of 16-bit products: one of four registers for each group of 16 columns.
struct HalfOperand {
  uint32_t r[4][4];

  __device__ __forceinline__ void hide(uint32_t seen) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t bytes = seen_bytes(seen, u, row);
        r[u][row] &= ptx::prmt(bytes, 0, 0x1100);
        r[u][2 + row] &= ptx::prmt(bytes, 0, 0x3322);
      }
    }
  }
};

// e4m3 operands unpacked to f16 by an instruction; the sums are float sums, no need to start afresh.
// Groups of 16 tokens come one after the other, so that only one group's operand is unpacked at a time.
struct E4m3Unpacked {
  static constexpr float kProductScale = 1.0f;
  static constexpr bool kWideOperands = false;
  static constexpr bool kByGroups = true;
  using Operand = ByteOperand;

  static __device__ __forceinline__ void encode(Operand& a, int u, const float (&low)[4],
                                                const float (&high)[4]) {
    E4m3Native::encode(a, u, low, high);
  }

  static __device__ __forceinline__ void prepare(uint32_t (&half)[4], const Operand& a, int u) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t pair[2];
      ptx::cvt_f16x4_e4m3x4(pair, a.r[u / 2][u % 2 * 2 + row]);
      half[row] = pair[0];
      half[2 + row] = pair[1];
    }
  }

  // sum += a · b for the 16 tokens of a group and 8 columns.
  static __device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                                      uint32_t b) {
    uint32_t halves[2];
    ptx::cvt_f16x4_e4m3x4(halves, b);
    ptx::mma_m16n8k16_f32_f16(sum, a, halves, sum);
  }
};

// The same where no instruction knows e4m3: values are rounded to e4m3 in float, and the codes of x,
// y, z moved into f16's fields, which gives them times 2^-8, subnormals included.
struct E4m3ByBits {
  static constexpr float kProductScale = 0x1p-8f;
  static constexpr bool kWideOperands = true;
  static constexpr bool kByGroups = false;
  using Operand = HalfOperand;

  static __device__ __forceinline__ float rounded(float x) {
    const float below = x > 448.0f ? 448.0f : x;  // NaN passes
    return round_e4m3(below < -448.0f ? -448.0f : below);
  }

  static __device__ __forceinline__ void encode(Operand& a, int u, const float (&low)[4],
                                                const float (&high)[4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      a.r[u][row] = ptx::cvt_f16x2_f32(rounded(low[2 * row]), rounded(low[2 * row + 1]));
      a.r[u][2 + row] = ptx::cvt_f16x2_f32(rounded(high[2 * row]), rounded(high[2 * row + 1]));
    }
  }

  static __device__ __forceinline__ uint32_t moved(uint32_t codes, uint32_t selector) {
    const uint32_t high = ptx::prmt(codes, 0, selector);
    return (high & 0x80008000u) | (high >> 1 & 0x3f803f80u);
  }

  static __device__ __forceinline__ void multiply_add(float (&sum)[4], const Operand& a,
                                                      const uint32_t (&b)[4]) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      ptx::mma_m16n8k16_f32_f16(sum, a.r[u], {moved(b[u], 0x1404), moved(b[u], 0x3424)}, sum);
    }
  }
};

// INT8 operands with one scale for the tile.
struct Int8Tile {
  static __device__ __forceinline__ void encode(ByteOperand& a, int u, const float (&low)[4],
                                                const float (&high)[4], float inverse) {
    const auto pack = [&](float x, float y) {
      return (static_cast<uint32_t>(int8_code(x, inverse)) & 0xffu) |
             (static_cast<uint32_t>(int8_code(y, inverse)) & 0xffu) << 8;
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      a.at(u, r) = pack(low[2 * r], low[2 * r + 1]) | pack(high[2 * r], high[2 * r + 1]) << 16;
    }
  }

  // sum += (a · b) · scale.
  static __device__ __forceinline__ void multiply_add(float (&sum)[4], const ByteOperand& a,
                                                      const uint32_t (&b)[4], float scale) {
    const int zero[4] = {};
    int tile[4];
    ptx::mma_m16n8k32_s32_s8(tile, a.r[0], {b[0], b[1]}, zero);
    ptx::mma_m16n8k32_s32_s8(tile, a.r[1], {b[2], b[3]}, tile);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = fmaf(static_cast<float>(tile[c]), scale, sum[c]);
  }
};

}  // namespace sage::sm80
