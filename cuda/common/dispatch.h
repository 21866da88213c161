// Tables of built kernels, and the choice among them when the device is known: at run time.
#pragma once

#include <cuda_runtime.h>

#include "common/params.h"

namespace sage {

struct ForwardKernel {
  int architecture;  // oldest that runs it: 80 for sm_80
  PvFormat pv;
  bool f16_accumulate;
  int padded_dim;
  const char* (*launch)(const AttendParams&, Stream);
};

struct ForwardTable {
  const ForwardKernel* kernels;
  int count;
};

ForwardTable sm80_forward_kernels();
ForwardTable sm80_e4m3_forward_kernels();
ForwardTable sm89_forward_kernels();
ForwardTable sm90_mma_forward_kernels();  // warp-level products
ForwardTable sm90_forward_kernels();      // warpgroup-level products

// The current device's architecture, 80 for compute capability 8.0; 0 where there is no device.
inline int device_architecture() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

}  // namespace sage
