// 128-bit vectors in GCC's and Clang's portable notation: any CPU, including those without x86
// intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

namespace sage::SAGE_ISA {

constexpr int kLanes = 4;
constexpr int kMicroRows = 6,
              kMicroVectors = 2;  // accumulators of a matrix kernel, in 16 registers

constexpr bool kWidensF16 = false;  // in hardware

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }

// The only place where a product and a sum may be fused; here they are not.
inline F multiply_add(F a, F b, F c) { return a * b + c; }

// INT8 codes as a left operand: sum + x[2i] y[2i] + x[2i + 1] y[2i + 1] on the int16 halves of
// lane i.
typedef int16_t Code;
constexpr int kZeroCode = 0;
inline I dot_codes(I sum, I x, I y) {
  I low = ((x << 16) >> 16) * ((y << 16) >> 16);
  return sum + low + (x >> 16) * (y >> 16);
}

// IEEE half precision, without hardware: the exponent is moved by a power of two that both formats
// hold.
inline F load_f16(const uint16_t* from) {
  F result;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t magnitude = from[i] & 0x7fff, sign = static_cast<uint32_t>(from[i] & 0x8000) << 16;
    float value;
    if (magnitude >= 0x7c00) {
      uint32_t bits = 0x7f800000 | (magnitude << 13);
      std::memcpy(&value, &bits, 4);
    } else if (magnitude >= 0x0400) {
      uint32_t bits = (magnitude << 13) + (112u << 23);
      std::memcpy(&value, &bits, 4);
    } else {
      value = static_cast<float>(magnitude) * 0x1p-24f;
    }
    result[i] = sign ? -value : value;
  }
  return result;
}

// Nearest even; too large gives infinity.
inline void store_f16(uint16_t* to, F x) {
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits;
    float value = x[i];
    std::memcpy(&bits, &value, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff, half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;
    } else if (magnitude >= 0x47800000) {
      half = 0x7c00;
    } else if (magnitude >= 0x38800000) {
      half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    } else {
      float steps = (value < 0 ? -value : value) * 0x1p24f;  // in units of the smallest half
      half = static_cast<uint32_t>(static_cast<int32_t>((steps + 0x1.8p23f) - 0x1.8p23f));
    }
    to[i] = static_cast<uint16_t>(sign | half);
  }
}

}  // namespace sage::SAGE_ISA
