// For everything else: emulated products need registers of their own, so there are fewer warps.
#include "sm120/attend_fp4.h"
#include "sm120/attention_fwd_fp4.cuh"

namespace sage::sm120 {

const char* attend_fp4_emulated(const AttendFp4Params& params, Stream stream) {
  return attend_with<8>(params, stream);
}

}  // namespace sage::sm120
