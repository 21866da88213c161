// Stands for sm90/attention_fwd_mma.cu in builds without sm_90.
#include "common/dispatch.h"

namespace sage {

ForwardTable sm90_mma_forward_kernels() { return {nullptr, 0}; }

}  // namespace sage
