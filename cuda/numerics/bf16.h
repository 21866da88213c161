// bfloat16: the upper half of a float.
#pragma once

#include "numerics/host_device.h"

namespace sage {

// Nearest bf16, ties to even; NaN stays NaN.
SAGE_HOST_DEVICE uint16_t bf16_bits(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

SAGE_HOST_DEVICE float bf16_value(uint16_t bits) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}

}  // namespace sage
