// The forward operation: mask summaries, then the newest kernel that the device can run.
#include <cstdio>
#include <cstring>

#include "common/decode.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/mask.cuh"

namespace sage {
namespace {

const char* const kPvNames[] = {"e4m3", "f16", "bf16", "int8"};

// The fitting kernel made for the newest architecture below `limit`; of two, that of the later table.
const ForwardKernel* find(const AttendParams& p, int limit) {
  const ForwardKernel* best = nullptr;
  for (const ForwardTable& table :
       {sm80_forward_kernels(), sm80_e4m3_forward_kernels(), sm89_forward_kernels(),
        sm90_mma_forward_kernels(), p.portable ? ForwardTable{nullptr, 0} : sm90_forward_kernels()}) {
    for (int i = 0; i < table.count; ++i) {
      const ForwardKernel& k = table.kernels[i];
      const bool fits = k.pv == p.pv && k.f16_accumulate == p.f16_accumulate &&
                        k.padded_dim == p.shape.padded_dim && k.architecture < limit;
      if (fits && (best == nullptr || k.architecture >= best->architecture)) best = &k;
    }
  }
  return best;
}

}  // namespace

const char* attend(const AttendParams& params, Stream stream) {
  const char* const missing = cudaGetErrorString(cudaErrorNoKernelImageForDevice);
  const ForwardKernel* kernel = find(params, INT32_MAX);
  if (kernel == nullptr) {
    static thread_local char message[256];
    snprintf(message, sizeof message,
             "no forward kernel for pv=%s%s and padded head dimension %d: head dimensions pad to "
             "64, 128 or 256, and f16 accumulators go with e4m3 only",
             kPvNames[static_cast<int>(params.pv)], params.f16_accumulate ? " (f16 sums)" : "",
             params.shape.padded_dim);
    return message;
  }
  const DecodePlan plan =
      decode_plan(params.shape, params.masks, params.pv, params.f16_accumulate);
  if (plan.splits > 1 && !params.portable) return attend_split(params, plan, stream);
  kernel = find(params, device_architecture() + 1);
  if (kernel == nullptr) return missing;  // the caller explains which architectures there are
  const char* error = summarize_masks(params.shape, params.masks, params.workspace, stream);
  if (error != nullptr) return error;
  error = kernel->launch(params, stream);
  // A build without this architecture's own kernels may still hold older ones that run here.
  while (error != nullptr && strcmp(error, missing) == 0) {
    kernel = find(params, kernel->architecture);
    if (kernel == nullptr) break;
    error = kernel->launch(params, stream);
  }
  return error;
}

size_t attend_workspace_bytes(const AttendParams& p) {
  return mask_workspace_bytes(p.shape, p.masks) +
         decode_plan(p.shape, p.masks, p.pv, p.f16_accumulate).bytes;
}

}  // namespace sage
