// The forward kernels with f16, bf16 and INT8 values, which run on sm_80 and later.
#include "common/dispatch.h"
#include "sm80/attention_fwd.cuh"
#include "sm80/values.cuh"

namespace sage {
namespace {

constexpr ForwardKernel kKernels[] = {
    sm80::forward_kernel<sm80::F16, 64>(80),
    sm80::forward_kernel<sm80::F16, 128>(80),
    sm80::forward_kernel<sm80::F16, 256>(80),
    sm80::forward_kernel<sm80::Bf16, 64>(80),
    sm80::forward_kernel<sm80::Bf16, 128>(80),
    sm80::forward_kernel<sm80::Bf16, 256>(80),
    sm80::forward_kernel<sm80::Int8, 64>(80),
    sm80::forward_kernel<sm80::Int8, 128>(80),
    sm80::forward_kernel<sm80::Int8, 256>(80),
};

}  // namespace

ForwardTable sm80_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
