// e4m3 (fn): 4 exponent bits of bias 7, 3 mantissa bits, largest 448, no infinity, NaN 0x7f.
#pragma once

#include "numerics/host_device.h"

namespace sage {

// Nearest e4m3 value of |x| ≤ 448, ties to even, still as float. Adding and taking
// away 1.5·2^(e+20) leaves 3 bits after the leading one of x in [2^e, 2^(e+1)); below 2^-6 the grid
// stays 2^-9.
SAGE_HOST_DEVICE float round_e4m3(float x) {
  uint32_t exponent = float_bits(x) & 0x7f800000u;
  const uint32_t smallest = (127u - 6u) << 23;
  exponent = exponent < smallest ? smallest : exponent;
  const float magic = bits_float(exponent + (20u << 23) + 0x00400000u);
  return (x + magic) - magic;
}

// The code of x: nearest, ties to even, saturating at ±448; the sign of zero is kept.
SAGE_HOST_DEVICE uint8_t e4m3_code(float x) {
  const uint32_t sign = float_bits(x) >> 31 << 7;
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (magnitude >= float_bits(448.0f)) return static_cast<uint8_t>(sign | 0x7eu);
  const float rounded = round_e4m3(bits_float(magnitude));
  const uint32_t code = rounded < 0x1p-6f ? static_cast<uint32_t>(rounded * 512.0f)
                                          : (float_bits(rounded) >> 20) - (120u << 3);
  return static_cast<uint8_t>(sign | code);
}

SAGE_HOST_DEVICE float e4m3_value(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t sign = static_cast<uint32_t>(code >> 7) << 31;
  if (magnitude == 0x7fu) return bits_float(sign | 0x7fc00000u);
  const float value = magnitude < 8u ? static_cast<float>(magnitude) * 0x1p-9f
                                     : bits_float((magnitude << 20) + (120u << 23));
  return bits_float(float_bits(value) | sign);
}

}  // namespace sage
