// The forward kernels of wgmma for sm_90a: head dimensions that fit its registers.
#include "sm90/attention_fwd.cuh"

namespace sage {
namespace {

template <class Values, int kHeadDim>
const char* launch_forward(const AttendParams& params, Stream stream) {
  constexpr bool kMayInterpolate = Values::kFormat == PvFormat::kE4m3;
  return kMayInterpolate && params.q != nullptr
             ? sm90::launch_attention_fwd<sm90::ForwardConfig<Values, kHeadDim, kMayInterpolate>>(params, stream)
             : sm90::launch_attention_fwd<sm90::ForwardConfig<Values, kHeadDim>>(params, stream);
}

template <class Values, int kHeadDim>
constexpr ForwardKernel entry() {
  return {90, Values::kFormat, false, kHeadDim, &launch_forward<Values, kHeadDim>, true};
}

constexpr ForwardKernel kKernels[] = {
    entry<sm90::E4m3Values, 64>(),
    entry<sm90::E4m3Values, 128>(),
    entry<sm90::HalfValues<PvFormat::kF16>, 64>(),
    entry<sm90::HalfValues<PvFormat::kF16>, 128>(),
    entry<sm90::HalfValues<PvFormat::kBf16>, 64>(),
    entry<sm90::HalfValues<PvFormat::kBf16>, 128>(),
};

}  // namespace

ForwardTable sm90_forward_kernels() {
  return {kKernels, static_cast<int>(sizeof kKernels / sizeof kKernels[0])};
}

}  // namespace sage
