// What the gradient kernels need before their loops (docs/abi.md, section 4), in four launches:
//   clear_maxima      zeroes the maxima                                             (train8)
//   key_statistics    largest |V_j| of each head and largest |K̂| of each channel    (train8)
//   query_terms       per query: D = dO·O, r, 1/l, dO as INT8 codes or bf16; maxima of x and y
//   gradient_operands x, y, z: 8-bit and transposed, tokens permuted by `pi`
// Maxima are taken over the bits of non-negative floats, so their order cannot matter.
//
// Requirements: sm_80. Memory bound; nothing here depends on the values of other tokens but the
// maxima, so every block is independent.
#include <cmath>

#include "common/launch.h"
#include "common/scale.cuh"
#include "common/tile.cuh"
#include "numerics/bf16.h"
#include "numerics/e4m3.h"
#include "numerics/f16.h"
#include "numerics/int8.h"
#include "sm80/backward.h"
#include "sm80/backward_workspace.h"

namespace sage {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTile = 64;          // tokens of a block
constexpr int kMaxChannels = 256;  // of a head
constexpr int kLaneChannels = kMaxChannels / kWarpSize;
constexpr float kSmallestR = 0x1p-100f;  // below, 1/r could overflow: such rows carry no gradient

struct Place {  // of a block: a tile of 64 tokens of one head
  int tile, head, batch;
};

__device__ Place place(int tiles, int heads) {
  const unsigned rest = blockIdx.x / tiles;
  return {static_cast<int>(blockIdx.x % tiles), static_cast<int>(rest % heads),
          static_cast<int>(rest / heads)};
}

__device__ float load(const void* base, Dtype type, int64_t index) {
  switch (type) {
    case Dtype::kBf16: return bf16_value(static_cast<const uint16_t*>(base)[index]);
    case Dtype::kF16: return f16_value(static_cast<const uint16_t*>(base)[index]);
    default: return static_cast<const float*>(base)[index];
  }
}

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

__device__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// ‖x‖ of channels spread over the warp. Squares are taken relative to the largest entry, so that
// those of tiny values do not underflow; NaN if any entry is not finite.
__device__ float warp_norm(const float (&x)[kLaneChannels]) {
  float largest = 0.0f, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) largest = fmaxf(largest, fabsf(x[i]));
  largest = warp_max(largest);
  const float inverse = largest < 0x1p-110f ? 0.0f : 1.0f / largest;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) sum = fmaf(x[i] * inverse, x[i] * inverse, sum);
  return largest * sqrtf(warp_sum(sum));
}

__global__ void __launch_bounds__(kThreads) clear_maxima(const BackwardCall p) {
  const BackwardWorkspace& w = p.w;
  const int64_t heads = static_cast<int64_t>(p.shape.batch) * p.shape.kv_heads;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < 3 * heads * p.shape.padded_dim + heads) w.x_max[i] = 0;
}

__device__ float key_code(const BackwardCall& p, int64_t row, int channel) {
  const int8_t* codes = p.k8 + row * p.shape.padded_dim;
  return codes[0] == kBadCode ? 0.0f : static_cast<float>(codes[channel]);
}

__global__ void __launch_bounds__(kThreads) key_statistics(const BackwardCall p) {
  __shared__ uint32_t channel_max[kMaxChannels];
  const AttentionShape& s = p.shape;
  const int tiles = tiles_of(s.keys), dim = s.padded_dim;
  const Place at = place(tiles, s.kv_heads);
  const BackwardWorkspace& w = p.w;
  const int64_t head = static_cast<int64_t>(at.batch) * s.kv_heads + at.head;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const float k_scale = fabsf(p.k_scale[head * tiles + at.tile]);
  const float v_scale = p.dp == DpFormat::kInt8 ? p.v_dp_scale[head * tiles + at.tile] : 1.0f;
  for (int c = threadIdx.x; c < dim; c += kThreads) channel_max[c] = 0;
  __syncthreads();

  float k_max[kLaneChannels] = {};
  float norm_max = 0.0f;
  for (int j = at.tile * kTile + warp; j < min(s.keys, (at.tile + 1) * kTile); j += kWarps) {
    const int64_t row = head * s.keys + j;
    float v[kLaneChannels] = {};
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int c = lane + i * kWarpSize;
      if (c >= dim) break;
      v[i] = p.dp == DpFormat::kInt8
                 ? static_cast<const int8_t*>(p.v_dp)[row * dim + c] * v_scale
                 : bf16_value(static_cast<const uint16_t*>(p.v_dp)[row * dim + c]);
      k_max[i] = fmaxf(k_max[i], fabsf(key_code(p, row, c)));
    }
    norm_max = fmaxf(norm_max, warp_norm(v));
  }
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const int c = lane + i * kWarpSize;
    if (c < dim) atomicMax(&channel_max[c], float_bits(k_max[i] * k_scale));
  }
  if (lane == 0) atomicMax(&w.v_max[head], float_bits(norm_max));
  __syncthreads();
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    atomicMax(&w.z_max[head * dim + c], channel_max[c]);
  }
}

// The per-query part: QueryTerms, row_factor, dO's codes.
__global__ void __launch_bounds__(kThreads, 2) query_terms(const BackwardCall p) {
  __shared__ uint32_t channel_max[2][kMaxChannels];
  const AttentionShape& s = p.shape;
  const bool train8 = p.backward == Backward::kTrain8;
  const int tiles = tiles_of(s.queries), dim = s.padded_dim;
  const Place at = place(tiles, s.heads);
  const BackwardWorkspace& w = p.w;
  const int64_t head = static_cast<int64_t>(at.batch) * s.heads + at.head;
  const int64_t kv_head = static_cast<int64_t>(at.batch) * s.kv_heads +
                          at.head / (s.heads / s.kv_heads);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int c = threadIdx.x; c < 2 * kMaxChannels; c += kThreads) {
    channel_max[c / kMaxChannels][c % kMaxChannels] = 0;
  }
  __syncthreads();

  const float v_norm = train8 ? bits_float(w.v_max[kv_head]) : 0.0f;
  const float norm_factor = 2.0f / sqrtf(static_cast<float>(s.head_dim));
  float x_max[kLaneChannels] = {}, y_max[kLaneChannels] = {};
  for (int n = warp; n < kTile; n += kWarps) {
    const int query = at.tile * kTile + n;
    const int64_t padded_row = head * tiles * kTile + query;
    const int64_t row = head * s.queries + query;
    const bool inside = query < s.queries;
    const float l = inside ? p.l[row] : 0.0f;
    const bool live = l != 0.0f;  // a NaN is live: it must reach the gradients
    const float dlse = live ? p.dlse[row] : 0.0f;

    float d_out[kLaneChannels];
    float dot = 0.0f, largest = 0.0f;
    const int64_t token = ((static_cast<int64_t>(at.batch) * s.queries + query) * s.heads + at.head) *
                          s.head_dim;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int c = lane + i * kWarpSize;
      d_out[i] = 0.0f;
      if (live && c < s.head_dim) {
        d_out[i] = load(p.dout, p.out_dtype, token + c);
        dot = fmaf(d_out[i], load(p.out, p.out_dtype, token + c), dot);
        largest = fmaxf(largest, fabsf(d_out[i]));
      }
    }
    dot = warp_sum(dot);
    const float norm = warp_norm(d_out);
    largest = warp_max(largest);
    const float q_scale = inside ? p.q_scale[row] : 0.0f;
    const float delta = (p.exact_delta ? 0.0f : dot) - dlse;
    // One NaN or Inf in dO, O, Q or a key that this query sees: all it contributes is NaN.
    const bool sound = is_finite(norm + dot + l + q_scale + dlse);
    const float poison = sound ? 0.0f : NAN;
    const float inverse_l = live && sound ? 1.0f / l : 0.0f;

    QueryTerms terms = {q_scale * (p.scale * kLog2E), 0.0f, inverse_l, -delta * inverse_l};
    float row_factor = p.scale;
    GroupScale codes = {1.0f, 1.0f};
    if (train8) {
      if (p.dp == DpFormat::kInt8) codes = group_scale(sound ? largest : 0.0f, 127.0f);
      const float r = norm_factor * norm * v_norm + fabsf(dlse);
      const float inverse_r = r > kSmallestR ? 1.0f / r : 0.0f;
      const float y_factor = sound ? q_scale * (r * inverse_l) : 0.0f;
      terms.gain = codes.scale * inverse_r;
      terms.offset = -delta * inverse_r;
      row_factor = p.scale * (1.0f / 256.0f) * (r * inverse_l);
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        const int c = lane + i * kWarpSize;
        if (!live || !sound || c >= dim) continue;
        x_max[i] = fmaxf(x_max[i], fabsf(d_out[i] * inverse_l));
        y_max[i] = fmaxf(y_max[i], fabsf(static_cast<float>(p.q8[row * dim + c]) * y_factor));
      }
    }
    if (!live) {
      terms = {0.0f, -INFINITY, 0.0f, 0.0f};
      row_factor = 0.0f;
    } else {
      terms.shift = (train8 ? 8.0f : 0.0f) - p.m[row] + poison;
      row_factor += poison;
      if (!sound) terms.score = terms.gain = terms.offset = 0.0f;
    }
    if (lane == 0) {
      w.terms[padded_row] = terms;
      w.row_factor[padded_row] = row_factor;
    }
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const int c = lane + i * kWarpSize;
      if (c >= dim) break;
      const float value = sound ? d_out[i] : 0.0f;
      if (p.dp == DpFormat::kInt8) {
        static_cast<int8_t*>(w.d_out)[padded_row * dim + c] =
            static_cast<int8_t>(int8_code(value, codes.inverse));
      } else {
        static_cast<uint16_t*>(w.d_out)[padded_row * dim + c] = bf16_bits(value);
      }
    }
  }
  if (!train8) return;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const int c = lane + i * kWarpSize;
    if (c >= dim) break;
    atomicMax(&channel_max[0][c], float_bits(x_max[i]));
    atomicMax(&channel_max[1][c], float_bits(y_max[i]));
  }
  __syncthreads();
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    atomicMax(&w.x_max[kv_head * dim + c], channel_max[0][c]);
    atomicMax(&w.y_max[kv_head * dim + c], channel_max[1][c]);
  }
}

// Stored position p of a group of 16 tokens holds token pi[p] (docs/abi.md, "Rounding").
__device__ int permuted(int position) {
  return position / 4 * 2 + (position & 1) + (position & 2) * 4;
}

// 16 codes of one channel, one token group, written at once.
struct alignas(16) Codes16 {
  uint8_t code[16];
};

__device__ Codes16* transposed_slot(uint8_t* base, int64_t head, int dim, int c, int64_t tokens,
                                    int tile, int group) {
  return reinterpret_cast<Codes16*>(base + (head * dim + c) * tokens + tile * kTile + group * 16);
}

// x and y of one tile of 64 queries.
__device__ void query_operands(const BackwardCall& p, Place at) {
  const BackwardWorkspace& w = p.w;
  __shared__ float l_inverse[kTile], y_factor[kTile];
  __shared__ float amax[kWarps], q_scales[kTile];
  const AttentionShape& s = p.shape;
  const bool train8 = p.backward == Backward::kTrain8;
  const int tiles = tiles_of(s.queries), dim = s.padded_dim;
  const int64_t head = static_cast<int64_t>(at.batch) * s.heads + at.head;
  const int64_t kv_head = static_cast<int64_t>(at.batch) * s.kv_heads +
                          at.head / (s.heads / s.kv_heads);
  const int first = at.tile * kTile;
  const int count = min(kTile, s.queries - first);
  const int64_t token0 = ((static_cast<int64_t>(at.batch) * s.queries + first) * s.heads + at.head) *
                         s.head_dim;
  const int64_t token_stride = static_cast<int64_t>(s.heads) * s.head_dim;

  // A query whose shift is not finite is dead (−inf) or poisoned (NaN): zero codes.
  if (threadIdx.x < kTile) {
    const int n = threadIdx.x;
    const int64_t padded_row = head * tiles * kTile + first + n;
    const bool counts = n < count && is_finite(w.terms[padded_row].shift);
    q_scales[n] = counts ? p.q_scale[head * s.queries + first + n] : 0.0f;
    l_inverse[n] = counts ? 1.0f / p.l[head * s.queries + first + n] : 0.0f;
    y_factor[n] =
        counts ? q_scales[n] * (w.row_factor[padded_row] / (p.scale * (1.0f / 256.0f))) : 0.0f;
  }
  __syncthreads();

  float d_out_inverse = 0.0f;
  if (!train8) {  // dO as one INT8 group
    float largest = 0.0f;
    for (int i = threadIdx.x; i < count * s.head_dim; i += kThreads) {
      const int n = i / s.head_dim;
      const float x = load(p.dout, p.out_dtype, token0 + n * token_stride + i % s.head_dim);
      if (l_inverse[n] != 0.0f) largest = fmaxf(largest, fabsf(x));
    }
    largest = warp_max(largest);
    if (threadIdx.x % kWarpSize == 0) amax[threadIdx.x / kWarpSize] = largest;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, amax[i]);
    const GroupScale codes = group_scale(largest, 127.0f);
    d_out_inverse = codes.inverse;
    float q_scale = 0.0f;  // all sound tokens of the tile share one
    for (int n = 0; n < kTile; ++n) q_scale = fmaxf(q_scale, q_scales[n]);
    if (threadIdx.x == 0) w.scales[head * tiles + at.tile] = {codes.scale, q_scale};
  }

  for (int i = threadIdx.x; i < dim * (kTile / 16); i += kThreads) {
    const int c = i % dim, group = i / dim;
    float x_inverse = 0.0f, y_inverse = 0.0f;
    if (train8) {
      x_inverse = group_scale(bits_float(w.x_max[kv_head * dim + c]), 448.0f).inverse;
      y_inverse = group_scale(bits_float(w.y_max[kv_head * dim + c]), 448.0f).inverse;
    }
    Codes16 x, y;
#pragma unroll
    for (int position = 0; position < 16; ++position) {
      const int n = group * 16 + permuted(position);
      const bool counts = n < count && l_inverse[n] != 0.0f;
      const float d_out = counts && c < s.head_dim
                              ? load(p.dout, p.out_dtype, token0 + n * token_stride + c) : 0.0f;
      const int q = counts ? p.q8[(head * s.queries + first + n) * dim + c] : 0;
      if (train8) {
        x.code[position] = e4m3_code(d_out * l_inverse[n] * x_inverse);
        y.code[position] = e4m3_code(static_cast<float>(q) * y_factor[n] * y_inverse);
      } else {
        x.code[position] = static_cast<uint8_t>(int8_code(d_out, d_out_inverse));
        y.code[position] = static_cast<uint8_t>(q);
      }
    }
    const int64_t tokens = static_cast<int64_t>(tiles) * kTile;
    *transposed_slot(w.x, head, dim, c, tokens, at.tile, group) = x;
    *transposed_slot(w.y, head, dim, c, tokens, at.tile, group) = y;
  }
}

// z of one tile of 64 keys.
__device__ void key_operands(const BackwardCall& p, Place at) {
  const BackwardWorkspace& w = p.w;
  const AttentionShape& s = p.shape;
  const bool train8 = p.backward == Backward::kTrain8;
  const int tiles = tiles_of(s.keys), dim = s.padded_dim;
  const int64_t head = static_cast<int64_t>(at.batch) * s.kv_heads + at.head;
  const int first = at.tile * kTile;
  const int count = min(kTile, s.keys - first);
  const float k_scale = fabsf(p.k_scale[head * tiles + at.tile]);
  for (int i = threadIdx.x; i < dim * (kTile / 16); i += kThreads) {
    const int c = i % dim, group = i / dim;
    const float inverse =
        train8 ? group_scale(bits_float(w.z_max[head * dim + c]), 448.0f).inverse : 0.0f;
    Codes16 z;
#pragma unroll
    for (int position = 0; position < 16; ++position) {
      const int n = group * 16 + permuted(position);
      const float code = n < count ? key_code(p, head * s.keys + first + n, c) : 0.0f;
      z.code[position] = train8 ? e4m3_code(code * k_scale * inverse)
                                : static_cast<uint8_t>(static_cast<int8_t>(code));
    }
    *transposed_slot(w.z, head, dim, c, static_cast<int64_t>(tiles) * kTile, at.tile, group) = z;
  }
}

// Blocks below `query_blocks` make x and y, the others z.
__global__ void __launch_bounds__(kThreads) gradient_operands(const BackwardCall p) {
  const AttentionShape& s = p.shape;
  const int q_tiles = tiles_of(s.queries), kv_tiles = tiles_of(s.keys);
  const unsigned query_blocks = static_cast<unsigned>(q_tiles) * s.heads * s.batch;
  if (blockIdx.x < query_blocks) {
    query_operands(p, place(q_tiles, s.heads));
  } else {
    const unsigned index = blockIdx.x - query_blocks, rest = index / kv_tiles;
    key_operands(p,
                 {static_cast<int>(index % kv_tiles), static_cast<int>(rest % s.kv_heads),
                  static_cast<int>(rest / s.kv_heads)});
  }
}

}  // namespace

const char* prepare_backward(const BackwardCall& p, Stream stream) {
  const AttentionShape& s = p.shape;
  const unsigned q_blocks = static_cast<unsigned>(tiles_of(s.queries)) * s.heads * s.batch;
  const unsigned kv_blocks = static_cast<unsigned>(tiles_of(s.keys)) * s.kv_heads * s.batch;
  const int64_t maxima = static_cast<int64_t>(s.batch) * s.kv_heads * (3 * s.padded_dim + 1);
  const char* error = nullptr;
  const auto run = [&](void (*kernel)(BackwardCall), unsigned blocks) {
    if (error == nullptr) error = launch(kernel, blocks, kThreads, 0, stream, p);
  };
  if (p.backward == Backward::kTrain8) {  // sagebwd's scales are found tile by tile
    run(clear_maxima, blocks_for(maxima, kThreads));
    run(key_statistics, kv_blocks);
  }
  run(query_terms, q_blocks);
  run(gradient_operands, q_blocks + kv_blocks);
  return error;
}

}  // namespace sage
