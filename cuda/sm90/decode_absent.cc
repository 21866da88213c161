// Stands for sm90/attention_decode.cu in builds without sm_90a.
#include "common/decode.h"

namespace sage {

bool has_sm90_decode() { return false; }

const char* attend_split_sm90(const AttendParams&, const DecodePlan&, Stream) {
  return "this build has no kernels for sm_90a";
}

}  // namespace sage
