// Launches the gradient kernels of one recipe, by head dimension and format of dO·Vᵀ.
#pragma once

#include "sm80/backward.h"
#include "sm80/backward_dkv.cuh"
#include "sm80/backward_dq.cuh"

namespace sage::sm80 {

template <class Recipe, int kHeadDim>
const char* launch_gradients(const BackwardCall& p, Stream stream) {
  const char* error = nullptr;
  if (p.exact_delta) error = launch_delta<DqConfig<Recipe, kHeadDim>>(p, stream);
  if (error == nullptr) error = launch_dkv<DkvConfig<Recipe, kHeadDim>>(p, stream);
  if (error == nullptr) error = launch_dq<DqConfig<Recipe, kHeadDim>>(p, stream);
  return error;
}

template <class Recipe>
const char* launch_gradients(const BackwardCall& p, Stream stream) {
  switch (p.shape.padded_dim) {
    case 64: return launch_gradients<Recipe, 64>(p, stream);
    case 128: return launch_gradients<Recipe, 128>(p, stream);
    case 256: return launch_gradients<Recipe, 256>(p, stream);
  }
  return "the padded head dimension must be 64, 128 or 256; pad with zero channels.";
}

template <class Products>
const char* launch_train8(const BackwardCall& p, Stream stream) {
  return p.dp == DpFormat::kInt8 ? launch_gradients<Train8<DpInt8, Products>>(p, stream)
                                 : launch_gradients<Train8<DpBf16, Products>>(p, stream);
}

}  // namespace sage::sm80
