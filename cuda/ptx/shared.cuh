// The block's dynamic shared memory and its 32-bit addresses, which ldmatrix and cp.async take.
#pragma once

#include <cstdint>

namespace sage::ptx {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char sage_dynamic_shared[];
  return sage_dynamic_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace sage::ptx
