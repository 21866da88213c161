// The FP4 forward kernel's two builds, between which cuda/attend_fp4.cu chooses.
#pragma once

#include <cuda_runtime.h>

#include "common/params_fp4.h"

namespace sage::sm120 {

const char* attend_fp4_native(const AttendFp4Params& params, Stream stream);    // FP4 products
const char* attend_fp4_emulated(const AttendFp4Params& params, Stream stream);  // f16 products

// What CUDA says of kernels that the build does not hold.
inline const char* no_kernel() { return cudaGetErrorString(cudaErrorNoKernelImageForDevice); }

}  // namespace sage::sm120
