// Plain parameter structs between the FFI handlers and the kernels, and the table of kernels.
//
// Letters, layouts and numbers are those of docs/abi.md. Pointers to optional operands are null
// when absent.
#pragma once

#include <cstdint>

namespace sage {

class Pool;

enum class DType : int32_t { f32, f16, bf16 };
enum class Pv : int32_t { e4m3, f16, bf16, int8 };
enum class Dp : int32_t { none, int8, bf16 };
enum class Backward : int32_t { train8, sagebwd };

constexpr int64_t kTile = 64;                // keys of a scale tile, and rows of a tile of scores
constexpr int64_t kOpen = int64_t{1} << 30;  // a window edge that excludes nothing

struct Array {  // a tensor of one of three float types
  const void* data;
  DType dtype;
};
struct Result {
  void* data;
  DType dtype;
};

struct Shape {
  int64_t B, T, S, N, K, H, Hp;
  int64_t G() const { return N / K; }
  int64_t S64() const { return (S + kTile - 1) / kTile; }
  int64_t Sp() const { return S64() * kTile; }
  int64_t T128() const { return (T + 127) / 128; }
};

struct Broadcast4 {  // element strides over [B, N, T, S]; 0 along a broadcast axis
  int64_t b, n, t, s;
};

struct Masks {
  const int32_t* bounds;  // [B, 3]: valid queries, valid keys, diagonal offset
  const int32_t* q_seg;   // [B, T] or null
  const int32_t* kv_seg;  // [B, S] or null
  const bool* mask;       // or null
  Broadcast4 mask_strides;
  int64_t mask_tile;  // queries and keys that an entry of it stands for: 1, or kTile
  const float* bias;  // or null
  Broadcast4 bias_strides;
  int64_t window_left, window_right;
};

struct QuantizeKv {
  Shape shape;  // T and N unused
  Array k, v;
  const int32_t* bounds;
  Pv pv;
  float v_range;
  bool smooth_k, smooth_v;
  Dp dp;
  int8_t* k8;
  float* k_scale;
  float* k_mean;
  void* v_pv;
  float* v_scale;
  float* v_mean;
  void* v_dp;
  float* v_dp_scale;
  float *k_max, *v_norm;
};

struct QuantizeQ {
  Shape shape;  // S unused
  Array q;
  const float* k_mean;
  const int32_t* bounds;
  int64_t q_block;
  float scale;
  int8_t* q8;
  float* q_scale;
  float* lse_shift;
};

struct Attend {
  Shape shape;
  const int8_t* q8;
  const float *q_scale, *lse_shift;
  const int8_t* k8;
  const float* k_scale;
  const void* v_pv;
  const float *v_scale, *v_mean;
  Masks masks;
  Pv pv;
  bool f16_accumulate;
  float scale;
  Result out;
  float *lse, *m, *l;
};

// Operands of FP4 recipes (docs/nvfp4.md). A Blocks is an array of e2m1 codes, two a byte, with an
// e4m3 scale for each 16 of them.
struct Blocks {
  const uint8_t *codes, *scale;
};
struct WritableBlocks {
  uint8_t *codes, *scale;
};
constexpr int64_t kFp4Block = 16;
constexpr int64_t kFp4Queries = 128;  // that share a mean and a tensor scale

struct QuantizeKvFp4 {
  Shape shape;  // T and N unused
  Array k, v;
  const int32_t* bounds;
  bool four_or_six, smooth_k, smooth_v;
  WritableBlocks k4, v4;
  float *k_tensor, *k_mean, *v_tensor, *v_mean;
};

struct QuantizeQFp4 {
  Shape shape;
  Array q, k;
  const float *k_mean, *k_tensor;
  const int32_t* bounds;
  bool four_or_six, smooth_q;
  float scale;
  WritableBlocks q4;
  float *q_tensor, *delta, *lse_shift;
};

struct AttendFp4 {
  Shape shape;
  Blocks q4, k4, v4;
  const float *q_tensor, *delta, *lse_shift, *k_tensor, *v_tensor, *v_mean;
  Masks masks;
  float scale;
  Result out;
  float* lse;
};

struct AttendBackward {
  Shape shape;
  const int8_t* q8;
  const float* q_scale;
  const int8_t* k8;
  const float *k_scale, *k_mean;
  const void* v_dp;
  const float *v_dp_scale, *k_max, *v_norm, *v_mean, *m, *l;
  Array out, dout;
  const float* dlse;
  Masks masks;
  Backward backward;
  Dp dp;
  bool exact_delta;
  float scale;
  Result dq, dk, dv;
  float* dlogits;  // or null
};

struct Kernels {  // one instruction set's
  const char* isa;
  void (*quantize_kv)(const QuantizeKv&, Pool&);
  void (*quantize_q)(const QuantizeQ&, Pool&);
  void (*attend)(const Attend&, Pool&);
  void (*attend_backward)(const AttendBackward&, Pool&);
  void (*quantize_kv_fp4)(const QuantizeKvFp4&, Pool&);
  void (*quantize_q_fp4)(const QuantizeQFp4&, Pool&);
  void (*attend_fp4)(const AttendFp4&, Pool&);
};

}  // namespace sage
