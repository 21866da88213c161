// Operands of the operations as plain structs (docs/abi.md): what a handler fills in and a
// kernel reads. No FFI type and no CUDA type appears here, so every file of the project may include
// it. All pointers are device pointers to dense row-major arrays; letters as in docs/abi.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sage {

using Stream = void*;  // cudaStream_t

enum class Dtype : int { kBf16 = 0, kF16 = 1, kF32 = 2 };
enum class PvFormat : int { kE4m3 = 0, kF16 = 1, kBf16 = 2, kInt8 = 3 };
enum class DpFormat : int { kNone = 0, kInt8 = 1, kBf16 = 2 };
enum class Backward : int { kTrain8 = 0, kSageBwd = 1 };

inline constexpr int kTileKeys = 64;  // keys that share an INT8 scale

struct AttentionShape {
  int batch;       // B
  int queries;     // T
  int keys;        // S
  int heads;       // N
  int kv_heads;    // K, divides N
  int head_dim;    // H
  int padded_dim;  // Hp: 64, 128 or 256
};

// Who sees whom. `mask_strides` are in elements, 0 along axes of size 1.
struct MaskParams {
  const int32_t* bounds;    // [B, 3]: valid queries, valid keys, diagonal offset
  const int32_t* q_seg;     // [B, T], or null
  const int32_t* kv_seg;    // [B, S], or null
  const uint8_t* mask;      // [B|1, N|1, T|1, S|1], or null
  int64_t mask_strides[4];  // b, n, t, s
  int mask_sizes[4];        // the sizes of its axes
  int window_left;          // 2^30: open
  int window_right;
  int mask_tile;            // queries and keys that an entry of the mask stands for, which then has T64 and S64 of them: 1, or 64
};

struct QuantizeKvParams {
  AttentionShape shape;  // queries, heads: unused
  Dtype k_dtype, v_dtype;
  const void* k;          // [B, S, K, H]
  const void* v;          // [B, S, K, H]
  const int32_t* bounds;  // [B, 3]
  PvFormat pv;
  DpFormat dp;
  float v_range;
  bool smooth_k;
  bool smooth_v;
  int8_t* k8;         // [B, K, S, Hp]
  float* k_scale;     // [B, K, S64]
  float* k_mean;      // [B, K, Hp]
  void* v_pv;         // by pv
  float* v_scale;     // [B, K, Hp], or [B, K, S64] for kInt8
  float* v_mean;      // [B, K, Hp]
  void* v_dp;         // by dp
  float* v_dp_scale;  // [B, K, S64] for kInt8
  float* k_max;       // [B, K, Hp] unless dp is kNone
  float* v_norm;      // [B, K] unless dp is kNone
  void* workspace;    // quantize_kv_workspace_bytes(shape), 256-byte aligned
};

struct QuantizeQParams {
  AttentionShape shape;  // keys: unused
  Dtype q_dtype;
  const void* q;          // [B, T, N, H]
  const float* k_mean;    // [B, K, Hp], or null: lse_shift is 0 then
  const int32_t* bounds;  // [B, 3]
  int q_block;            // tokens that share a scale: 1, 64 or 128
  float scale;
  int8_t* q8;        // [B, N, T, Hp]
  float* q_scale;    // [B, N, T]
  float* lse_shift;  // [B, N, T]
};

struct AttendParams {
  AttentionShape shape;
  MaskParams masks;
  PvFormat pv;
  bool f16_accumulate;
  float scale;
  bool portable;  // take a warp-level kernel, to compare with
  const void* q;  // [B, T, N, H] with q_dtype: queries to be quantized here, for `out` alone; or null, and what follows is given
  Dtype q_dtype;
  const int8_t* q8;        // [B, N, T, Hp]
  const float* q_scale;    // [B, N, T]
  const float* lse_shift;  // [B, N, T]
  const int8_t* k8;        // [B, K, S, Hp]
  const float* k_scale;    // [B, K, S64]
  const void* v_pv;        // by pv
  const float* v_scale;    // [B, K, Hp], or [B, K, S64] for kInt8
  const float* v_mean;     // [B, K, Hp], read for kE4m3
  Dtype out_dtype;
  void* out;        // [B, T, N, H]
  float* lse;       // [B, N, T]; of no use, like m and l, where q is not null
  float* m;         // [B, N, T]
  float* l;         // [B, N, T]
  void* workspace;  // attend_workspace_bytes(params), 256-byte aligned
};

struct BackwardParams {
  AttentionShape shape;
  MaskParams masks;
  Backward backward;
  DpFormat dp;
  bool exact_delta;
  float scale;
  bool deterministic;  // sums have one order
  bool portable;       // take warp-level kernels, to compare with
  const int8_t* q8;         // [B, N, T, Hp]
  const float* q_scale;     // [B, N, T]
  const int8_t* k8;         // [B, K, S, Hp]
  const float* k_scale;     // [B, K, S64]
  const float* k_mean;      // [B, K, Hp]
  const void* v_dp;         // [B, K, S, Hp], s8 or bf16
  const float* v_dp_scale;  // [B, K, S64] for kInt8
  const float* k_max;       // [B, K, Hp]
  const float* v_norm;      // [B, K]
  const float* v_mean;      // [B, K, Hp]
  const float* m;           // [B, N, T]
  const float* l;           // [B, N, T]
  Dtype out_dtype;          // of out and dout
  const void* out;          // [B, T, N, H]
  const void* dout;         // [B, T, N, H]
  const float* dlse;        // [B, N, T]
  Dtype dq_dtype, dk_dtype, dv_dtype;
  void* dq;         // [B, T, N, H]
  void* dk;         // [B, S, K, H]
  void* dv;         // [B, S, K, H]
  void* workspace;  // backward_workspace_bytes(params), 256-byte aligned
};

#pragma GCC visibility push(default)  // what the kernel library exports

// Entry points. Each enqueues its kernels on `stream` and returns null, or one sentence that says
// what was given, what is supported and what to do. Workspace sizes depend on shapes alone.
const char* quantize_kv(const QuantizeKvParams& params, Stream stream);
size_t quantize_kv_workspace_bytes(const AttentionShape& shape);

const char* quantize_q(const QuantizeQParams& params, Stream stream);

const char* attend(const AttendParams& params, Stream stream);
size_t attend_workspace_bytes(const AttendParams& params);

const char* attend_backward(const BackwardParams& params, Stream stream);
size_t backward_workspace_bytes(const BackwardParams& params);

// Room for the tile summaries of segment ids and dense masks (common/mask.cuh), which forward and
// backward compute for themselves; 0 where a call has neither.
size_t mask_workspace_bytes(const AttentionShape& shape, const MaskParams& masks);

#pragma GCC visibility pop

}  // namespace sage
