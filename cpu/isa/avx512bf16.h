// AVX-512 with products of bfloat16 numbers.
#pragma once

#include "avx512.h"

#define SAGE_BF16_PRODUCTS

namespace sage::SAGE_ISA {

// c + a[2i] b[2i] + a[2i + 1] b[2i + 1] on the bf16 halves of lane i. Denormals count as zero.
inline F multiply_add(I a, I b, F c) {
  return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}

}  // namespace sage::SAGE_ISA
