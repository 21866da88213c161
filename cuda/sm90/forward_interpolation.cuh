// Exponentials without the unit for exponentials, which is what head dimension 64 waits for (docs/kernels/sm90_forward.md).
// `interpolated_exp2` in sage_jax/exponentials.py is their specification.
#pragma once

#include <cstdint>

#include "ptx/math.cuh"

namespace sage::sm90 {

// 2^x of two scores by interpolation, as a pair of f16, and no exponential unit. An f16's bits, read as an integer, are a
// logarithm: the f16 whose bits are 1024 (x + 15), rounded up, lies on the straight lines between powers of two, M(x). M(x) + M(x + 1/2)/√2
// has corners twice as close, and is within 0.8% of 2^x but for a factor. That, as a part of x, is chosen so that a row's largest
// probability comes out right: the result is 2^x where x is a multiple of 1/2, and between .5% less and 1.1% more elsewhere.
// Values below 2^-14 come out as 0.
//
// The bits come from floats between 1/2 and 1, whose bits are an integer, too: v = 1 - (x + kBias)/64, which `fma_sat` does not
// let exceed 1, counts from the largest x down in steps of 2^-8 of them, of which 16 bits are what is left of 1024 (x + kBias).
struct Interpolation {
  static constexpr float kBias = 15.0f - 1.0505f;  // f16's, and the factor
  static constexpr uint32_t kHalfOctave = 512u * 0x10001u;
  static constexpr uint32_t kInverseRoot = 0x39a839a8u;  // two times 1/√2 in f16

  float multiplier, start;  // v = score · multiplier + start

  // x = score · multiplier + shift.
  __device__ __forceinline__ Interpolation(float x_multiplier, float x_shift)
      : multiplier(x_multiplier * (-1.0f / 64)), start(fmaf(x_shift, -1.0f / 64, 1.0f - kBias / 64)) {}

  __device__ __forceinline__ uint32_t operator()(int low, int high) const {
    const float v[2] = {ptx::fma_sat(__int_as_float(low), multiplier, start),
                        ptx::fma_sat(__int_as_float(high), multiplier, start)};
    const uint32_t below_top = ptx::prmt(__float_as_uint(v[0]), __float_as_uint(v[1]), 0x6521);
    // Neither half borrows or carries: it is at most 0x8000, and x + 15.5 less than 31.
    const uint32_t line = 0x80008000u - below_top, other_line = 0x80008000u + kHalfOctave - below_top;
    return ptx::fma_ftz_f16x2(other_line, kInverseRoot, line);
  }
};

}  // namespace sage::sm90
