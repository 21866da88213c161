// INT8 groups (docs/abi.md, "Rounding"): a scale from the largest magnitude, codes in ±127.
// Every operation rounds once: compile without --use_fast_math.
#pragma once

#include <cmath>

#include "numerics/host_device.h"

namespace sage {

inline constexpr float kTinyAmax = 0x1p-110f;  // groups below this are zero

struct GroupScale {
  float scale;    // code · scale ≈ x
  float inverse;  // code = round(x · inverse)
};

// `range` is the largest code: 127 for INT8, the e4m3 range for e4m3 channels.
SAGE_HOST_DEVICE GroupScale group_scale(float amax, float range) {
  if (amax < kTinyAmax) return {0.0f, 0.0f};
  return {amax * (1.0f / range), range / amax};
}

SAGE_HOST_DEVICE int int8_code(float x, float inverse) {
  const float code = rintf(x * inverse);
  return static_cast<int>(fminf(fmaxf(code, -127.0f), 127.0f));
}

}  // namespace sage
