// What the gradient kernels need before their loops (docs/abi.md, section 4), in four launches:
//   clear_maxima      zeroes the maxima, and how many rows are taken                (train8)
//   key_statistics    largest ‖V_j‖ of each head and largest |K̂| of each channel    (train8)
//   query_terms       clears dQ where it is added up; per query: D = dO·(O − v_mean), r, 1/l, dO as INT8 codes or bf16; maxima of x and y
//   gradient_operands x, y, z: 8-bit and transposed, tokens permuted by `pi`
// Maxima are taken over the bits of non-negative floats, so their order cannot matter.
//
// Requirements: sm_80. Memory bound: a block of 2·Hp threads reads 64 tokens at once, eight channels of
// four tokens a thread (quantize/rows.cuh), before it uses the first. Nothing here depends on the values
// of other tokens but the maxima, so every block is independent.
#include <cmath>

#include "common/launch.h"
#include "common/scale.cuh"
#include "common/tile.cuh"
#include "quantize/rows.cuh"
#include "sm80/backward.h"
#include "sm80/backward_workspace.h"
#include "sm80/prepass_operands.cuh"

namespace sage {
namespace {

using namespace prepass;

constexpr int kTilesPerBlock = 4;  // of the launches that take maxima: each ends in atomics
constexpr int kClearThreads = 256;
constexpr float kSmallestR = 0x1p-100f;  // below, 1/r could overflow: such rows carry no gradient

// The larger of each thread's maxima of eight channels, over the block's 16 rows of threads, to memory.
template <int kHeadDim>
__device__ __forceinline__ void store_maxima(uint32_t (&shared)[kHeadDim],
                                             const float (&largest)[kChannels], uint32_t* out) {
  using Rows = RowBlock<kHeadDim>;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    atomicMax(&shared[Rows::channel() + c], float_bits(largest[c]));
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < kHeadDim; c += Rows::kThreads) {
    if (shared[c] != 0) atomicMax(out + c, shared[c]);
  }
}

// ‖x‖ of channels spread over neighbouring lanes. Squares are taken relative to the largest entry, so
// that those of tiny values do not underflow; NaN if any entry is not finite.
template <int kLanes>
__device__ __forceinline__ float norm(const float (&x)[kChannels], float largest) {
  const float inverse = largest < 0x1p-110f ? 0.0f : 1.0f / largest;
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) sum = fmaf(x[c] * inverse, x[c] * inverse, sum);
  return largest * sqrtf(lanes_sum<kLanes>(sum));
}

// ------------------------------------------------------------------------------------------- maxima

__global__ void __launch_bounds__(kClearThreads) clear_maxima(const BackwardCall p) {
  const BackwardWorkspace& w = p.w;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kClearThreads + threadIdx.x;
  if (i < w.taken + 2 - w.x_max) w.x_max[i] = 0;  // maxima, and what is taken
}

// The largest magnitudes of eight channels' codes over some tokens, in pairs of 16 bits: channels 0 and 2, 1 and 3, 4
// and 6, 5 and 7.
struct LargestCodes {
  uint32_t most[4] = {}, least[4] = {};

  __device__ __forceinline__ void add(uint2 codes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Two bytes of four, each with its sign.
      const uint32_t pair = ptx::prmt(i < 2 ? codes.x : codes.y, 0, i % 2 == 0 ? 0xa280 : 0xb391);
      most[i] = __vmaxs2(most[i], pair);
      least[i] = __vmins2(least[i], pair);
    }
  }
  __device__ __forceinline__ int of(int channel) const {
    const int i = channel / 4 * 2 + channel % 2, shift = channel % 4 / 2 * 16;
    const int largest = static_cast<int16_t>(most[i] >> shift), smallest = static_cast<int16_t>(least[i] >> shift);
    return max(largest, -smallest);
  }
};

template <int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim, 256 / kHeadDim) key_statistics(const BackwardCall p) {
  using Rows = RowBlock<kHeadDim>;
  __shared__ uint32_t channel_max[kHeadDim];
  __shared__ float norms[Rows::kThreads / kWarpSize];
  const AttentionShape& s = p.shape;
  const int tiles = tiles_of(s.keys);
  const Place at(static_cast<int>(blockIdx.x), (tiles + kTilesPerBlock - 1) / kTilesPerBlock,
                 s.kv_heads);
  const int channel = Rows::channel();
  for (int c = static_cast<int>(threadIdx.x); c < kHeadDim; c += Rows::kThreads) channel_max[c] = 0;
  __syncthreads();

  float largest[kChannels] = {}, norm_max = 0.0f;
#pragma unroll 1
  for (int tile = at.index * kTilesPerBlock; tile < min(tiles, (at.index + 1) * kTilesPerBlock);
       ++tile) {
    const float k_scale = fabsf(p.k_scale[at.plane * tiles + tile]);
    const bool codes = p.dp == DpFormat::kInt8;
    const float v_scale = codes ? p.v_dp_scale[at.plane * tiles + tile] : 1.0f;
    uint2 k[kPerThread], v8[kPerThread];
    Piece<Dtype::kBf16> v16[kPerThread];
    bool bad[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int key = tile * kTile + Rows::row() + 16 * i;
      k[i] = v8[i] = make_uint2(0, 0);
      bad[i] = false;
      if (key >= s.keys) continue;
      const int64_t row = (at.plane * s.keys + key) * kHeadDim;
      k[i] = load_codes(p.k8 + row + channel);
      bad[i] = p.k8[row] == kBadCode;
      if (codes) {
        v8[i] = load_codes(static_cast<const int8_t*>(p.v_dp) + row + channel);
      } else {
        v16[i].load(p.v_dp, Dtype::kBf16, row, channel, kHeadDim);
      }
    }
    LargestCodes tile_codes;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) tile_codes.add(bad[i] ? make_uint2(0, 0) : k[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      largest[c] = fmaxf(largest[c], static_cast<float>(tile_codes.of(c)) * k_scale);
    }
    if (codes) {
      // Sums of squares below 2^22: exact.
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int x = static_cast<int>(v8[i].x), y = static_cast<int>(v8[i].y);
        squares = fmaxf(squares, lanes_sum<Rows::kThreadsPerToken>(
                                     static_cast<float>(__dp4a(x, x, __dp4a(y, y, 0)))));
      }
      norm_max = fmaxf(norm_max, sqrtf(squares) * v_scale);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      float x[kChannels];
      v16[i].unpack(x);
      const float top = lanes_max<Rows::kThreadsPerToken>(largest_magnitude(x));
      norm_max = fmaxf(norm_max, norm<Rows::kThreadsPerToken>(x, top));
    }
  }
  norm_max = block_max<Rows::kThreads>(norm_max, norms);
  if (threadIdx.x == 0) atomicMax(p.w.v_max + at.plane, float_bits(norm_max));
  store_maxima<kHeadDim>(channel_max, largest, p.w.z_max + at.plane * kHeadDim);
}

// ---------------------------------------------------------------------------------------- per query

// QueryTerms, row_factor, dO's codes.
template <int kHeadDim, class Piece, bool kTrain8>
__global__ void __launch_bounds__(2 * kHeadDim, kTermsBlocks<kHeadDim, Piece>)
    query_terms(const BackwardCall p) {
  using Rows = RowBlock<kHeadDim>;
  constexpr int kLanes = Rows::kThreadsPerToken;
  constexpr int kAtOnce = 2;  // tokens a thread: few registers, many blocks
  __shared__ uint32_t channel_max[2][kHeadDim];
  const AttentionShape& s = p.shape;
  const int tiles = tiles_of(s.queries);
  const Place at(static_cast<int>(blockIdx.x), (tiles + kTilesPerBlock - 1) / kTilesPerBlock,
                 s.heads);
  const BackwardWorkspace& w = p.w;
  const int64_t kv_plane =
      static_cast<int64_t>(at.batch) * s.kv_heads + at.head / (s.heads / s.kv_heads);
  __shared__ alignas(16) float v_mean[kHeadDim];
  // What is known of each query, read at once: one after the other, in the loop, these loads were half of the time.
  struct alignas(16) Known {
    float l, m, dlse, q_scale;
  };
  constexpr int kTokens = kTilesPerBlock * kTile;
  __shared__ Known known[kTokens];
  const int first_query = at.index * kTokens;
  for (int i = static_cast<int>(threadIdx.x); i < kTokens; i += Rows::kThreads) {
    const int64_t row = at.plane * s.queries + first_query + i;
    known[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first_query + i < s.queries) known[i] = {p.l[row], p.m[row], p.dlse[row], p.q_scale[row]};
  }
  for (int c = static_cast<int>(threadIdx.x); c < 2 * kHeadDim; c += Rows::kThreads) {
    channel_max[c / kHeadDim][c % kHeadDim] = 0;
    if (c < kHeadDim) v_mean[c] = p.v_mean[kv_plane * kHeadDim + c];
  }
  __shared__ float norm_factor, v_norm;  // registers are full
  if (threadIdx.x == 0) {
    norm_factor = 2.0f / sqrtf(static_cast<float>(s.head_dim));
    v_norm = kTrain8 ? bits_float(w.v_max[kv_plane]) : 0.0f;
  }
  __syncthreads();

  const int64_t stride = static_cast<int64_t>(s.heads) * s.head_dim;
  const int64_t head_at = static_cast<int64_t>(at.batch) * s.queries * stride + at.head * s.head_dim;
  float x_max[kChannels] = {}, y_max[kChannels] = {};
#pragma unroll 1
  for (int first = first_query; first < min(tiles * kTile, first_query + kTokens);
       first += 16 * kAtOnce) {
    const int channel = Rows::channel(ptx::opaque(static_cast<int>(threadIdx.x)));  // not kept in a register
    Piece d_out[kAtOnce], out[kAtOnce];
    uint2 q[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int query = first + Rows::row() + 16 * i;
      const int64_t row = at.plane * s.queries + query;
      q[i] = make_uint2(0, 0);
      if (query >= s.queries) continue;
      d_out[i].load(p.dout, p.out_dtype, head_at + query * stride, channel, s.head_dim);
      out[i].load(p.out, p.out_dtype, head_at + query * stride, channel, s.head_dim);
      if (kTrain8 && p.adds_dq) {  // sm90/backward_dq_sums.cuh
        static_cast<uint4*>(p.dq)[(head_at + query * stride + channel) / 8] = make_uint4(0, 0, 0, 0);
      }
      q[i] = load_codes(p.q8 + row * kHeadDim + channel);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i > 0 && !ptx::always(s.queries, i)) continue;  // one after the other: fewer registers
      const int query = first + Rows::row() + 16 * i;
      const int64_t padded_row = at.plane * tiles * kTile + query;
      const Known& row = known[query - first_query];
      const bool live = row.l != 0.0f;  // a NaN is live: it must reach the gradients
      const float dlse = live ? row.dlse : 0.0f;
      float x[kChannels], o[kChannels], mean[kChannels], dot = 0.0f;
      d_out[i].unpack(x);
      out[i].unpack(o);
      load_floats(mean, v_mean + channel);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        x[c] = live ? x[c] : 0.0f;
        dot = live ? fmaf(x[c], o[c] - mean[c], dot) : 0.0f;
      }
      dot = lanes_sum<kLanes>(dot);
      const float largest = lanes_max<kLanes>(largest_magnitude(x));
      const float length = norm<kLanes>(x, largest);
      const float delta = (p.exact_delta ? 0.0f : dot) - dlse;
      // One NaN or Inf in dO, O, Q or a key that this query sees: all it contributes is NaN.
      const bool sound = is_finite(length + dot + row.l + row.q_scale + dlse);
      const float poison = sound ? 0.0f : NAN;
      const float inverse_l = live && sound ? 1.0f / row.l : 0.0f;

      QueryTerms terms = {row.q_scale * (p.scale * kLog2E), 0.0f, inverse_l, -delta * inverse_l};
      float row_factor = p.scale;
      GroupScale codes = {1.0f, 1.0f};
      if (kTrain8) {
        if (p.dp == DpFormat::kInt8) codes = group_scale(sound ? largest : 0.0f, 127.0f);
        const float r = norm_factor * length * v_norm + fabsf(dlse);
        const float inverse_r = r > kSmallestR ? 1.0f / r : 0.0f;
        const float y_factor = sound ? row.q_scale * (r * inverse_l) : 0.0f;
        terms.gain = codes.scale * inverse_r;
        terms.offset = -delta * inverse_r;
        row_factor = p.scale * (1.0f / 256.0f) * (r * inverse_l);
        if (live && sound) {
          float code[kChannels];
          unpack_codes(code, q[i]);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            x_max[c] = fmaxf(x_max[c], fabsf(x[c] * inverse_l));
            y_max[c] = fmaxf(y_max[c], fabsf(code[c] * y_factor));
          }
        }
      }
      if (!live) {
        terms = {0.0f, -INFINITY, 0.0f, 0.0f};
        row_factor = 0.0f;
      } else {
        terms.shift = (kTrain8 ? 8.0f : 0.0f) - row.m + poison;
        row_factor += poison;
        if (!sound) terms.score = terms.gain = terms.offset = 0.0f;
      }
      if (channel == 0) {
        w.terms[padded_row] = terms;
        w.row_factor[padded_row] = row_factor;
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x[c] = sound ? x[c] : 0.0f;
      if (p.dp == DpFormat::kInt8) {
        *reinterpret_cast<uint2*>(static_cast<int8_t*>(w.d_out) + padded_row * kHeadDim + channel) =
            int8_codes(x, codes.inverse);
      } else {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(w.d_out) + padded_row * kHeadDim + channel) =
            halves(x, true);
      }
    }
  }
  if (!kTrain8) return;
  store_maxima<kHeadDim>(channel_max[0], x_max, w.x_max + kv_plane * kHeadDim);
  store_maxima<kHeadDim>(channel_max[1], y_max, w.y_max + kv_plane * kHeadDim);
}

template <int kHeadDim, class Piece>
const char* start(const BackwardCall& p, Stream stream) {
  const AttentionShape& s = p.shape;
  const auto blocks = [](int tiles, int heads, int batch, int per_block) {
    return static_cast<unsigned>((tiles + per_block - 1) / per_block) * heads * batch;
  };
  const int q_tiles = tiles_of(s.queries), kv_tiles = tiles_of(s.keys);
  const int64_t maxima = p.w.taken + 2 - p.w.x_max;
  const char* error = nullptr;
  const auto run = [&](void (*kernel)(BackwardCall), unsigned count, int threads) {
    if (error == nullptr) error = launch(kernel, count, threads, 0, stream, p);
  };
  constexpr int kThreads = 2 * kHeadDim;
  const bool train8 = p.backward == Backward::kTrain8;
  if (train8) {  // sagebwd's scales are found tile by tile
    run(clear_maxima, blocks_for(maxima, kClearThreads), kClearThreads);
    run(key_statistics<kHeadDim>, blocks(kv_tiles, s.kv_heads, s.batch, kTilesPerBlock), kThreads);
  }
  run(train8 ? query_terms<kHeadDim, Piece, true> : query_terms<kHeadDim, Piece, false>, blocks(q_tiles, s.heads, s.batch, kTilesPerBlock), kThreads);
  run(train8 ? gradient_operands<kHeadDim, Piece, true> : gradient_operands<kHeadDim, Piece, false>,
      blocks(q_tiles, s.heads, s.batch, 1) + blocks(kv_tiles, s.kv_heads, s.batch, 1), kThreads);
  return error;
}

}  // namespace

const char* prepare_backward(const BackwardCall& p, Stream stream) {
  return with_pieces(p.out_dtype, p.out_dtype, p.shape.head_dim, [&](auto piece) {
    using P = decltype(piece);
    switch (p.shape.padded_dim) {
      case 64:
        return start<64, P>(p, stream);
      case 128:
        return start<128, P>(p, stream);
      default:
        return start<256, P>(p, stream);
    }
  });
}

}  // namespace sage
