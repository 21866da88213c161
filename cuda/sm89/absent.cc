// Stands for sm89/attention_fwd.cu in builds without any architecture from sm_89 on.
#include "common/dispatch.h"

namespace sage {

ForwardTable sm89_forward_kernels() { return {nullptr, 0}; }

}  // namespace sage
