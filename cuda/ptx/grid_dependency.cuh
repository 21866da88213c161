// Kernels that follow each other closely (programmatic dependent launch, sm_90 and later): blocks of a kernel that
// common/launch.h starts early come while the one before it in the stream still works, wherever that leaves room, and
// wait inside.
//
//   griddepcontrol_launch_dependents();   // the next kernel may start
//   griddepcontrol_wait();                // in every thread, before the kernel reads or writes what the one before writes
//
// An early kernel without the wait would read what is not yet written, and so would the kernel after it, which waits for
// this one alone; tools/census.py looks for it. A kernel that is told by counters what is written (ptx/counters.cuh) waits
// at its end, for the sake of the kernel after it. A kernel that starts late can let the next one start early.
#pragma once

namespace sage::ptx {

__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the grids before have ended and their writes are seen.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings a line to the L2 cache, where writes of all grids are seen: an early kernel may do so before its wait.
__device__ __forceinline__ void prefetch_global_l2(const void* line) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line) : "memory");
#endif
}

}  // namespace sage::ptx
