// For the block-scaled FP4 products of sm_120a: three warps a scheduler.
#include "sm120/attend_fp4.h"
#include "sm120/attention_fwd_fp4.cuh"

namespace sage::sm120 {

const char* attend_fp4_native(const AttendFp4Params& params, Stream stream) {
  return attend_with<12>(params, stream);
}

}  // namespace sage::sm120
