// Tensor maps: what the copy engine knows of a tensor in global memory. Encoded on the host and
// passed to kernels by value; the driver's encoder is found at run time, so nothing links to it.
#pragma once

#include <cuda.h>  // types only
#include <cuda_runtime.h>

#include <cstdint>

namespace sage {

// A dense tensor of `elements` bytes wide entries, [planes][rows][columns], taken in boxes of
// box_rows × box_columns that are swizzled to rows of `box_columns · element_bytes` (32, 64 or 128)
// bytes. Rows of the tensor are a multiple of 16 bytes.
struct TensorMapSpec {
  const void* data;
  int element_bytes;  // 1 or 2
  int64_t columns, rows, planes;
  int box_columns, box_rows;
  bool half_floats = false;  // entries are f16: the copy engine adds them up
  bool narrow = false;       // a miss brings 128 bytes to the L2 cache, not 256
};

// Fills `map`; null, or one sentence on what went wrong.
inline const char* encode_tensor_map(CUtensorMap& map, const TensorMapSpec& t) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                     &found);
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) {
    return "the driver has no tensor maps (CUDA 12.0 or later is needed); update the driver";
  }
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(t.columns), static_cast<cuuint64_t>(t.rows),
                               static_cast<cuuint64_t>(t.planes)};
  const cuuint64_t row_bytes = sizes[0] * t.element_bytes;
  const cuuint64_t strides[2] = {row_bytes, row_bytes * sizes[1]};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(t.box_columns),
                             static_cast<cuuint32_t>(t.box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto type = t.half_floats          ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                    : t.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16  // bits are bits
                                           : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const int box_bytes = t.box_columns * t.element_bytes;
  const auto swizzle = box_bytes == 32   ? CU_TENSOR_MAP_SWIZZLE_32B
                       : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                         : CU_TENSOR_MAP_SWIZZLE_128B;
  const CUresult status =
      encode(&map, type, 3, const_cast<void*>(t.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             t.narrow ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr
                                : "a tensor map was refused: an operand is not 16-byte aligned or "
                                  "too large for the copy engine; split the batch";
}

}  // namespace sage
