// Operands of the FP4 operations (docs/nvfp4.md), as common/params.h has those of the 8-bit ones. An array of
// e2m1 codes, two a byte, goes with an array of e4m3 scales, one for every 16 codes.
#pragma once

#include "common/params.h"
#include "numerics/host_device.h"

namespace sage {

inline constexpr int kFp4Queries = 128;  // that share a mean and a tensor scale

struct QuantizeKvFp4Params {
  AttentionShape shape;  // queries, heads: unused
  Dtype k_dtype, v_dtype;
  const void* k;          // [B, S, K, H]
  const void* v;          // [B, S, K, H]
  const int32_t* bounds;  // [B, 3]
  bool four_or_six;
  bool smooth_k;
  bool smooth_v;
  uint8_t* k4;       // [B, K, S, Hp/2]
  uint8_t* k_scale;  // [B, K, S, Hp/16]
  float* k_tensor;   // [B, K]
  float* k_mean;     // [B, K, Hp]
  uint8_t* v4;       // [B, K, Hp, Sp/2]
  uint8_t* v_scale;  // [B, K, Hp, Sp/16]
  float* v_tensor;   // [B, K]
  float* v_mean;     // [B, K, Hp]
  void* workspace;   // quantize_kv_fp4_workspace_bytes(shape), 256-byte aligned
};

struct QuantizeQFp4Params {
  AttentionShape shape;
  Dtype q_dtype, k_dtype;
  const void* q;          // [B, T, N, H]
  const void* k;          // [B, S, K, H]
  const float* k_mean;    // [B, K, Hp]
  const float* k_tensor;  // [B, K]
  const int32_t* bounds;  // [B, 3]
  bool four_or_six;
  bool smooth_q;
  float scale;
  uint8_t* q4;       // [B, N, T, Hp/2]
  uint8_t* q_scale;  // [B, N, T, Hp/16]
  float* q_tensor;   // [B, N, T128]
  float* delta;      // [B, N, T128, S]
  float* lse_shift;  // [B, N, T]
  void* workspace;   // quantize_q_fp4_workspace_bytes(shape), 256-byte aligned
};

struct AttendFp4Params {
  AttentionShape shape;
  MaskParams masks;
  float scale;
  const uint8_t* q4;        // [B, N, T, Hp/2]
  const uint8_t* q_scale;   // [B, N, T, Hp/16]
  const float* q_tensor;    // [B, N, T128]
  const float* delta;       // [B, N, T128, S]
  const float* lse_shift;   // [B, N, T]
  const uint8_t* k4;        // [B, K, S, Hp/2]
  const uint8_t* k_scale;   // [B, K, S, Hp/16]
  const float* k_tensor;    // [B, K]
  const uint8_t* v4;        // [B, K, Hp, Sp/2]
  const uint8_t* v_scale;   // [B, K, Hp, Sp/16]
  const float* v_tensor;    // [B, K]
  const float* v_mean;      // [B, K, Hp]
  Dtype out_dtype;
  void* out;        // [B, T, N, H]
  float* lse;       // [B, N, T]
  void* workspace;  // mask_workspace_bytes(shape, masks), 256-byte aligned
};

SAGE_HOST_DEVICE int64_t query_blocks(const AttentionShape& shape) {  // T128
  return (shape.queries + kFp4Queries - 1) / kFp4Queries;
}

#pragma GCC visibility push(default)  // what the kernel library exports

const char* quantize_kv_fp4(const QuantizeKvFp4Params& params, Stream stream);
size_t quantize_kv_fp4_workspace_bytes(const AttentionShape& shape);

const char* quantize_q_fp4(const QuantizeQFp4Params& params, Stream stream);
size_t quantize_q_fp4_workspace_bytes(const AttentionShape& shape);

const char* attend_fp4(const AttendFp4Params& params, Stream stream);

#pragma GCC visibility pop

}  // namespace sage
