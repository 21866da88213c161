// cp.async: copies from global to shared memory that complete in groups, oldest first.
#pragma once

#include <cstdint>

namespace sage::ptx {

// Copies 16 bytes, or writes 16 zero bytes where `valid` is false (the source is not read then).
// Both addresses are multiples of 16. Bypasses L1: tiles are used once per block.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// The same for kBytes, 4 or 8 or 16, and addresses that are multiples of them; through L1.
template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(shared), "l"(__cvta_generic_to_global(global)), "n"(kBytes),
                 "r"(valid ? kBytes : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives at the barrier (ptx/mbarrier.cuh) when all copies that this thread has started have landed.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace sage::ptx
