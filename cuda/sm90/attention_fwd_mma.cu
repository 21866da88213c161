// The forward kernels with e4m3 products for sm_90 whose products are warp-level.
#include "common/dispatch.h"
#include "sm80/attention_fwd.cuh"
#include "sm90/values.cuh"

namespace sage {
namespace {

constexpr ForwardKernel kKernels[] = {
    sm80::forward_kernel<sm90::E4m3, 64>(90),
    sm80::forward_kernel<sm90::E4m3, 128>(90),
    sm80::forward_kernel<sm90::E4m3, 256>(90),
    sm80::forward_kernel<sm90::E4m3F16Accumulate, 64>(90),
    sm80::forward_kernel<sm90::E4m3F16Accumulate, 128>(90),
    sm80::forward_kernel<sm90::E4m3F16Accumulate, 256>(90),
};

}  // namespace

ForwardTable sm90_mma_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
