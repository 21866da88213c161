// The last launch of the backward pre-pass (backward_prepass.cu): x, y and z of docs/abi.md, section 4, 8-bit and
// transposed, tokens permuted by `pi`.
#pragma once

#include "sm80/prepass_share.cuh"

namespace sage::prepass {

// Blocks of a multiprocessor. Before sm_89 conversions to e4m3 take more registers.
__host__ __device__ constexpr int operands_blocks(int head_dim, bool train8, int architecture) {
  return (train8 && architecture >= 89 && head_dim < 256 ? 384 : 256) / head_dim;
}
#ifdef __CUDA_ARCH__
inline constexpr int kCompiledArchitecture = __CUDA_ARCH__ / 10;
#else
inline constexpr int kCompiledArchitecture = 0;  // the host asks its device
#endif

// The thread's four tokens of a tile: those that `pi` stores as one word of a channel (docs/abi.md,
// "Rounding"): 2q, 2q + 1, 8 + 2q, 9 + 2q of a group of 16.
template <class Rows>
__device__ __forceinline__ int permuted_token(int i) {
  return Rows::row() / 4 * 16 + Rows::row() % 4 * 2 + i % 2 + i / 2 * 8;
}

// The inverse scale of an e4m3 channel, from its largest magnitude.
__device__ __forceinline__ float inverse_scale(float maximum) { return group_scale(maximum, 448.0f).inverse; }

template <int kHeadDim>
struct OperandsShared {
  static constexpr int kChunk = 8;  // tiles
  TransposedTile<kHeadDim> staged[2];
  alignas(16) float inverse[2][kHeadDim];  // of the scales of x and y, or of z
  // What a query's x and y are multiplied with, or for sagebwd whether it counts, and its scale. 0: it is dead (its shift
  // is −inf) or poisoned (NaN), and its codes are zeros.
  alignas(16) float2 factor[kChunk * kTile];
  float scratch[2][TokenThreads<kHeadDim>::kThreads / kWarpSize];
};

// One tile of x, y or z: values in y[token][channel], to be multiplied by the channel's factor.
template <int kHeadDim, bool kTrain8>
__device__ __forceinline__ void stage_operand(TransposedTile<kHeadDim>& staged, const float (&y)[kPerThread][kChannels],
                                              const float (&factor)[kChannels]) {
  using Rows = TokenThreads<kHeadDim>;
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
}

// x and y of a share of a head's queries, the last first: query_terms has read those last, and they may still lie in the
// L2 cache.
template <int kHeadDim, class Piece, bool kTrain8>
__device__ void query_operands(const BackwardCall& p, const HeadShare& at, OperandsShared<kHeadDim>& shared) {
  using Rows = TokenThreads<kHeadDim>;
  constexpr int kChunk = OperandsShared<kHeadDim>::kChunk;
  const BackwardWorkspace& w = p.w;
  const AttentionShape& s = p.shape;
  const int thread = static_cast<int>(threadIdx.x), channel = Rows::channel();
  const int64_t kv_plane = static_cast<int64_t>(at.batch) * s.kv_heads + at.head / (s.heads / s.kv_heads);
  const int stride = s.heads * s.head_dim;
  const int64_t head_at = static_cast<int64_t>(at.batch) * s.queries * stride + at.head * s.head_dim;
  const int64_t tokens = static_cast<int64_t>(at.tiles) * kTile;
  const auto tile_of = [&](int visit) { return at.tiles - 1 - visit; };

  Piece d_out[kPerThread];
  uint2 q[kPerThread];
  const auto load_gradients = [&](int visit) {
    const int first = tile_of(visit) * kTile + permuted_token<Rows>(0);
    const int64_t row = head_at + static_cast<int64_t>(first) * stride;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int distance = i % 2 + i / 2 * 8;
      d_out[i].load(p.dout, p.out_dtype, row + static_cast<unsigned>(distance * stride), channel, s.head_dim,
                    visit < at.tiles && distance < s.queries - first);
    }
  };
  const auto load_queries = [&](int visit) {
    const int first = tile_of(visit) * kTile + permuted_token<Rows>(0);
    const int8_t* const codes = p.q8 + (at.plane * s.queries + first) * kHeadDim + channel;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int distance = i % 2 + i / 2 * 8;
      q[i] = make_uint2(0, 0);
      if (visit < at.tiles && distance < s.queries - first) q[i] = load_codes(codes + distance * kHeadDim);
    }
  };
  if (Piece::kReadsAhead) load_gradients(at.first);
  load_queries(at.first);
  if (kTrain8) {
    const int c = thread % kHeadDim;
    const float* const maxima = thread < kHeadDim ? w.x_max : w.y_max;
    shared.inverse[thread / kHeadDim][c] = inverse_scale(maxima[kv_plane * kHeadDim + c]);
  }
#pragma unroll 1
  for (int visit = at.first, i = 0; visit < at.tiles; visit += at.step, ++i) {
    __syncthreads();  // what was staged before has been read, and the factors
    if (i % kChunk == 0) {
      for (int t = thread; t < kChunk * kTile; t += Rows::kThreads) {
        const int query = tile_of(visit + t / kTile * at.step) * kTile + t % kTile;
        shared.factor[t] = make_float2(0.0f, 0.0f);
        if (query < 0 || query >= s.queries) continue;
        const int64_t row = at.plane * s.queries + query, padded_row = at.plane * tokens + query;
        const float q_scale = p.q_scale[row];
        const float x = kTrain8 ? 1.0f / p.l[row] : 1.0f;
        const float y = kTrain8 ? q_scale * (w.row_factor[padded_row] / (p.scale * (1.0f / 256.0f))) : q_scale;
        if (is_finite(w.terms[padded_row].shift)) shared.factor[t] = make_float2(x, y);
      }
      __syncthreads();
    }
    if (!Piece::kReadsAhead) load_gradients(visit);
    const float2* const factors = shared.factor + i % kChunk * kTile;
    float x[kPerThread][kChannels], inverse[kChannels];
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const float factor = factors[permuted_token<Rows>(j)].x;
      if (factor == 0.0f) d_out[j].clear();
      d_out[j].unpack(x[j]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x[j][c] *= factor;
    }
    if (Piece::kReadsAhead) load_gradients(visit + at.step);
    if (kTrain8) {
      load_floats(inverse, shared.inverse[0] + channel);
    } else {  // dO as one INT8 group; Q's codes, which share a scale, as they are
      float largest = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) largest = fmaxf(largest, largest_magnitude(x[j]));
      const GroupScale codes = group_scale(block_max<Rows::kThreads>(largest, shared.scratch[0]), 127.0f);
      const float q_scale = block_max<Rows::kThreads>(thread < kTile ? factors[thread].y : 0.0f, shared.scratch[1]);
      if (thread == 0) w.scales[at.plane * at.tiles + tile_of(visit)] = {codes.scale, q_scale};
#pragma unroll
      for (int c = 0; c < kChannels; ++c) inverse[c] = codes.inverse;
    }
    stage_operand<kHeadDim, kTrain8>(shared.staged[0], x, inverse);

#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const float2 factor = factors[permuted_token<Rows>(j)];
      unpack_codes(x[j], q[j]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x[j][c] *= kTrain8 ? factor.y : factor.x;
    }
    load_queries(visit + at.step);
    if (kTrain8) load_floats(inverse, shared.inverse[1] + channel);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) inverse[c] = kTrain8 ? inverse[c] : 1.0f;
    stage_operand<kHeadDim, kTrain8>(shared.staged[1], x, inverse);
    __syncthreads();
    const int64_t place = at.plane * kHeadDim * tokens + ptx::opaque(tile_of(visit)) * kTile;
    shared.staged[0].store(w.x + place, tokens, ptx::opaque(thread));
    shared.staged[1].store(w.y + place, tokens, ptx::opaque(thread));
  }
}

// z of a share of a head's keys.
template <int kHeadDim, bool kTrain8>
__device__ void key_operands(const BackwardCall& p, const HeadShare& at, OperandsShared<kHeadDim>& shared) {
  using Rows = TokenThreads<kHeadDim>;
  const AttentionShape& s = p.shape;
  const int channel = Rows::channel(), thread = static_cast<int>(threadIdx.x);
  const int64_t tokens = static_cast<int64_t>(at.tiles) * kTile;
  // Where dQ comes beside dK and dV: keys 2q, 2q + 8, 2q + 1, 2q + 9, each beside that of the next eight.
  const auto token = [&](int i) { return permuted_token<Rows>(p.adds_dq ? i / 2 + i % 2 * 2 : i); };
  uint2 k[kPerThread];
  const auto load = [&](int tile) {
    const int8_t* const codes = p.k8 + (at.plane * s.keys + static_cast<int64_t>(tile) * kTile) * kHeadDim + channel;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      k[i] = make_uint2(0, 0);
      if (tile * kTile + token(i) < s.keys) k[i] = load_codes(codes + token(i) * kHeadDim);
    }
  };
  load(at.first);
  if (thread < kHeadDim) {
    shared.inverse[0][thread] = kTrain8 ? inverse_scale(p.k_max[at.plane * kHeadDim + thread]) : 1.0f;
  }
#pragma unroll 1
  for (int tile = at.first; tile < at.tiles; tile += at.step) {
    const float k_scale = kTrain8 ? fabsf(p.k_scale[at.plane * at.tiles + tile]) : 1.0f;
    __syncthreads();  // what was staged before has been read
    float z[kPerThread][kChannels], inverse[kChannels];
    load_floats(inverse, shared.inverse[0] + channel);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float factor = bad_key<Rows::kThreadsPerToken>(k[i]) ? 0.0f : k_scale;
      unpack_codes(z[i], k[i]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) z[i][c] *= factor;
    }
    load(tile + at.step);
    stage_operand<kHeadDim, kTrain8>(shared.staged[0], z, inverse);
    __syncthreads();
    shared.staged[0].store(p.w.z + at.plane * kHeadDim * tokens + ptx::opaque(tile) * kTile, tokens, ptx::opaque(thread));
  }
}

// Every block makes x and y of its share of the queries, then z of its share of the keys.
template <int kHeadDim, class Piece, bool kTrain8>
__global__ void __launch_bounds__(2 * kHeadDim, operands_blocks(kHeadDim, kTrain8, kCompiledArchitecture))
    gradient_operands(const PrepassCall call) {
  __shared__ OperandsShared<kHeadDim> shared;
  const BackwardCall& p = call.p;
  const AttentionShape& s = p.shape;
  const int block = static_cast<int>(blockIdx.x);
  if (block < call.query_shares * s.heads * s.batch) {
    query_operands<kHeadDim, Piece, kTrain8>(p, HeadShare(block, s.heads, call.query_shares, s.queries), shared);
  }
  __syncthreads();
  if (block < call.key_shares * s.kv_heads * s.batch) {
    key_operands<kHeadDim, kTrain8>(p, HeadShare(block, s.kv_heads, call.key_shares, s.keys), shared);
  }
}

}  // namespace sage::prepass
