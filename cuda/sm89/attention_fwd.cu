// The forward kernels with native e4m3 products, for sm_89 and later.
#include "sm89/values.cuh"

#include "common/dispatch.h"
#include "sm80/attention_fwd.cuh"

namespace sage {
namespace {

constexpr ForwardKernel kKernels[] = {
    sm80::forward_kernel<sm89::E4m3, 64>(89),
    sm80::forward_kernel<sm89::E4m3, 128>(89),
    sm80::forward_kernel<sm89::E4m3, 256>(89),
    sm80::forward_kernel<sm89::E4m3F16Accumulate, 64>(89),
    sm80::forward_kernel<sm89::E4m3F16Accumulate, 128>(89),
    sm80::forward_kernel<sm89::E4m3F16Accumulate, 256>(89),
};

}  // namespace

ForwardTable sm89_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
