// Single arithmetic instructions that CUDA C++ does not spell without compiler flags.
#pragma once

#include <cstdint>

namespace sage::ptx {

// 2^x within about 2^-22; ex2(-inf) = 0, subnormal results become 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) within about 2^-22.
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a · b + c, rounded once and kept within 0 and 1; NaN becomes 0.
__device__ __forceinline__ float fma_sat(float a, float b, float c) {
  float y;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}

// Larger and smaller of two pairs of 16-bit floats; NaN gives way to numbers.
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t min_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The larger magnitudes of two pairs, whose signs mean nothing; NaN is larger than all numbers.
__device__ __forceinline__ uint32_t max_magnitude_bf16x2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
  uint32_t r;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  return __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu);
#endif
}
__device__ __forceinline__ uint32_t max_magnitude_f16x2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
  uint32_t r;
  asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
#else
  return __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu);
#endif
}

__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
// Operands and results below 2^-14 count as zeros.
__device__ __forceinline__ uint32_t fma_ftz_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.ftz.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
__device__ __forceinline__ uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t max_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t min_f16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// Bytes picked from {a: 0..3, b: 4..7} by the nibbles of `selector`, lowest first.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}

// x, of which the compiler knows nothing: what is computed from it inside a loop stays inside,
// instead of waiting for its turn in a register.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The thread's index in its block, likewise. That it is not negative spares the corrections of a signed division.
__device__ __forceinline__ int opaque_thread() {
  const int x = opaque(static_cast<int>(threadIdx.x));
  __builtin_assume(x >= 0 && x < 1024);
  return x;
}

// The number of blocks, likewise, of a grid of one axis: `opaque(gridDim.x)` would be read early and wait for its use.
__device__ __forceinline__ int opaque_blocks() {
  int x;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(x));
  return x;
}

// True for every kernel parameter `size` that is not negative, but ptxas cannot know. It loads ahead
// as far as it can, until other registers spill, and stops at a branch (on sm_120 not at
// __syncwarp()). `place` differs from place to place, lest ptxas join them.
__device__ __forceinline__ bool always(int size, int place) { return opaque(size) >= -place; }

}  // namespace sage::ptx
