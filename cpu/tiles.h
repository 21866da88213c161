// Matrix products on tiles, and the packing that they read. Compiled once per instruction set.
//
// A *panel* matrix [depth, columns] stores kPanel columns at a time: panel after panel, each
// [depth, kPanel]. The inner loop of a product then walks memory in one direction.
#pragma once

#include "numerics.h"

namespace sage::SAGE_ISA {

constexpr int64_t kPanel = kMicroVectors * kLanes;
static_assert(kTile % kPanel == 0, "a tile of 64 columns is a whole number of panels");

// Offset of (row, column) in a panel matrix; columns `column ... column + kLanes - 1` are adjacent.
inline int64_t panel_offset(int64_t depth, int64_t row, int64_t column) {
  return column / kPanel * depth * kPanel + row * kPanel + column % kPanel;
}

#ifdef SAGE_BF16_PRODUCTS
constexpr bool kBf16Products = true;
#else
constexpr bool kBf16Products = false;
#endif

// A float product takes its operands as float32 or, where kBf16Products, as pairs of bf16 numbers,
// which count as one number of depth. Of e4m3 numbers, bf16 numbers and INT8 codes it is exact.
typedef int32_t Pair;

template <bool kPairs>
struct FactorOf {  // in an operand whose depth is a tile
  typedef float Type;
  static constexpr int64_t kDepth = kTile;
};
template <>
struct FactorOf<true> {
  typedef Pair Type;
  static constexpr int64_t kDepth = kTile / 2;
};

// The bf16 pairs of two vectors, low halves first; the numbers must be representable in bf16.
inline I pair_of(F low, F high) {
  return (bits_of(low) >> 16 & 0xffff) | (bits_of(high) & ~0xffff);
}

// Rows j and j + 16 of a tile share a pair, as adjacent vectors of a row do.
constexpr int64_t kApart = 16;
static_assert(!kBf16Products || kLanes == kApart, "a row's vectors form pairs");
inline int64_t pair_row(int64_t row) { return row / (2 * kApart) * kApart + row % kApart; }

// Stores a vector of the right operand [64, columns], row j before row j + 16.
inline void store_factors(float* panels, int64_t row, int64_t column, F x) {
  store(panels + panel_offset(kTile, row, column), x);
}
inline void store_factors(Pair* panels, int64_t row, int64_t column, F x) {
  Pair* to = panels + panel_offset(kTile / 2, pair_row(row), column);
  store(to, row & kApart ? load<I>(to) | pair_of(F{}, x) : pair_of(x, F{}));
}

template <class T>
struct LeftOf {  // the left operand [rows, depth] of a float product, with strides in elements
  const T* data;
  int64_t row_stride, depth_stride;
};
typedef LeftOf<float> Left;

// A matrix [64, 64] as a left operand, and its transpose; pairs are written to the second argument.
inline Left as_it_is(const float* matrix, float*) { return {matrix, kTile, 1}; }
inline Left transposed(const float* matrix, float*) { return {matrix, 1, kTile}; }
inline LeftOf<Pair> as_it_is(const float* matrix, Pair* pairs) {
  for (int64_t i = 0; i < kTile * kTile; i += 2 * kLanes) {
    store(pairs + i / 2, pair_of(loadf(matrix + i), loadf(matrix + i + kLanes)));
  }
  return {pairs, kTile / 2, 1};
}
inline LeftOf<Pair> transposed(const float* matrix, Pair* pairs) {
  for (int64_t r = 0; r < kTile; ++r) {
    if (r & kApart) continue;
    const float* row = matrix + r * kTile;
    for (int64_t j = 0; j < kTile; j += kLanes) {
      I pair = pair_of(loadf(row + j), loadf(row + kApart * kTile + j));
      store(pairs + pair_row(r) * kTile + j, pair);
    }
  }
  return {pairs, 1, kTile};
}

template <class T>
struct Right {  // the right operand, a panel matrix or a range of its rows
  typedef LeftOf<T> Partner;
  const T* data;
  int64_t depth, panel_stride;
  Right(const T* panels, int64_t rows) : data(panels), depth(rows), panel_stride(rows * kPanel) {}
  Right rows(int64_t begin, int64_t count) const {
    Right part = *this;
    part.data += begin * kPanel;
    part.depth = count;
    return part;
  }
};
struct Weights {  // one factor for each row of a product (stride 1) or one for all (stride 0)
  const float* data;
  int64_t stride;
};

inline F load_factors(const float* from) { return load<F>(from); }
inline I load_factors(const Pair* from) { return load<I>(from); }

template <int kRows, class T>
inline void float_block(float* c, int64_t ldc, const T* a, LeftOf<T> strides, const T* b,
                        int64_t depth, const float* weight, int64_t weight_stride) {
  typedef decltype(load_factors(b)) V;
  F sum[kRows][kMicroVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V x[kMicroVectors];
    for (int v = 0; v < kMicroVectors; ++v) x[v] = load_factors(b + k * kPanel + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      V factor = a[r * strides.row_stride + k * strides.depth_stride] - V{};
      for (int v = 0; v < kMicroVectors; ++v) sum[r][v] = multiply_add(factor, x[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kMicroVectors; ++v) {
      float* to = c + r * ldc + v * kLanes;
      store(to, multiply_add(sum[r][v], splat(weight[r * weight_stride]), loadf(to)));
    }
  }
}

// c[r, :] += weight[r] · Σ_k a[r, k] b[k, :]
template <class T>
inline void add_product(float* c, int64_t ldc, int64_t rows, int64_t columns,
                        typename Right<T>::Partner a, Right<T> b, Weights weight) {
  for (int64_t column = 0; column < columns; column += kPanel) {
    const T* panel = b.data + column / kPanel * b.panel_stride;
    auto block = [&](auto kernel, int64_t r) {
      kernel(c + r * ldc + column, ldc, a.data + r * a.row_stride, a, panel, b.depth,
             weight.data + r * weight.stride, weight.stride);
    };
    int64_t r = 0;
    for (; rows - r >= kMicroRows; r += kMicroRows) block(float_block<kMicroRows, T>, r);
    for (; rows - r >= 4; r += 4) block(float_block<4, T>, r);
    for (; rows - r >= 1; r += 1) block(float_block<1, T>, r);
  }
}

// INT8 operands: as many channels as fit share the 32 bits of a lane, as dot_codes wants them. Left
// operands hold codes with kZeroCode added, which a product makes good where it starts.
constexpr int kChannels = 4 / sizeof(Code);
typedef Code Codes __attribute__((vector_size(kLanes * sizeof(Code))));

inline void hold_codes(Code* to, const int8_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Code>(from[i] + kZeroCode);
}
inline void hold_codes(Code* to, I codes) {
  store(to, __builtin_convertvector(codes + kZeroCode, Codes));
}
inline void hold_zeros(Code* to, int64_t count) {
  __builtin_memset(to, kZeroCode, count * sizeof(Code));
}

// The rows of a packed tile: a row of starting values, then Hp / kChannels rows of channels.
inline int64_t packed_rows(int64_t Hp) { return 1 + Hp / kChannels; }
inline int64_t packed_size(int64_t Hp) { return kTile * packed_rows(Hp); }

template <int kRows>
inline void int_block(int32_t* c, int64_t ldc, const Code* a, int64_t Hp, const int32_t* panel) {
  I sum[kRows][kMicroVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kMicroVectors; ++v) sum[r][v] = load<I>(panel + v * kLanes);
  }
  for (int64_t k = 0; k < Hp / kChannels; ++k) {
    I b[kMicroVectors];
    for (int v = 0; v < kMicroVectors; ++v) b[v] = load<I>(panel + (k + 1) * kPanel + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      int32_t channels;
      __builtin_memcpy(&channels, a + r * Hp + kChannels * k, 4);
      I x = splat_int(channels);
      for (int v = 0; v < kMicroVectors; ++v) sum[r][v] = dot_codes(sum[r][v], x, b[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kMicroVectors; ++v) store(c + r * ldc + v * kLanes, sum[r][v]);
  }
}

// c[r, j] = Σ_h a[r, h] b[j, h] for the 64 keys j of a tile; a [rows, Hp], b from pack_keys.
inline void int_product(int32_t* c, int64_t rows, const Code* a, int64_t Hp, const int32_t* b) {
  for (int64_t column = 0; column < kTile; column += kPanel) {
    const int32_t* panel = b + column * packed_rows(Hp);
    auto block = [&](auto kernel, int64_t row) {
      kernel(c + row * kTile + column, kTile, a + row * Hp, Hp, panel);
    };
    int64_t r = 0;
    for (; rows - r >= kMicroRows; r += kMicroRows) block(int_block<kMicroRows>, r);
    for (; rows - r >= 4; r += 4) block(int_block<4>, r);
    for (; rows - r >= 1; r += 1) block(int_block<1>, r);
  }
}

inline void pack_pairs(int32_t* to, const int8_t* from, int64_t keys, int64_t Hp) {
  typedef int16_t V8 __attribute__((vector_size(16)));
  typedef int8_t B8 __attribute__((vector_size(8)));
  for (int64_t j = 0; j < kTile; j += 8) {
    for (int64_t h = 0; h < Hp; h += 16) {
      V8 x[8], y[8];  // an 8 × 8 matrix of byte pairs, transposed in three rounds
      for (int i = 0; i < 8; ++i) x[i] = j + i < keys ? load<V8>(from + (j + i) * Hp + h) : V8{};
      constexpr V8 low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
      for (int round = 0; round < 3; ++round) {
        for (int i = 0; i < 4; ++i) {
          y[2 * i] = __builtin_shuffle(x[i], x[i + 4], low);
          y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 4], high);
        }
        for (int i = 0; i < 8; ++i) x[i] = y[i];
      }
      for (int i = 0; i < 8; ++i) {  // x[i]: channels h + 2i and h + 2i + 1 of eight keys
        B8 half[2];
        __builtin_memcpy(half, &x[i], 16);
        for (int part = 0; part < 2; ++part) {
          int64_t column = j + 4 * part;
          int64_t at = panel_offset(packed_rows(Hp), 1 + h / 2 + i, column / kLanes * kLanes) +
                       column % kLanes;
          store(to + at, __builtin_convertvector(half[part], V8));
        }
      }
    }
  }
}

inline void pack_quads(int32_t* to, const int8_t* from, int64_t keys, int64_t Hp) {
  I low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  for (int64_t j = 0; j < kTile; j += kLanes) {
    for (int64_t h = 0; h < Hp; h += 4 * kLanes) {
      I x[kLanes], y[kLanes];  // a square matrix of quads, transposed
      for (int i = 0; i < kLanes; ++i) x[i] = j + i < keys ? load<I>(from + (j + i) * Hp + h) : I{};
      for (int round = 1; round < kLanes; round *= 2) {
        for (int i = 0; i < kLanes / 2; ++i) {
          y[2 * i] = __builtin_shuffle(x[i], x[i + kLanes / 2], low);
          y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kLanes / 2], high);
        }
        for (int i = 0; i < kLanes; ++i) x[i] = y[i];
      }
      for (int i = 0; i < kLanes; ++i) {
        store(to + panel_offset(packed_rows(Hp), 1 + h / 4 + i, j), x[i]);
      }
    }
  }
}

// A tile of 64 keys (`keys` of them real, the rest zero) of int8 [*, Hp] as the right operand of
// int_product: the panel matrix [1 + Hp / kChannels, 64].
inline void pack_keys(int32_t* to, const int8_t* from, int64_t keys, int64_t Hp) {
  if constexpr (kChannels == 2) pack_pairs(to, from, keys, Hp);
  else pack_quads(to, from, keys, Hp);
  // A product starts at minus what a left operand of zeros would give.
  Code zeros[kChannels];
  hold_zeros(zeros, kChannels);
  int32_t zero;
  __builtin_memcpy(&zero, zeros, 4);
  for (int64_t j = 0; j < kTile; j += kLanes) {
    I sum{};
    for (int64_t k = 1; zero && k < packed_rows(Hp); ++k) {
      sum = dot_codes(sum, splat_int(zero), load<I>(to + panel_offset(packed_rows(Hp), k, j)));
    }
    store(to + panel_offset(packed_rows(Hp), 0, j), -sum);
  }
}

// Transposes a 16 × 16 matrix of bytes: to[c * to_stride + r] = from[r * from_stride + c].
inline void transpose_bytes(uint8_t* to, int64_t to_stride, const uint8_t* from,
                            int64_t from_stride) {
  typedef uint8_t V16 __attribute__((vector_size(16)));
  constexpr V16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr V16 high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  V16 x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = load<V16>(from + i * from_stride);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + 8], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 8], high);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
  for (int i = 0; i < 16; ++i) store(to + i * to_stride, x[i]);
}

// Stored position p of a transposed tensor's group of 16 holds token kPi[p] (docs/abi.md,
// "Rounding").
constexpr int kPi[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};

}  // namespace sage::SAGE_ISA
