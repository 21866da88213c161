// 256-bit vectors: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sage::SAGE_ISA {

constexpr int kLanes = 8;
constexpr int kMicroRows = 6,
              kMicroVectors = 2;  // accumulators of a matrix kernel, in 16 registers

constexpr bool kWidensF16 = true;  // in hardware

typedef float F __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));

inline F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
inline F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }

// The only place where a product and a sum are fused.
inline F multiply_add(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

// INT8 codes as a left operand: sum + x[2i] y[2i] + x[2i + 1] y[2i + 1] on the int16 halves of
// lane i.
typedef int16_t Code;
constexpr int kZeroCode = 0;
inline I dot_codes(I sum, I x, I y) { return sum + (I)_mm256_madd_epi16((__m256i)x, (__m256i)y); }

inline F load_f16(const uint16_t* from) {
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void store_f16(uint16_t* to, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace sage::SAGE_ISA
