// The forward kernels with native e4m3 products, for sm_89 and later.
#include "sm89/values.cuh"

#include "common/dispatch.h"
#include "sm80/attention_fwd.cuh"

namespace sage {
namespace {

template <class Values, int kHeadDim>
constexpr ForwardKernel entry() {
  return {89, Values::kFormat, Values::kF16Accumulate, kHeadDim,
          &sm80::launch_attention_fwd<sm80::ForwardConfig<Values, kHeadDim>>};
}

constexpr ForwardKernel kKernels[] = {
    entry<sm89::E4m3, 64>(),
    entry<sm89::E4m3, 128>(),
    entry<sm89::E4m3, 256>(),
    entry<sm89::E4m3F16Accumulate, 64>(),
    entry<sm89::E4m3F16Accumulate, 128>(),
    entry<sm89::E4m3F16Accumulate, 256>(),
};

}  // namespace

ForwardTable sm89_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
