// The forward kernels with e4m3 values for GPUs without e4m3 products or conversions: the numbers pass through f16.
#include "common/dispatch.h"
#include "sm80/attention_fwd.cuh"
#include "sm80/values.cuh"

namespace sage {
namespace {

template <class Values, int kHeadDim>
constexpr ForwardKernel entry() {
  return {80, Values::kFormat, Values::kF16Accumulate, kHeadDim,
          &sm80::launch_attention_fwd<sm80::ForwardConfig<Values, kHeadDim>>};
}

constexpr ForwardKernel kKernels[] = {
    entry<sm80::E4m3, 64>(),
    entry<sm80::E4m3, 128>(),
    entry<sm80::E4m3, 256>(),
    entry<sm80::E4m3F16Accumulate, 64>(),
    entry<sm80::E4m3F16Accumulate, 128>(),
    entry<sm80::E4m3F16Accumulate, 256>(),
};

}  // namespace

ForwardTable sm80_e4m3_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
