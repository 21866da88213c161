// The block-scaled FP4 product D = A·B + C of m16n8k64, with one e4m3 scale for every 16 numbers along k.
//
// Fragments of lane 4g + t (PTX ISA, "Matrix Fragments for mma.m16n8k64", e2m1; eight numbers a register,
// the lowest k in the lowest four bits):
//   A: row g, k = 8t..8t+7; row g+8, same k; row g, k = 32+8t..; row g+8, k = 32+8t...
//   B: column g, k = 8t..8t+7; then k = 32+8t...
//   C and D: row g, columns 2t, 2t+1; row g+8, same columns.
// Scales ("Block Scaling for mma.sync", .scale_vec::4X), byte i of a register for k = 16i..16i+15:
//   A: lane 4g holds those of row g, lane 4g + 1 those of row g+8; other lanes' are ignored.
//   B: lane 4g + kScaleLane holds those of column g, so that one register serves four tiles of columns.
//
// sm_120a has the instruction. Elsewhere the same product is put together from m16n8k16 products of f16:
// one for every 16 numbers along k, exact, as all their sums are multiples of 1/4 below 2^10.
#pragma once

#include <cstdint>

#include "numerics/e4m3.h"
#include "ptx/mma_sync.cuh"

namespace sage::ptx {

#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
inline constexpr bool kHasFp4 = true;
#else
inline constexpr bool kHasFp4 = false;
#endif

// Four e2m1 numbers, the low 16 bits of `codes`, as f16 times 2^-14: their bits, moved.
__device__ __forceinline__ void f16_of_e2m1(uint32_t (&halves)[2], uint32_t codes) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t pair = codes >> (8 * i);
    const uint32_t apart = (pair & 0xfu) | (pair & 0xf0u) << 12;
    halves[i] = (apart & 0x00080008u) << 12 | (apart & 0x00070007u) << 9;
  }
}

// The emulation. Along k the order within 16 numbers is free, as long as A and B share it: lane t takes
// numbers 4t..4t+3 of each 16.
template <int kScaleLane>
__device__ inline void emulated_mma_m16n8k64_e2m1(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2], const float (&c)[4],
                                                  uint32_t scale_a, uint32_t scale_b) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4, quad = lane - t;
  const uint32_t row_scales[2] = {__shfl_sync(kAll, scale_a, quad),
                                  __shfl_sync(kAll, scale_a, quad + 1)};
  const uint32_t column_scales[2] = {__shfl_sync(kAll, scale_b, 8 * t + kScaleLane),
                                     __shfl_sync(kAll, scale_b, 8 * t + 4 + kScaleLane)};
  float sum[4] = {c[0], c[1], c[2], c[3]};
#pragma unroll 1  // small code and few registers: nobody runs it for speed
  for (int block = 0; block < 4; ++block) {
    const bool upper_half = block >= 2;
    const int from = quad + block % 2 * 2 + t / 2, shift = t % 2 * 16;
    uint32_t upper[2], lower[2], column[2];
    f16_of_e2m1(upper, __shfl_sync(kAll, upper_half ? a[2] : a[0], from) >> shift);
    f16_of_e2m1(lower, __shfl_sync(kAll, upper_half ? a[3] : a[1], from) >> shift);
    f16_of_e2m1(column, __shfl_sync(kAll, upper_half ? b[1] : b[0], from) >> shift);
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float product[4], row[2], col[2];
    mma_m16n8k16_f32_f16(product, {upper[0], lower[0], upper[1], lower[1]}, {column[0], column[1]},
                         zero);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row[i] = e4m3_value(static_cast<uint8_t>(row_scales[i] >> (8 * block)));
      col[i] = e4m3_value(static_cast<uint8_t>(column_scales[i] >> (8 * block)));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(product[i] * 0x1p28f, row[i / 2] * col[i % 2], sum[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = sum[i];
}

template <int kScaleLane>
__device__ __forceinline__ void mma_m16n8k64_e2m1(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2], const float (&c)[4],
                                                  uint32_t scale_a, uint32_t scale_b) {
  if constexpr (kHasFp4) {
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32"
        ".ue4m3 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13}, {%14}, {0, 0}, {%15}, {0, "
        "%16};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]), "r"(scale_a), "r"(scale_b), "n"(kScaleLane));
  } else {
    emulated_mma_m16n8k64_e2m1<kScaleLane>(d, a, b, c, scale_a, scale_b);
  }
}

}  // namespace sage::ptx
