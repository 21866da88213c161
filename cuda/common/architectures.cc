#include "common/architectures.h"

#include <cuda_runtime.h>

#include <cstring>

namespace sage {

std::string explain_launch_error(const char* error) {
  if (std::strcmp(error, cudaGetErrorString(cudaErrorNoKernelImageForDevice)) != 0) return error;
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string name = std::to_string(major) + std::to_string(minor);
  return "this GPU is of architecture " + name + ", but this build of sage_jax has kernels for " +
         SAGE_JAX_BUILT_ARCHS +
         " only; rebuild with SAGE_JAX_CUDA_ARCHS=" + name +
         " (80 and later are supported), or use implementation='reference'.";
}

}  // namespace sage
