// Stands for sm90/attention_fwd.cu in builds without sm_90a.
#include "common/dispatch.h"

namespace sage {

ForwardTable sm90_forward_kernels() { return {nullptr, 0}; }

}  // namespace sage
