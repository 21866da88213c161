// Stands for sm120/attention_fwd_fp4_emulated.cu in builds for sm_120a alone.
#include "sm120/attend_fp4.h"

namespace sage::sm120 {

const char* attend_fp4_emulated(const AttendFp4Params&, Stream) { return no_kernel(); }

}  // namespace sage::sm120
