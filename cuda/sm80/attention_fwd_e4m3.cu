// The forward kernels with e4m3 values for GPUs without e4m3 products or conversions: the numbers pass through f16.
#include "common/dispatch.h"
#include "sm80/attention_fwd.cuh"
#include "sm80/values.cuh"

namespace sage {
namespace {

constexpr ForwardKernel kKernels[] = {
    sm80::forward_kernel<sm80::E4m3, 64>(80),
    sm80::forward_kernel<sm80::E4m3, 128>(80),
    sm80::forward_kernel<sm80::E4m3, 256>(80),
    sm80::forward_kernel<sm80::E4m3F16Accumulate, 64>(80),
    sm80::forward_kernel<sm80::E4m3F16Accumulate, 128>(80),
    sm80::forward_kernel<sm80::E4m3F16Accumulate, 256>(80),
};

}  // namespace

ForwardTable sm80_e4m3_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
