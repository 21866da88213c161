// The backward pass: summaries of masks, the pre-pass, then the gradient kernels of the device's
// architecture. Sums have one order, so results repeat bit for bit, but for dQ where sm_90 adds it up in memory.
#include <cuda_runtime.h>

#include <cstring>

#include "common/dispatch.h"
#include "common/mask.cuh"
#include "sm80/backward.h"
#include "sm80/backward_workspace.h"

namespace sage {

size_t backward_workspace_bytes(const BackwardParams& params) {
  return backward_workspace(params).bytes + mask_workspace_bytes(params.shape, params.masks);
}

const char* attend_backward(const BackwardParams& params, Stream stream) {
  const int architecture = device_architecture();
  BackwardCall p(params);
  if (architecture / 10 == 9) choose_way_sm90(p);
  const AttentionShape& s = p.shape;
  constexpr int kMostSplits = 4;  // blocks that share a tile and split its channels
  const int64_t blocks = static_cast<int64_t>(s.batch) * kMostSplits *
                         (static_cast<int64_t>(tiles_of(s.queries)) * s.heads +
                          static_cast<int64_t>(tiles_of(s.keys)) * s.kv_heads);
  if (blocks > INT32_MAX) {
    return "batch · heads · tokens needs more than 2^31 blocks; split the batch.";
  }
  const char* error = summarize_masks(s, p.masks, p.w.masks, stream);
  if (error == nullptr) error = prepare_backward(p, stream);
  if (error != nullptr) return error;
  if (p.backward == Backward::kSageBwd) return sagebwd_gradients_sm80(p, stream);
  if (architecture / 10 == 9) return train8_gradients_sm90(p, stream);
  error = architecture >= 89 ? train8_gradients_sm89(p, stream) : train8_gradients_sm80(p, stream);
  // A build without sm_89's own kernels may still hold sm_80's, which run there.
  const char* const missing = cudaGetErrorString(cudaErrorNoKernelImageForDevice);
  if (error != nullptr && architecture == 89 && std::strcmp(error, missing) == 0) {
    error = train8_gradients_sm80(p, stream);
  }
  return error;
}

}  // namespace sage
