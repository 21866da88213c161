// The last launch of the backward pre-pass (backward_prepass.cu): x, y and z of docs/abi.md, section 4, 8-bit and
// transposed, tokens permuted by `pi`; and what its launches share.
#pragma once

#include "common/tile.cuh"
#include "quantize/rows.cuh"
#include "sm80/backward.h"
#include "sm80/backward_workspace.h"

namespace sage::prepass {

inline constexpr int kTile = 64;  // tokens at once
inline constexpr int kPerThread = kTile / 16;

// Blocks that a multiprocessor is to hold. Three of query_terms, four of gradient_operands fit where 80 and 64 registers are
// enough: for 16-bit tensors, in whole pieces, and not on sm_80 and sm_89, for which ptxas needs a few more.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kRegistersSuffice = true;
#else
inline constexpr bool kRegistersSuffice = false;
#endif
template <int kHeadDim, class Piece>
inline constexpr bool kFewRegisters = kRegistersSuffice && sizeof(Piece) == 16 && kHeadDim < 256;
template <int kHeadDim, class Piece>
inline constexpr int kTermsBlocks = kFewRegisters<kHeadDim, Piece> ? 384 / kHeadDim : 1;
template <int kHeadDim, class Piece>
inline constexpr int kOperandsBlocks = kFewRegisters<kHeadDim, Piece> ? 512 / kHeadDim : kHeadDim == 256 ? 1 : 384 / kHeadDim;

// Block `block` of a launch with one for each head and `count` places. Heads come first: blocks at work
// at the same time read whole rows of memory.
struct Place {
  int index, head, batch;
  int64_t plane;
  __device__ Place(int block, int count, int heads)
      : index(block / heads % count),
        head(block % heads),
        batch(block / heads / count),
        plane(static_cast<int64_t>(batch) * heads + head) {}
};

// Eight INT8 codes as floats: code + 128 in the low byte of 2^23. A conversion has a quarter of the rate.
__device__ __forceinline__ void unpack_codes(float (&x)[kChannels], uint2 codes) {
  const uint32_t shifted[2] = {codes.x ^ 0x80808080u, codes.y ^ 0x80808080u};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    x[c] = bits_float(ptx::prmt(shifted[c / 4], 0x4b000000u, 0x7540u + c % 4)) - 8388736.0f;
  }
}

__device__ __forceinline__ uint2 load_codes(const int8_t* codes) {
  return *reinterpret_cast<const uint2*>(codes);
}

// The thread's four tokens of a tile: those that `pi` stores as one word of a channel (docs/abi.md,
// "Rounding"): 2q, 2q + 1, 8 + 2q, 9 + 2q of a group of 16.
template <class Rows>
__device__ __forceinline__ int permuted_token(int i) {
  return Rows::row() / 4 * 16 + Rows::row() % 4 * 2 + i % 2 + i / 2 * 8;
}

// The inverse scale of an e4m3 channel, from the bits of its largest magnitude.
__device__ __forceinline__ float inverse_scale(uint32_t maximum) {
  return group_scale(bits_float(maximum), 448.0f).inverse;
}

// One tile of x, y or z: values in y[token][channel], to be multiplied by the channel's factor.
template <int kHeadDim, bool kTrain8>
__device__ __forceinline__ void store_operand(TransposedTile<kHeadDim>& staged,
                                              const float (&y)[kPerThread][kChannels],
                                              const float (&factor)[kChannels], uint8_t* out,
                                              int64_t tokens) {
  using Rows = RowBlock<kHeadDim>;
  __syncthreads();  // what was staged before has been read
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    uint32_t word = 0;
    if (kTrain8) {
      word = ptx::cvt_e4m3x4_f32(__fmul_rn(y[0][c], factor[c]), __fmul_rn(y[1][c], factor[c]),
                                 __fmul_rn(y[2][c], factor[c]), __fmul_rn(y[3][c], factor[c]));
    } else {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        word |= static_cast<uint32_t>(static_cast<uint8_t>(int8_code(y[i][c], factor[c]))) << (8 * i);
      }
    }
    staged.word(Rows::channel() + c, Rows::row()) = word;
  }
  __syncthreads();
  staged.store(out, tokens);
}

// x and y of one tile of 64 queries.
template <int kHeadDim, class Piece, bool kTrain8>
__device__ void query_operands(const BackwardCall& p, const Place& at,
                               TransposedTile<kHeadDim>& staged) {
  using Rows = RowBlock<kHeadDim>;
  __shared__ float scratch[2][Rows::kThreads / kWarpSize];
  const BackwardWorkspace& w = p.w;
  const AttentionShape& s = p.shape;
  const int tiles = tiles_of(s.queries), first = at.index * kTile, channel = Rows::channel();
  const int64_t kv_plane =
      static_cast<int64_t>(at.batch) * s.kv_heads + at.head / (s.heads / s.kv_heads);
  const int64_t stride = static_cast<int64_t>(s.heads) * s.head_dim;
  const int64_t head_at = static_cast<int64_t>(at.batch) * s.queries * stride + at.head * s.head_dim;

  // All loads are under way before the first is used. x leaves before y begins: fewer registers, more blocks.
  Piece d_out[kPerThread];
  uint2 q[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int query = first + permuted_token<Rows>(i);
    q[i] = make_uint2(0, 0);
    if (query >= s.queries) continue;
    d_out[i].load(p.dout, p.out_dtype, head_at + query * stride, channel, s.head_dim);
    q[i] = load_codes(p.q8 + (at.plane * s.queries + query) * kHeadDim + channel);
  }
  // What x and y of a query are multiplied with; 0: it is dead (its shift is −inf) or poisoned (NaN), and its
  // codes are zeros.
  __shared__ float x_factor[kTile], y_factor[kTile];
  __shared__ alignas(16) float x_inverse[kHeadDim], y_inverse[kHeadDim];
  const int thread = static_cast<int>(threadIdx.x), query = first + thread;
  float q_scale = 0.0f;
  if (kTrain8) {
    const bool of_x = thread < kHeadDim;
    const int c = of_x ? thread : thread - kHeadDim;
    (of_x ? x_inverse : y_inverse)[c] = inverse_scale((of_x ? w.x_max : w.y_max)[kv_plane * kHeadDim + c]);
  }
  if (thread < kTile) {
    float shift = -INFINITY, l = 1.0f, row_factor = 0.0f;
    if (query < s.queries) {
      const int64_t row = at.plane * s.queries + query;
      const int64_t padded_row = at.plane * tiles * kTile + query;
      shift = w.terms[padded_row].shift;
      q_scale = p.q_scale[row];
      l = p.l[row];
      row_factor = w.row_factor[padded_row];
    }
    const bool counts = is_finite(shift);
    q_scale = counts ? q_scale : 0.0f;
    x_factor[thread] = !counts ? 0.0f : kTrain8 ? 1.0f / l : 1.0f;
    y_factor[thread] =
        !counts ? 0.0f : kTrain8 ? q_scale * (row_factor / (p.scale * (1.0f / 256.0f))) : 1.0f;
  }
  float x[kPerThread][kChannels], inverse[kChannels];
  __syncthreads();
  if (kTrain8) load_floats(inverse, x_inverse + channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float factor = x_factor[permuted_token<Rows>(i)];
    d_out[i].unpack(x[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x[i][c] = factor == 0.0f ? 0.0f : x[i][c] * factor;
  }
  if (!kTrain8) {  // dO as one INT8 group; Q's codes, which share a scale, as they are
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) largest = fmaxf(largest, largest_magnitude(x[i]));
    const GroupScale codes = group_scale(block_max<Rows::kThreads>(largest, scratch[0]), 127.0f);
    q_scale = block_max<Rows::kThreads>(q_scale, scratch[1]);
    if (thread == 0) w.scales[at.plane * tiles + at.index] = {codes.scale, q_scale};
#pragma unroll
    for (int c = 0; c < kChannels; ++c) inverse[c] = codes.inverse;
  }
  const int64_t tokens = static_cast<int64_t>(tiles) * kTile;
  // Behind ptx::opaque: addresses wait in no register for their turn.
  const auto place = [&] { return at.plane * kHeadDim * tokens + ptx::opaque(first); };
  store_operand<kHeadDim, kTrain8>(staged, x, inverse, w.x + place(), tokens);

  if (kTrain8) {
    load_floats(inverse, y_inverse + channel);
  } else {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) inverse[c] = 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float factor = y_factor[permuted_token<Rows>(i)];
    unpack_codes(x[i], q[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x[i][c] *= factor;
  }
  store_operand<kHeadDim, kTrain8>(staged, x, inverse, w.y + place(), tokens);
}

// z of one tile of 64 keys.
template <int kHeadDim, bool kTrain8>
__device__ void key_operands(const BackwardCall& p, const Place& at,
                             TransposedTile<kHeadDim>& staged) {
  using Rows = RowBlock<kHeadDim>;
  const AttentionShape& s = p.shape;
  const int tiles = tiles_of(s.keys), first = at.index * kTile, channel = Rows::channel();
  const float k_scale = kTrain8 ? fabsf(p.k_scale[at.plane * tiles + at.index]) : 1.0f;
  uint2 k[kPerThread];
  int8_t first_code[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    // Where dQ comes beside dK and dV: keys 2q, 2q + 8, 2q + 1, 2q + 9, each beside that of the next eight.
    const int key = first + permuted_token<Rows>(p.adds_dq ? i / 2 + i % 2 * 2 : i);
    const int64_t row = (at.plane * s.keys + key) * kHeadDim;
    k[i] = make_uint2(0, 0);
    first_code[i] = 0;
    if (key >= s.keys) continue;
    k[i] = load_codes(p.k8 + row + channel);
    first_code[i] = p.k8[row];
  }
  __shared__ alignas(16) float z_inverse[kHeadDim];
  for (int c = static_cast<int>(threadIdx.x); c < kHeadDim; c += Rows::kThreads) {
    z_inverse[c] = kTrain8 ? inverse_scale(p.w.z_max[at.plane * kHeadDim + c]) : 1.0f;
  }
  __syncthreads();
  float z[kPerThread][kChannels], inverse[kChannels];
  load_floats(inverse, z_inverse + channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    unpack_codes(z[i], k[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) z[i][c] *= first_code[i] == kBadCode ? 0.0f : k_scale;
  }
  const int64_t tokens = static_cast<int64_t>(tiles) * kTile;
  store_operand<kHeadDim, kTrain8>(staged, z, inverse, p.w.z + at.plane * kHeadDim * tokens + first,
                          tokens);
}

// Blocks below `query_blocks` make x and y, the others z.
template <int kHeadDim, class Piece, bool kTrain8>
__global__ void __launch_bounds__(2 * kHeadDim, kOperandsBlocks<kHeadDim, Piece>)
    gradient_operands(const BackwardCall p) {
  __shared__ TransposedTile<kHeadDim> staged;
  const AttentionShape& s = p.shape;
  const int q_tiles = tiles_of(s.queries), kv_tiles = tiles_of(s.keys);
  const int query_blocks = q_tiles * s.heads * s.batch, block = static_cast<int>(blockIdx.x);
  if (block < query_blocks) {
    query_operands<kHeadDim, Piece, kTrain8>(p, Place(block, q_tiles, s.heads), staged);
  } else {
    key_operands<kHeadDim, kTrain8>(p, Place(block - query_blocks, kv_tiles, s.kv_heads), staged);
  }
}

}  // namespace sage::prepass
