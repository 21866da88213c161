// Host version of cuda/ptx/mma_sync.cuh: gathers the fragments of all lanes into matrices,
// multiplies, and hands the fragments of the result back. Sums are exact (double) and rounded once,
// in which the hardware may differ in the last bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "numerics/bf16.h"
#include "numerics/e4m3.h"
#include "numerics/f16.h"
#include "sim.h"

namespace sage::ptx {

template <class Element>
double sim_decode(uint32_t word, int index);
struct S8 {};
struct E4m3 {};
struct F16 {};
struct Bf16 {};
template <>
inline double sim_decode<S8>(uint32_t word, int i) {
  return static_cast<int8_t>(word >> (8 * i));
}
template <>
inline double sim_decode<E4m3>(uint32_t word, int i) {
  return e4m3_value(static_cast<uint8_t>(word >> (8 * i)));
}
template <>
inline double sim_decode<F16>(uint32_t word, int i) {
  return f16_value(static_cast<uint16_t>(word >> (16 * i)));
}
template <>
inline double sim_decode<Bf16>(uint32_t word, int i) {
  return bf16_value(static_cast<uint16_t>(word >> (16 * i)));
}

struct MmaOperands {
  const uint32_t* a;
  const uint32_t* b;
  double c[4];
  double d[4];
};

// kPerWord elements of Element in a 32-bit register; k = 8 registers' worth along a row.
template <class Element, int kPerWord>
void sim_mma(const char* name, MmaOperands& mine) {
  sim::warp_collective(name, &mine, [](void** lanes) {
    constexpr int kK = 8 * kPerWord;
    double a[16][kK], b[8][kK];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* o = static_cast<MmaOperands*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int e = 0; e < kPerWord; ++e) {
        for (int r = 0; r < 4; ++r) {
          a[g + 8 * (r & 1)][(r >> 1) * kK / 2 + t * kPerWord + e] =
              sim_decode<Element>(o->a[r], e);
        }
        for (int r = 0; r < 2; ++r) {
          b[g][r * kK / 2 + t * kPerWord + e] = sim_decode<Element>(o->b[r], e);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto* o = static_cast<MmaOperands*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
        double sum = o->c[i];
        for (int k = 0; k < kK; ++k) sum += a[row][k] * b[column][k];
        o->d[i] = sum;
      }
    }
  });
}

template <class Element, int kPerWord, class T>
void sim_mma_32(const char* name, T (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                const T (&c)[4]) {
  MmaOperands o = {a, b, {double(c[0]), double(c[1]), double(c[2]), double(c[3])}, {}};
  sim_mma<Element, kPerWord>(name, o);
  for (int i = 0; i < 4; ++i) d[i] = static_cast<T>(o.d[i]);
}

inline void mma_m16n8k32_s32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const int (&c)[4]) {
  sim_mma_32<S8, 4>("mma_m16n8k32_s32_s8", d, a, b, c);
}

inline void mma_m16n8k32_f32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  const float (&c)[4]) {
  sim_mma_32<E4m3, 4>("mma_m16n8k32_f32_e4m3", d, a, b, c);
}

inline void mma_m16n8k16_f32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 const float (&c)[4]) {
  sim_mma_32<F16, 2>("mma_m16n8k16_f32_f16", d, a, b, c);
}

inline void mma_m16n8k16_f32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  const float (&c)[4]) {
  sim_mma_32<Bf16, 2>("mma_m16n8k16_f32_bf16", d, a, b, c);
}

inline void mma_m16n8k32_f16_e4m3(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  const uint32_t (&c)[2]) {
  MmaOperands o = {a, b, {}, {}};
  for (int i = 0; i < 4; ++i) o.c[i] = f16_value(static_cast<uint16_t>(c[i / 2] >> (16 * (i & 1))));
  sim_mma<E4m3, 4>("mma_m16n8k32_f16_e4m3", o);
  for (int i = 0; i < 2; ++i) {
    // double to f16 through float: the products of e4m3 values make sums that float holds exactly.
    d[i] = f16_bits(static_cast<float>(o.d[2 * i])) |
           static_cast<uint32_t>(f16_bits(static_cast<float>(o.d[2 * i + 1]))) << 16;
  }
}

}  // namespace sage::ptx
