// The two score products of the backward pass, S and dP, for 16 rows of a warp and 64 columns in
// shared memory, and what follows from them: e = 2^(s·score + shift), g = e·(d·gain + offset).
//
// Rows are queries in the dQ kernel and keys in the dK/dV kernel; the code is the same but for where
// the per-query terms sit: in registers of the row, or in shared memory by column.
#pragma once

#include "common/scale.cuh"
#include "common/store.cuh"
#include "common/tile.cuh"
#include "ptx/math.cuh"
#include "ptx/mma_sync.cuh"
#include "sm80/backward_operands.cuh"
#include "sm80/backward_workspace.h"

namespace sage::sm80 {

inline constexpr int kTile = 64;          // columns of a tile, and tokens that share a K or V scale
inline constexpr int kWarpRows = 16;      // rows of a warp
inline constexpr int kBackwardWarps = 4;  // of a block: 64 rows, one tile of INT8 scales
inline constexpr int kBackwardThreads = kBackwardWarps * kWarpSize;
inline constexpr int kBlockRows = kBackwardWarps * kWarpRows;
inline constexpr int kTileGroups = 8;     // accumulator tiles, of 8 columns, of a tile
inline constexpr int kStepBytes = 32;     // of a row that one matrix instruction takes

// dO·Vᵀ from INT8 codes; accumulators as in common/scale.cuh.
struct DpInt8 {
  static constexpr int kBytes = 1;  // of an element
  using Accumulator = int;
  static constexpr Accumulator kZero = kMagicBits;
  static __device__ __forceinline__ float value(Accumulator d) { return accumulated(d); }
  static __device__ __forceinline__ void multiply_add(Accumulator (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    ptx::mma_m16n8k32_s32_s8(d, a, b, d);
  }
};

// dO·Vᵀ from bf16.
struct DpBf16 {
  static constexpr int kBytes = 2;
  using Accumulator = float;
  static constexpr Accumulator kZero = 0.0f;
  static __device__ __forceinline__ float value(Accumulator d) { return d; }
  static __device__ __forceinline__ void multiply_add(Accumulator (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_f32_bf16(d, a, b, d);
  }
};

// The address `row` rows (a multiple of 8) and `chunks` chunks (bits that the chunk of `address`
// lacks) further on in a tile. Registers are short here: all accesses of a lane share one address.
template <class Tile>
__device__ __forceinline__ uint32_t further(uint32_t address, int row, int chunks) {
  return (address ^ (chunks % 8 * kChunkBytes)) + row * (Tile::kChunks * kChunkBytes) +
         chunks / 8 * 8 * kChunkBytes;
}

// B operands of tile rows [row, row + 16) and bytes [32·step, 32·step + 32).
template <class Tile>
__device__ __forceinline__ void load_columns(uint32_t (&b)[4], uint32_t tile, int row, int step,
                                             int lane) {
  const int matrix = lane / 8;
  const uint32_t first = tile + Tile::offset(matrix / 2 * 8 + lane % 8, matrix % 2);
  ptx::ldmatrix_x4(b, further<Tile>(first, row, 2 * step));
}

// B operands of tile rows [row, row + 8) and all 64 bytes.
template <class Tile>
__device__ __forceinline__ void load_channels(uint32_t (&b)[4], uint32_t tile, int row, int lane) {
  const int matrix = lane / 8;
  ptx::ldmatrix_x4(b, further<Tile>(tile + Tile::offset(lane % 8, matrix), row, 0));
}

// The 16 bytes [16·u, 16·u + 16) of tile rows [row, row + 32), eight rows a register.
template <class Tile>
__device__ __forceinline__ void load_channel_groups(uint32_t (&b)[4], uint32_t tile, int row,
                                                    int u, int lane) {
  ptx::ldmatrix_x4(b, further<Tile>(tile + Tile::offset(lane, 0), row, u));
}

// Where a warp finds its 16 rows of Q and dO (or K and V), the A operands, again and again.
enum class RowsIn {
  kRegisters,  // fastest
  kShared,     // where registers are short
  kGlobal      // where both are: through the caches, for large heads
};

// kRows rows of kRowBytes bytes of a block, of which the warp owns 16.
template <int kRows, int kRowBytes, RowsIn kPlace>
struct RowOperand {
  using Tile = SharedTile<kRows, kRowBytes>;
  static constexpr int kSteps = kRowBytes / kStepBytes;
  static constexpr int kSharedBytes = kPlace == RowsIn::kShared ? Tile::kBytes : 0;

  uint32_t kept[kPlace == RowsIn::kRegisters ? kSteps : 1][4];
  uint32_t tile;                // kShared
  int row;                      // the warp's first row in the block
  const unsigned char* global;  // row 0 of the block
  int valid;                    // rows that exist; the others are zero

  // All kThreads threads of the block call it; kShared rows arrive with the next cp.async group.
  template <int kThreads>
  __device__ __forceinline__ void load(const void* block_rows, int valid_rows, uint32_t shared) {
    row = static_cast<int>(threadIdx.x) / kWarpSize * kWarpRows;
    global = static_cast<const unsigned char*>(block_rows);
    valid = valid_rows;
    tile = shared;
    if constexpr (kPlace == RowsIn::kShared) {
      Tile::template copy<kThreads>(tile, global, kRowBytes, valid);
    } else if constexpr (kPlace == RowsIn::kRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) read(kept[step], step, threadIdx.x % kWarpSize);
    }
  }

  // The operand of bytes [32·step, 32·step + 32).
  __device__ __forceinline__ void get(uint32_t (&a)[4], int step, int lane) const {
    if constexpr (kPlace == RowsIn::kRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept[step][i];
    } else if constexpr (kPlace == RowsIn::kShared) {
      const int matrix = lane / 8;
      const uint32_t first = tile + Tile::offset(row + matrix % 2 * 8 + lane % 8, matrix / 2);
      ptx::ldmatrix_x4(a, further<Tile>(first, 0, 2 * step));
    } else {
      read(a, step, ptx::opaque(lane));  // else all loads would move out of the loop
    }
  }

 private:
  __device__ __forceinline__ void read(uint32_t (&a)[4], int step, int lane) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = row + lane / 4 + i % 2 * 8;
      const int column = kStepBytes * step + i / 2 * 16 + lane % 4 * 4;
      a[i] = at < valid ? *reinterpret_cast<const uint32_t*>(
                              global + static_cast<int64_t>(at) * kRowBytes + column)
                        : 0u;
    }
  }
};

// acc = rows · columnsᵀ for 8·kGroups columns of the tile from `column` on.
template <class Columns, class Rows, class Accumulator, int kGroups, class Multiply>
__device__ __forceinline__ void score_product(Accumulator (&acc)[kGroups][4], const Rows& rows,
                                              uint32_t columns, int column, Accumulator zero,
                                              Multiply multiply_add) {
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) acc[n][c] = zero;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  constexpr int kSteps = Columns::kChunks / 2;
  constexpr int kAtOnce = kSteps > 8 ? 4 : kSteps;  // else ptxas loads ahead until registers spill
#pragma unroll kAtOnce
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[4];
    rows.get(a, step, lane);
#pragma unroll
    for (int n = 0; n < kGroups; n += 2) {
      uint32_t b[4];
      load_columns<Columns>(b, columns, column + 8 * n, step, lane);
      multiply_add(acc[n], a, {b[0], b[1]});
      multiply_add(acc[n + 1], a, {b[2], b[3]});
    }
  }
}

// Both products of 8·kGroups columns of a tile: a whole tile's accumulators would not fit.
template <class Dp, int kGroups>
struct ScorePart {
  int s[kGroups][4];
  typename Dp::Accumulator d[kGroups][4];

  template <class CodeColumns, class DpColumns, class CodeRows, class DpRows>
  __device__ __forceinline__ void multiply(const CodeRows& code_rows, uint32_t code_columns,
                                           const DpRows& dp_rows, uint32_t dp_columns,
                                           int column) {
    score_product<CodeColumns>(
        s, code_rows, code_columns, column, kMagicBits,
        [](int(&acc)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {
          ptx::mma_m16n8k32_s32_s8(acc, a, b, acc);
        });
    score_product<DpColumns>(
        d, dp_rows, dp_columns, column, Dp::kZero,
        [](typename Dp::Accumulator(&acc)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {
          Dp::multiply_add(acc, a, b);
        });
  }

  // e and g of accumulator tile n, element c, for the query whose terms, times the scales of the
  // keys, are given.
  __device__ __forceinline__ void evaluate(int n, int c, const QueryTerms& terms, float& e,
                                           float& g) const {
    e = ptx::ex2(fmaf(accumulated(s[n][c]), terms.score, terms.shift));
    g = e * fmaf(Dp::value(d[n][c]), terms.gain, terms.offset);
  }
};

__device__ __forceinline__ QueryTerms with_key_scales(QueryTerms terms, float k_scale,
                                                      float v_scale) {
  terms.score *= k_scale;
  terms.gain *= v_scale;
  return terms;
}

// The scales of 64 keys; a negative K scale says that some of them are bad.
struct KeyScales {
  float k, v;
  bool any_bad;

  template <class Dp>
  static __device__ __forceinline__ KeyScales load(const BackwardCall& p, int kv_plane,
                                                   int tile) {
    const int64_t index = static_cast<int64_t>(kv_plane) * tiles_of(p.shape.keys) + tile;
    const float k = p.k_scale[index];
    return {fabsf(k), Dp::kBytes == 1 ? p.v_dp_scale[index] : 1.0f, k < 0.0f};
  }
};

// The recipes: formats of dO·Vᵀ and of the gradient products.
template <class Dp_, class Products_>
struct Train8 {
  using Dp = Dp_;
  using Products = Products_;
  using Operand = typename Products::Operand;
  static constexpr bool kTileScales = false;  // every scale is known before the loop
  static constexpr bool kWideOperands = Products::kWideOperands;
};

struct SageBwd {
  using Dp = DpBf16;
  using Operand = ByteOperand;
  static constexpr bool kTileScales = true;  // the codes' scale is the maximum of 64 × 64 values
  static constexpr bool kWideOperands = true;  // the values wait in float for their maximum
};

// e and g of a warp's 16 × 64 tile in float, for recipes that need their maxima first.
struct FloatTile {
  float value[8][4];

  __device__ __forceinline__ void hide(uint32_t seen) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) value[n][c] = seen >> (4 * n + c) & 1u ? value[n][c] : 0.0f;
    }
  }

  // Bits of the warp's largest magnitude: ordered like the floats, with NaN on top.
  __device__ __forceinline__ uint32_t largest() const {
    uint32_t bits = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) bits = max(bits, __float_as_uint(value[n][c]) & 0x7fffffffu);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      bits = max(bits, __shfl_xor_sync(kFullWarp, bits, step));
    }
    return bits;
  }

  __device__ __forceinline__ void encode(ByteOperand& a, float inverse) const {
#pragma unroll
    for (int u = 0; u < 4; ++u) Int8Tile::encode(a, u, value[2 * u], value[2 * u + 1], inverse);
  }
};

// INT8 scale of a 64 × 64 tile from its four warps' maxima.
__device__ __forceinline__ GroupScale tile_codes(const uint32_t* maxima) {
  return group_scale(
      __uint_as_float(max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3]))), 127.0f);
}

// sums += operand · columns: 16 rows × 64 tokens by 64 tokens × 8 channels for each of kGroups.
// `size`: see ptx::always.
template <class Recipe, class Columns, int kGroups>
__device__ __forceinline__ void multiply_tile(float (&sums)[kGroups][4],
                                              const typename Recipe::Operand& operand,
                                              uint32_t columns, float scale, int size) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if constexpr (Recipe::kTileScales) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      uint32_t b[4];
      load_channels<Columns>(b, columns, 8 * n, lane);
      Int8Tile::multiply_add(sums[n], operand, b, scale);
    }
  } else if constexpr (Recipe::Products::kByGroups) {
#pragma unroll
    for (int u = 0; u < kTile / 16; ++u) {
      uint32_t a[4];
      Recipe::Products::prepare(a, operand, u);
#pragma unroll
      for (int n = 0; n < kGroups; n += 4) {
        uint32_t b[4];
        load_channel_groups<Columns>(b, columns, 8 * n, u, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) Recipe::Products::multiply_add(sums[n + i], a, b[i]);
      }
    }
  } else {
#pragma unroll
    for (int n = 0; n < kGroups; n += 8) {
      if (n > 0 && !ptx::always(size, n)) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t b[4];
        load_channels<Columns>(b, columns, 8 * (n + i), lane);
        Recipe::Products::multiply_add(sums[n + i], operand, b);
      }
    }
  }
}

// What a channel's sum is multiplied by: its e4m3 scale, from the maximum over the channel.
template <class Recipe>
__device__ __forceinline__ float gradient_scale(const float* maxima, int64_t channel) {
  if constexpr (Recipe::kTileScales) {
    return 1.0f;
  } else {
    return group_scale(maxima[channel], 448.0f).scale *
           (1.0f / Recipe::Products::kProductScale);
  }
}

}  // namespace sage::sm80
