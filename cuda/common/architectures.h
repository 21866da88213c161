// Which GPUs this build has kernels for, said in words when a launch finds none.
#pragma once

#include <string>

namespace sage {

// `error` as a launch reported it; a missing kernel becomes a sentence that names the GPU's
// architecture, the built ones and the way out.
[[gnu::visibility("default")]] std::string explain_launch_error(const char* error);

}  // namespace sage
