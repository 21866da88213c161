// Host version of cuda/common/tensor_map.h: maps that nobody reads.
#pragma once

#include <cstdint>

struct alignas(8) CUtensorMap {
  unsigned char bytes[128];
};

namespace sage {

struct TensorMapSpec {
  const void* data;
  int element_bytes;
  int64_t columns, rows, planes;
  int box_columns, box_rows;
  bool half_floats = false, narrow = false;
};

inline const char* encode_tensor_map(CUtensorMap&, const TensorMapSpec&) { return nullptr; }

}  // namespace sage
