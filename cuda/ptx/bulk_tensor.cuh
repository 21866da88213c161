// Bulk tensor copies (sm_90 and later): boxes of a tensor in global memory, described by a tensor
// map, to shared memory, where parts of a box outside of the tensor become zero, and back, where they are left out.
#pragma once

#include <cstdint>

namespace sage::ptx {

#if __CUDA_ARCH__ >= 900
inline constexpr bool kHasBulkCopies = true;
#else
inline constexpr bool kHasBulkCopies = false;
#endif

// Copies the box at (x, y, z), innermost coordinate first. `barrier` counts the bytes.
__device__ __forceinline__ void cp_async_bulk_tensor_3d(uint32_t shared, const void* tensor_map,
                                                        uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(tensor_map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Copies from shared memory to the box at (x, y, z); parts outside of the tensor are not written. The thread's copies up to
// `commit` are a group; `wait_read` waits until the groups so far have been read, and shared memory is free again.
__device__ __forceinline__ void cp_async_bulk_tensor_3d_store(const void* tensor_map, uint32_t shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(tensor_map),
               "r"(shared), "r"(x), "r"(y), "r"(z)
               : "memory");
}
// Adds it to that box, if `counts`: by all lanes of a warp, of which one does so (elect_one), without a branch.
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_3d_if(const void* tensor_map, uint32_t shared, int x, int y, int z,
                                                                  bool counts) {
  asm volatile(
      "{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.ne.b32 q, %5, 0; and.pred p, p, q; "
      "@p cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1]; }" ::"l"(tensor_map),
      "r"(shared), "r"(x), "r"(y), "r"(z), "r"(static_cast<int>(counts))
      : "memory");
}
__device__ __forceinline__ void cp_async_bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void cp_async_bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until what all but the latest kGroups groups have written is in memory, and seen by this thread.
template <int kGroups>
__device__ __forceinline__ void cp_async_bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Copies `bytes` neighbouring bytes, a multiple of 16; both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_bulk(uint32_t shared, const void* global, uint32_t bytes,
                                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void prefetch_global_l1(const void* line) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(line) : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const void* tensor_map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(tensor_map) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and
// the matrix units.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace sage::ptx
