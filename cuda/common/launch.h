// The one way in which kernels are launched: on the caller's stream, with the dynamic shared memory
// the kernel asks for, every error reported as text instead of being left for the next call.
#pragma once

#include <cuda_runtime.h>

#include "common/params.h"

namespace sage {

inline constexpr size_t kDefaultSharedBytes = 48 * 1024;  // more needs the kernel's consent

// The current device's architecture, 80 for compute capability 8.0; 0 where there is no device.
inline int device_architecture() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

// When a kernel's blocks may come: once the previous kernel has ended, or as soon as it leaves room for them
// (ptx/grid_dependency.cuh). Early ones gather where there happens to be room, so kernels whose blocks share the work
// out in equal parts, several to a multiprocessor, start late.
enum class Start { kLate, kEarly };

template <class Params>
const char* launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes,
                   Stream stream, const Params& params, Start start = Start::kLate) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;  // empty arrays: nothing to do
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes) {
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
  }
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    // Kernels are compiled to machine code alone: what runs on sm_90 or later was compiled for it, and waits.
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = start == Start::kEarly && device_architecture() >= 90 ? 1 : 0;
    status = cudaLaunchKernelEx(&config, kernel, params);
  }
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // the error is ours and reported: do not leave it for somebody else's check
  return cudaGetErrorString(status);
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Whether its copy engine knows tensors: compute capability 9.0 and later.
inline bool has_bulk_copies() { return device_architecture() >= 90; }

// The number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace sage
