// Stands for sm80/attention_fwd_e4m3.cu in builds without sm_80 and sm_86.
#include "common/dispatch.h"

namespace sage {

ForwardTable sm80_e4m3_forward_kernels() { return {nullptr, 0}; }

}  // namespace sage
