// The forward kernels with f16, bf16 and INT8 values, which run on sm_80 and later.
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
    entry<sm80::F16, 64>(),
    entry<sm80::F16, 128>(),
    entry<sm80::F16, 256>(),
    entry<sm80::Bf16, 64>(),
    entry<sm80::Bf16, 128>(),
    entry<sm80::Bf16, 256>(),
    entry<sm80::Int8, 64>(),
    entry<sm80::Int8, 128>(),
    entry<sm80::Int8, 256>(),
};

}  // namespace

ForwardTable sm80_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
