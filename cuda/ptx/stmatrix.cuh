// stmatrix (sm_90): 8×8 matrices of 16-bit units to shared memory, the opposite of ldmatrix. Lanes 8i..8i+7 give the
// addresses of the eight 16-byte rows of matrix i; lane 4g + t has of each matrix the 4 bytes at offset 4t of row g.
#pragma once

#include <cstdint>

namespace sage::ptx {

__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// The same of transposed matrices: lane 4g + t has the units at offset 2g of rows 2t and 2t + 1.
__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                                       uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace sage::ptx
