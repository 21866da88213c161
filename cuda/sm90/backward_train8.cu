// train8 gradients on sm_90a by warpgroup-level products, where they fit; else by warp-level ones.
#include "sm90/backward_dkv.cuh"
#include "sm90/backward_dq.cuh"

#include "sm80/backward.h"

namespace sage {
namespace {

template <int kHeadDim>
const char* gradients(const BackwardCall& p, Stream stream) {
  const char* error = p.exact_delta ? train8_delta_sm90(p, stream) : nullptr;
  if (error == nullptr) error = sm90::launch_dkv<sm90::DkvConfig<kHeadDim>>(p, stream);
  if (error == nullptr) error = sm90::launch_dq<sm90::DqConfig<kHeadDim>>(p, stream);
  return error;
}

}  // namespace

const char* train8_gradients_sm90(const BackwardCall& p, Stream stream) {
  const bool empty = p.shape.batch == 0 || p.shape.heads == 0 || p.shape.queries == 0 ||
                     p.shape.keys == 0;  // tensor maps have no empty axes
  if (p.portable || empty || p.dp != DpFormat::kInt8 || p.shape.padded_dim > 128) {
    return train8_gradients_sm90_mma(p, stream);
  }
  return p.shape.padded_dim == 64 ? gradients<64>(p, stream) : gradients<128>(p, stream);
}

}  // namespace sage
