// 512-bit vectors: AVX-512 (F, BW, DQ, VL) and VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sage::SAGE_ISA {

constexpr int kLanes = 16;
constexpr int kMicroRows = 6,
              kMicroVectors = 4;  // accumulators of a matrix kernel, in 32 registers

constexpr bool kWidensF16 = true;  // in hardware

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));

inline F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
inline F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }

// The only place where a product and a sum are fused.
inline F multiply_add(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

// INT8 codes as a left operand, four bytes a lane: VNNI multiplies unsigned bytes by signed ones,
// so a code is held with 128 added.
typedef uint8_t Code;
constexpr int kZeroCode = 128;
inline I dot_codes(I sum, I x, I y) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)y);
}

inline F load_f16(const uint16_t* from) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline void store_f16(uint16_t* to, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace sage::SAGE_ISA
