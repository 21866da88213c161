// The forward operation of FP4 recipes: mask summaries, then the one kernel, on FP4 products where the device
// has them.
#include <cstring>

#include "common/dispatch.h"
#include "common/mask.cuh"
#include "sm120/attend_fp4.h"

namespace sage {

const char* attend_fp4(const AttendFp4Params& params, Stream stream) {
  const char* error = summarize_masks(params.shape, params.masks, params.workspace, stream);
  if (error != nullptr) return error;
  if (device_architecture() / 10 == 12) {
    error = sm120::attend_fp4_native(params, stream);
    if (error == nullptr || strcmp(error, sm120::no_kernel()) != 0) return error;
  }
  return sm120::attend_fp4_emulated(params, stream);
}

}  // namespace sage
