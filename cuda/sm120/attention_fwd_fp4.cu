// The forward operation of FP4 recipes: mask summaries, then the one kernel.
#include "sm120/attention_fwd_fp4.cuh"

namespace sage {

const char* attend_fp4(const AttendFp4Params& params, Stream stream) {
  const char* error = summarize_masks(params.shape, params.masks, params.workspace, stream);
  if (error != nullptr) return error;
  switch (params.shape.padded_dim) {
    case 64:
      return sm120::launch_attention_fwd_fp4<64>(params, stream);
    case 128:
      return sm120::launch_attention_fwd_fp4<128>(params, stream);
    case 256:
      return sm120::launch_attention_fwd_fp4<256>(params, stream);
    default:
      return "the padded head dimension must be 64, 128 or 256";
  }
}

}  // namespace sage
