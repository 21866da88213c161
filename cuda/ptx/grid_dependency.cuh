// Kernels that follow each other closely (programmatic dependent launch, sm_90 and later): a kernel's blocks come while
// the one before it in the stream still works, wherever that leaves room, and wait inside.
//
//   after_previous_grid();     // first, in every thread of every kernel; before it no kernel reads or writes memory
//
// common/launch.h launches all kernels that way. A kernel without the call would read what is not yet written, and so
// would the kernel after it, which waits for this one alone.
#pragma once

namespace sage::ptx {

__device__ __forceinline__ void after_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace sage::ptx
