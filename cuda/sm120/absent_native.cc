// Stands for sm120/attention_fwd_fp4.cu in builds without sm_120a.
#include "sm120/attend_fp4.h"

namespace sage::sm120 {

const char* attend_fp4_native(const AttendFp4Params&, Stream) { return no_kernel(); }

}  // namespace sage::sm120
