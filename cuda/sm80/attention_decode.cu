// A few queries against many keys. Here e4m3 values widen to f16 by their bits, on every architecture.
#include "sm80/attention_decode.cuh"

#include "sm80/values.cuh"

namespace sage {
namespace {

template <class Values>
const char* by_dimension(const AttendParams& p, const DecodePlan& plan, Stream stream) {
  return p.shape.padded_dim == 64 ? sm80::launch_split<sm80::DecodeConfig<Values, 64>>(p, plan, stream)
                                  : sm80::launch_split<sm80::DecodeConfig<Values, 128>>(p, plan, stream);
}

}  // namespace

const char* attend_split(const AttendParams& p, const DecodePlan& plan, Stream stream) {
  switch (p.pv) {
    case PvFormat::kE4m3:
      if (has_sm90_decode()) return attend_split_sm90(p, plan, stream);
      return by_dimension<sm80::E4m3>(p, plan, stream);
    case PvFormat::kF16:
      return by_dimension<sm80::F16>(p, plan, stream);
    default:
      return by_dimension<sm80::Bf16>(p, plan, stream);
  }
}

}  // namespace sage
