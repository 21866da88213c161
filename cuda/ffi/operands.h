// What the handlers of 8-bit and of FP4 operations share: masks, workspaces, bindings.
#pragma once

#include <algorithm>
#include <string>
#include <utility>

#include "check.h"
#include "common/architectures.h"

namespace sage {

using Arg = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;
using ffi::DataType;

inline ffi::Error finish(const char* operation, const char* error) {
  if (error == nullptr) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(operation) + ": " + explain_launch_error(error));
}

// Operands that attention and its gradient share.
struct MaskOperands {
  Arg bounds, q_seg, kv_seg, mask, bias;
  int64_t window_left, window_right;
  int32_t mask_tile;
};

inline MaskParams mask_params(Check& check, const MaskOperands& given, const AttentionShape& shape) {
  const bool segments = given.q_seg.element_count() > 0 && given.kv_seg.element_count() > 0;
  check.require(segments || (given.q_seg.element_count() == 0 && given.kv_seg.element_count() == 0) ||
                    shape.batch == 0 || shape.queries == 0 || shape.keys == 0,
                "q_seg and kv_seg must be given together");
  check.buffer("bounds", given.bounds, {shape.batch, 3}, {DataType::S32});
  if (segments) {
    check.buffer("q_seg", given.q_seg, {shape.batch, shape.queries}, {DataType::S32});
    check.buffer("kv_seg", given.kv_seg, {shape.batch, shape.keys}, {DataType::S32});
  }
  check.require(given.bias.element_count() == 0,
                "an additive bias is not supported by the CUDA kernels; use a boolean mask, or "
                "implementation='reference'");
  MaskParams masks = {};
  masks.bounds = data<const int32_t>(given.bounds);
  masks.q_seg = segments ? data<const int32_t>(given.q_seg) : nullptr;
  masks.kv_seg = segments ? data<const int32_t>(given.kv_seg) : nullptr;
  constexpr int64_t kOpen = int64_t{1} << 30;  // and its negative excludes everything
  masks.window_left = static_cast<int>(std::clamp(given.window_left, -kOpen, kOpen));
  masks.window_right = static_cast<int>(std::clamp(given.window_right, -kOpen, kOpen));
  masks.mask_tile = given.mask_tile;
  check.require(given.mask_tile == 1 || given.mask_tile == 64, "mask_tile must be 1 or 64");
  if (given.mask.element_count() == 0 || check.failed()) return masks;

  const int tile = given.mask_tile;
  const int full[4] = {shape.batch, shape.heads, (shape.queries + tile - 1) / tile, (shape.keys + tile - 1) / tile};
  masks.mask = data<const uint8_t>(given.mask);
  int64_t stride = 1;
  Shape wanted(4);
  for (int n = 3; n >= 0; --n) {
    const int size = axis(given.mask, n);
    masks.mask_sizes[n] = size;
    masks.mask_strides[n] = size == 1 ? 0 : stride;
    stride *= size;
    wanted[n] = size == 1 ? 1 : full[n];
  }
  check.buffer("mask", given.mask, wanted, {DataType::PRED});
  return masks;
}

inline void check_workspace(Check& check, Out workspace, size_t bytes) {
  check.require(workspace->size_bytes() >= bytes,
                "workspace has " + std::to_string(workspace->size_bytes()) + " bytes, but " +
                    std::to_string(bytes) + " are needed; size it by sage_jax._workspace, or export the program again");
}

// Bindings: the stream, then so many operands and so many results, then the attributes. A binding can
// neither be copied nor moved, hence the recursion that ends in a temporary.
template <int kCount, class Binding>
auto operands(Binding&& binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Arg<Arg>();
  } else {
    return operands<kCount - 1>(std::move(binding).template Arg<Arg>());
  }
}

template <int kCount, class Binding>
auto results(Binding&& binding) {
  if constexpr (kCount == 1) {
    return std::move(binding).template Ret<Arg>();
  } else {
    return results<kCount - 1>(std::move(binding).template Ret<Arg>());
  }
}

template <int kOperands, int kResults>
auto bind() {
  return results<kResults>(
      operands<kOperands>(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>()));
}

}  // namespace sage
