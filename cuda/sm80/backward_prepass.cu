// What the gradient kernels need before their loops (docs/abi.md, section 4), in four launches:
//   clear_maxima       zeroes the maxima, and what the gradient kernels count               (train8)
//   key_statistics     largest ‖V_j‖ of each head and largest |K̂| of each channel           (train8)
//   query_terms        per query D = dO·(O − v_mean), r, 1/l, dO as INT8 codes or bf16; maxima of x and y; clears dQ where it
//                      is added up                                                          (prepass_terms.cuh)
//   gradient_operands  x, y, z: 8-bit and transposed, tokens permuted by `pi`               (prepass_operands.cuh)
// Maxima are taken over the bits of non-negative floats, so their order cannot matter.
//
// Requirements: sm_80. Memory bound: a block of 2·Hp threads takes tiles of 64 tokens, eight channels of four tokens a
// thread (quantize/rows.cuh), and stays: as many blocks as fit share the tiles of each head (prepass_share.cuh). Nothing here
// depends on the values of other tokens but the maxima.
#include <algorithm>
#include <cmath>

#include "common/launch.h"
#include "common/scale.cuh"
#include "sm80/prepass_operands.cuh"
#include "sm80/prepass_terms.cuh"

namespace sage {
namespace {

using namespace prepass;

constexpr int kClearThreads = 256;

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
  if (i < w.counters) w.x_max[i] = 0;
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
constexpr int kStatisticsBlocks = kHeadDim == 256 ? 1 : 384 / kHeadDim;  // of a multiprocessor

// K's codes and the right operand's of dP, of the thread's tokens of a tile.
struct KeyCodes {
  uint2 k[kPerThread], v[kPerThread];
};

template <int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim, kStatisticsBlocks<kHeadDim>) key_statistics(const PrepassCall call) {
  using Rows = RowBlock<kHeadDim>;
  constexpr int kLanes = Rows::kThreadsPerToken;
  __shared__ uint32_t channel_max[kHeadDim];
  __shared__ float norms[Rows::kThreads / kWarpSize];
  const BackwardCall& p = call.p;
  const AttentionShape& s = p.shape;
  const HeadShare at(static_cast<int>(blockIdx.x), s.kv_heads, call.key_shares, s.keys);
  const int channel = Rows::channel();
  const bool codes = p.dp == DpFormat::kInt8;
  for (int c = static_cast<int>(threadIdx.x); c < kHeadDim; c += Rows::kThreads) channel_max[c] = 0;
  __syncthreads();

  const auto load = [&](KeyCodes& x, int tile) {
    const int first = tile * kTile + Rows::row();
    const int64_t row = (at.plane * s.keys + first) * kHeadDim + channel;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      x.k[i] = x.v[i] = make_uint2(0, 0);
      if (tile >= at.tiles || 16 * i >= s.keys - first) continue;
      x.k[i] = load_codes(p.k8 + row + 16 * i * kHeadDim);
      if (codes) x.v[i] = load_codes(static_cast<const int8_t*>(p.v_dp) + row + 16 * i * kHeadDim);
    }
  };
  float largest[kChannels] = {}, norm_max = 0.0f;
  KeyCodes next;
  load(next, at.first);
#pragma unroll 1
  for (int tile = at.first; tile < at.tiles; tile += at.step) {
    const float k_scale = fabsf(p.k_scale[at.plane * at.tiles + tile]);
    const float v_scale = codes ? p.v_dp_scale[at.plane * at.tiles + tile] : 1.0f;
    KeyCodes x = next;
    load(next, tile + at.step);
    LargestCodes tile_codes;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) tile_codes.add(bad_key<kLanes>(x.k[i]) ? make_uint2(0, 0) : x.k[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      largest[c] = fmaxf(largest[c], static_cast<float>(tile_codes.of(c)) * k_scale);
    }
    if (codes) {
      float squares[kPerThread];  // below 2^22: exact
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int u = static_cast<int>(x.v[i].x), v = static_cast<int>(x.v[i].y);
        squares[i] = static_cast<float>(__dp4a(u, u, __dp4a(v, v, 0)));
      }
      norm_max = fmaxf(norm_max, sqrtf(combine_lanes<kLanes>(squares, Add())) * v_scale);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int key = tile * kTile + Rows::row() + 16 * i;
      Piece<Dtype::kBf16> v;
      v.load(p.v_dp, Dtype::kBf16, (at.plane * s.keys + key) * kHeadDim, channel, kHeadDim, key < s.keys);
      float y[kChannels];
      v.unpack(y);
      const float top = lanes_max<kLanes>(largest_magnitude(y));
      norm_max = fmaxf(norm_max, norm<kLanes>(y, top));
    }
  }
  norm_max = block_max<Rows::kThreads>(norm_max, norms);
  if (threadIdx.x == 0) atomicMax(p.w.v_max + at.plane, float_bits(norm_max));
  store_maxima<kHeadDim>(channel_max, largest, p.w.z_max + at.plane * kHeadDim);
}

// -------------------------------------------------------------------------------------------- launches

// Blocks stay: as many as there is room for share the tiles of all planes.
int shares_of(int64_t room, int tiles, int64_t planes) {
  if (tiles == 0 || planes == 0) return 0;
  return static_cast<int>(std::clamp<int64_t>(room / planes, 1, tiles));
}

template <int kHeadDim, class Piece>
const char* start(const BackwardCall& p, Stream stream) {
  const AttentionShape& s = p.shape;
  const int q_tiles = tiles_of(s.queries), kv_tiles = tiles_of(s.keys);
  const int64_t q_planes = static_cast<int64_t>(s.batch) * s.heads, kv_planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  const int64_t places = multiprocessors();
  const char* error = nullptr;
  const auto run = [&](void (*kernel)(PrepassCall), int query_shares, int key_shares) {
    const int64_t blocks = std::max(q_planes * query_shares, kv_planes * key_shares);
    const PrepassCall call = {p, query_shares, key_shares};
    if (error == nullptr) error = launch(kernel, dim3(static_cast<unsigned>(blocks)), 2 * kHeadDim, 0, stream, call);
  };
  const bool train8 = p.backward == Backward::kTrain8;
  if (train8) {  // sagebwd's scales are found tile by tile
    error = launch(clear_maxima, dim3(blocks_for(p.w.counters, kClearThreads)), kClearThreads, 0, stream, p);
    run(key_statistics<kHeadDim>, 0, shares_of(places * kStatisticsBlocks<kHeadDim>, kv_tiles, kv_planes));
  }
  run(train8 ? query_terms<kHeadDim, Piece, true> : query_terms<kHeadDim, Piece, false>,
      shares_of(places * kTermsBlocks<kHeadDim>, q_tiles, q_planes), 0);
  const int64_t room = places * (train8 ? kOperandsBlocks<kHeadDim, true> : kOperandsBlocks<kHeadDim, false>);
  run(train8 ? gradient_operands<kHeadDim, Piece, true> : gradient_operands<kHeadDim, Piece, false>,
      shares_of(room, q_tiles, q_planes), shares_of(room, kv_tiles, kv_planes));
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
