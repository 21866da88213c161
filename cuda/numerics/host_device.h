// Marks functions that host and device share, and reads a float's bits on both.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SAGE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SAGE_HOST_DEVICE inline
#endif

namespace sage {

SAGE_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

SAGE_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

SAGE_HOST_DEVICE bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }

// 2^e for -127 < e < 128; 0 for e = -127.
SAGE_HOST_DEVICE float power_of_two(int e) {
  return bits_float(static_cast<uint32_t>(e + 127) << 23);
}

}  // namespace sage
