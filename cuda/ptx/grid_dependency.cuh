// Kernels that follow each other closely (programmatic dependent launch, sm_90 and later): blocks of a kernel that
// common/launch.h starts early come while the one before it in the stream still works, wherever that leaves room, and
// wait inside.
//
//   after_previous_grid();     // in every thread, before the kernel reads or writes memory
//
// An early kernel without the call would read what is not yet written, and so would the kernel after it, which waits for
// this one alone; tools/census.py looks for it. In a kernel that starts late the call lets the next one start early.
#pragma once

namespace sage::ptx {

__device__ __forceinline__ void after_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace sage::ptx
