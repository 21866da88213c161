// The forward kernels with e4m3 products for sm_90 whose products are warp-level.
#include "common/dispatch.h"
#include "sm80/attention_fwd.cuh"
#include "sm90/values.cuh"

namespace sage {
namespace {

template <class Values, int kHeadDim>
constexpr ForwardKernel entry() {
  return {90, Values::kFormat, Values::kF16Accumulate, kHeadDim,
          &sm80::launch_attention_fwd<sm80::ForwardConfig<Values, kHeadDim>>};
}

constexpr ForwardKernel kKernels[] = {
    entry<sm90::E4m3, 64>(),
    entry<sm90::E4m3, 128>(),
    entry<sm90::E4m3, 256>(),
    entry<sm90::E4m3F16Accumulate, 64>(),
    entry<sm90::E4m3F16Accumulate, 128>(),
    entry<sm90::E4m3F16Accumulate, 256>(),
};

}  // namespace

ForwardTable sm90_mma_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
