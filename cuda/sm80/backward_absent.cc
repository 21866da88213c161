// Stands for sm80/backward_train8.cu in builds without sm_80 and sm_86.
#include <cuda_runtime.h>

#include "sm80/backward.h"

namespace sage {

const char* train8_gradients_sm80(const BackwardCall&, Stream) {
  return cudaGetErrorString(cudaErrorNoKernelImageForDevice);
}

}  // namespace sage
