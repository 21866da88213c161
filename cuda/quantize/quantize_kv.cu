// Keys and values to 8 bits (docs/abi.md, section 1), bit for bit as the specification.
//
// The tiles of a (batch, key head) are shared out among blocks. Each finds the means of K and V and the scales of V from a
// sample of the tokens (sample.cuh), and writes codes; blocks stay, and read the next tile while they work on one. A second
// launch puts together what the backward pass has to know of all tokens. Where a value was too large for the scale that the
// sample gave, which is rare, it writes that head's codes once more.
//
// Requirements: sums keep the order of docs/abi.md, and no operation is contracted or approximated
// (no --use_fast_math).
#include <type_traits>

#include "common/launch.h"
#include "ptx/grid_dependency.cuh"
#include "quantize/partial.cuh"
#include "quantize/sample.cuh"

namespace sage {
namespace {

constexpr float kBadZeroScale = -0x1p-126f;
constexpr uint32_t kBadCodeByte = 0x80;  // -128, in the first byte of a bad key's codes

// ----------------------------------------------------------------------------------------------
// codes

// 2^-floor(log2 a) and its inverse for V in f16.
__device__ __forceinline__ GroupScale power_scale(float largest) {
  if (largest < kTinyAmax) return {0.0f, 0.0f};
  const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
  return {power_of_two(exponent), power_of_two(-exponent)};
}

__device__ __forceinline__ GroupScale value_scale(const QuantizeKvParams& p, float largest) {
  if (p.pv == PvFormat::kE4m3) return group_scale(largest, p.v_range);
  if (p.pv == PvFormat::kF16) return power_scale(largest);
  return {1.0f, 1.0f};
}

// The scale of the block's tokens and channels as one INT8 group; `scratch` and `barrier` as for block_max.
template <class Rows, class Barrier>
__device__ __forceinline__ GroupScale tile_scale(const float (&x)[kPerThread][kChannels], float* scratch,
                                                 const Barrier& barrier) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) largest = fmaxf(largest, largest_magnitude(x[i]));
  return group_scale(block_max<Rows::kThreads>(largest, scratch, barrier), 127.0f);
}
template <class Rows>
__device__ __forceinline__ GroupScale tile_scale(const float (&x)[kPerThread][kChannels], float* scratch) {
  return tile_scale<Rows>(x, scratch, [] { __syncthreads(); });
}

// What all tiles of a block share, a float a channel.
template <int kHeadDim>
struct ChannelConstants {
  alignas(16) float key_mean[kHeadDim], value_mean[kHeadDim], inverse[kHeadDim];  // inverse: of the scale of V
};

// x - mean, which fma rounds as a subtraction does; unused tokens are zeros and stay so.
__device__ __forceinline__ void subtract(float (&x)[kChannels], const float (&mean)[kChannels], bool used) {
  const float times = used ? -1.0f : 0.0f;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) x[c] = fmaf(times, mean[c], x[c]);
}

// A block's scratch memory for its maxima. Keys of one tile and of the next take turns: there may be no other barrier between
// two.
template <int kThreads>
struct Scratch {
  float keys[2][kThreads / kWarpSize], values[kThreads / kWarpSize], values_dp[kThreads / kWarpSize];
};

// The thread's tokens of a tile in arrays of [B, K, S, Hp].
struct TokensAt {
  int left;
  int64_t first;
  int width;

  __device__ __forceinline__ TokensAt(const QuantizeKvParams& p, int64_t plane, PiOrder tokens, int channel, int head_dim)
      : left(p.shape.keys - tokens.first),
        first((plane * p.shape.keys + tokens.first) * head_dim + channel),
        width(head_dim) {}

  // Writes value(i) for token i.
  template <class T, class Value>
  __device__ __forceinline__ void write(T* array, Value value) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const auto words = value(i);
      if (PiOrder::distance(i) < left) {
        *reinterpret_cast<std::remove_const_t<decltype(words)>*>(array + first + PiOrder::distance(i) * width) = words;
      }
    }
  }
};

// V in 16 bits.
template <int kHeadDim>
__device__ __forceinline__ void write_halves(const QuantizeKvParams& p, const float (&y)[kPerThread][kChannels],
                                             const ChannelConstants<kHeadDim>& constants, const TokensAt& tokens,
                                             int channel, ExceededValues<kHeadDim> exceeded) {
  float inverse[kChannels];
  load_floats(inverse, constants.inverse + channel);
  tokens.write(static_cast<uint16_t*>(p.v_pv), [&](int i) {
    float scaled[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      scaled[c] = y[i][c] * inverse[c];
      // What the scale is for is between 1 and 2 of its units.
      if (p.pv == PvFormat::kF16 && fabsf(scaled[c]) >= 1.0f) exceeded.note(channel + c, fabsf(y[i][c]));
    }
    return halves(scaled, p.pv == PvFormat::kBf16);
  });
}

// V without its mean in e4m3.
template <int kHeadDim>
__device__ __forceinline__ void turn_values(const float (&y)[kPerThread][kChannels],
                                            const ChannelConstants<kHeadDim>& constants, int channel, int row,
                                            TransposedTile<kHeadDim>& transposed, ExceededValues<kHeadDim> exceeded) {
  float inverse[kChannels];
  load_floats(inverse, constants.inverse + ptx::opaque(channel));
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const uint32_t codes = ptx::cvt_e4m3x4_f32(__fmul_rn(y[0][c], inverse[c]), __fmul_rn(y[1][c], inverse[c]),
                                               __fmul_rn(y[2][c], inverse[c]), __fmul_rn(y[3][c], inverse[c]));
    transposed.word(channel + c, row) = codes;
    if (exceeded.holds(codes)) {
      exceeded.note(channel + c, fmaxf(fmaxf(fabsf(y[0][c]), fabsf(y[1][c])), fmaxf(fabsf(y[2][c]), fabsf(y[3][c]))));
    }
  }
}

// The block's tile of transposed codes to memory.
template <int kHeadDim>
__device__ __forceinline__ void write_transposed(const QuantizeKvParams& p, int64_t plane, int tiles, int tile,
                                                 const TransposedTile<kHeadDim>& transposed, int thread) {
  __syncthreads();
  const int64_t padded_keys = static_cast<int64_t>(tiles) * kTileKeys;
  transposed.store(static_cast<uint8_t*>(p.v_pv) + plane * kHeadDim * padded_keys + tile * kTileKeys, padded_keys, thread);
}

// A tile of 64 tokens; reads tile `next`, if there is one, into x as its registers become free. `turn` alternates.
template <int kHeadDim, class Piece>
__device__ __forceinline__ void write_tile(const QuantizeKvParams& p, const PlaneIndex& at, int tile_index, int next,
                                           TokenPairs<Piece>& x,
                                           const ChannelConstants<kHeadDim>& constants,
                                           TransposedTile<kHeadDim>& transposed,
                                           Scratch<2 * kHeadDim>& scratch, int turn,
                                           LargestKeys<2 * kHeadDim>& seen, ExceededValues<kHeadDim> exceeded) {
  using Rows = TokenThreads<kHeadDim>;
  // Lest addresses wait in registers for the next tile.
  const int thread = ptx::opaque_thread(), row = Rows::row(thread), channel = Rows::channel(thread);
  const int64_t plane = ptx::opaque(static_cast<int>(at.plane)), tile = plane * at.tiles + tile_index;
  const uint32_t bad = x.bad;
  bool used[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) used[i] = x.used[i];
  const PiOrder order(tile_index, row);
  const TokensAt tokens(p, plane, order, channel, kHeadDim);
  float y[kPerThread][kChannels];

  // -------------------------------------------------------------------------------------------
  // keys
  float mean[kChannels];
  load_floats(mean, constants.key_mean + channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    x.k[i].unpack(y[i]);
    subtract(y[i], mean, used[i]);
  }
  if (next < at.tiles) x.load_keys(p, at, PiOrder(next, row), channel);
  bool bad_tile;
  const GroupScale key_scale =
      tile_scale<Rows>(y, scratch.keys[turn], [&] { bad_tile = __syncthreads_or(bad != 0); });
  if (p.dp != DpFormat::kNone) seen.add_keys(y, key_scale);
  tokens.write(p.k8, [&](int i) {
    uint2 codes = int8_codes(y[i], key_scale.inverse);
    if ((bad >> i & 1) && channel == 0) codes.x = (codes.x & ~0xffu) | kBadCodeByte;
    return codes;
  });
  if (threadIdx.x == 0) {
    const float negated = key_scale.scale == 0.0f ? kBadZeroScale : -key_scale.scale;
    p.k_scale[tile] = bad_tile ? negated : key_scale.scale;
  }

  // -----------------------------------------------------------------------------------------
  // values
  if (!Piece::kReadsAhead) x.read_again(p, at, order, channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) x.v[i].unpack(y[i]);
  if (next < at.tiles) x.load_values(p, at, PiOrder(next, row), channel);
  if (p.pv == PvFormat::kF16 || p.pv == PvFormat::kBf16) {
    write_halves(p, y, constants, tokens, channel, exceeded);
  } else if (p.pv == PvFormat::kInt8) {
    const GroupScale scale = tile_scale<Rows>(y, scratch.values);
    if (threadIdx.x == 0) p.v_scale[tile] = scale.scale;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        word |= static_cast<uint32_t>(static_cast<uint8_t>(int8_code(y[i][c], scale.inverse))) << (8 * i);
      }
      transposed.word(channel + c, row) = word;
    }
  }

  // -----------------------------------------------------------------------------------------
  // values without their mean
  if (p.smooth_v) {
    load_floats(mean, constants.value_mean + channel);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) subtract(y[i], mean, used[i]);
  }
  if (p.dp == DpFormat::kInt8) {
    const GroupScale scale = tile_scale<Rows>(y, scratch.values_dp);
    if (threadIdx.x == 0) p.v_dp_scale[tile] = scale.scale;
    uint2 codes[kPerThread];
    tokens.write(static_cast<int8_t*>(p.v_dp), [&](int i) { return codes[i] = int8_codes(y[i], scale.inverse); });
    seen.template add_values<Rows::kThreadsPerToken>(codes, scale.scale);
  } else if (p.dp == DpFormat::kBf16) {
    tokens.write(static_cast<uint16_t*>(p.v_dp), [&](int i) {
      const uint4 words = halves(y[i], true);
      seen.template add_values<Rows::kThreadsPerToken>(words);
      return words;
    });
  }
  if (p.pv == PvFormat::kE4m3) turn_values(y, constants, channel, row, transposed, exceeded);
  if (p.pv == PvFormat::kE4m3 || p.pv == PvFormat::kInt8) {
    write_transposed(p, plane, at.tiles, tile_index, transposed, thread);
  }
}

// A tile's values once more, with other scales.
template <int kHeadDim, class Piece>
__device__ __forceinline__ void write_values_again(const QuantizeKvParams& p, const PlaneIndex& at, int tile,
                                                   const ChannelConstants<kHeadDim>& constants,
                                                   TransposedTile<kHeadDim>& transposed, ExceededValues<kHeadDim> exceeded) {
  using Rows = TokenThreads<kHeadDim>;
  const int row = Rows::row(), channel = Rows::channel();
  const PiOrder order(tile, row);
  Piece v[kPerThread];
  read_tokens(v, p.v, p.v_dtype, at, order, channel, p.shape);
  const bool has_bad = p.k_scale[at.plane * at.tiles + tile] < 0.0f;
  const int8_t* const first_codes = p.k8 + (at.plane * p.shape.keys + order.first) * kHeadDim;
  float mean[kChannels], y[kPerThread][kChannels];
  load_floats(mean, constants.value_mean + channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    bool used = PiOrder::distance(i) < at.valid - order.first;
    if (used && has_bad) used = first_codes[PiOrder::distance(i) * kHeadDim] != static_cast<int8_t>(kBadCodeByte);
    if (!used) v[i].clear();
    v[i].unpack(y[i]);
    if (p.pv == PvFormat::kE4m3) subtract(y[i], mean, used);
  }
  if (p.pv == PvFormat::kF16) {
    write_halves(p, y, constants, TokensAt(p, at.plane, order, channel, kHeadDim), channel, exceeded);
    return;
  }
  __syncthreads();  // the tile before has left
  turn_values(y, constants, channel, row, transposed, exceeded);
  write_transposed(p, at.plane, at.tiles, tile, transposed, static_cast<int>(threadIdx.x));
}

template <int kHeadDim>
struct CodesShared {
  static constexpr int kThreads = TokenThreads<kHeadDim>::kThreads;
  struct Tiles {
    TransposedTile<kHeadDim> transposed;
    LargestKeys<kThreads> seen;
  };
  union {
    SampleShared<kHeadDim> sample;  // before the first tile
    Tiles tiles;
  };
  ChannelConstants<kHeadDim> constants;
  Scratch<kThreads> scratch;
  uint32_t key_max[kHeadDim], value_max[kHeadDim];
};

// Writes means and scales, and hands them to the block; `over` is of a channel of K or V. All threads meet here.
template <int kHeadDim>
__device__ __forceinline__ void set_constants(const QuantizeKvParams& p, const PlaneIndex& at, const ChannelStatistics& over,
                                              CodesShared<kHeadDim>& shared) {
  const int c = static_cast<int>(threadIdx.x) % kHeadDim;
  const bool of_values = threadIdx.x >= kHeadDim;
  (of_values ? shared.constants.value_mean : shared.constants.key_mean)[c] = over.mean;
  if (at.share == 0) (of_values ? p.v_mean : p.k_mean)[at.plane * kHeadDim + c] = over.mean;
  if (of_values) {
    const GroupScale scale = value_scale(p, over.largest);
    shared.constants.inverse[c] = scale.inverse;
    if (at.share == 0 && p.pv != PvFormat::kInt8) p.v_scale[at.plane * kHeadDim + c] = scale.scale;
  }
  (of_values ? shared.value_max : shared.key_max)[c] = 0;
  __syncthreads();
}

// A block writes the codes of its tiles.
template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim, 256 / kHeadDim) write_codes(const QuantizeKvParams p) {
  using Rows = TokenThreads<kHeadDim>;
  __shared__ CodesShared<kHeadDim> shared;
  const int count = blocks_of_plane(p.shape);
  const PlaneIndex at(p, static_cast<int>(blockIdx.x), count);
  set_constants(p, at, sample_statistics<kHeadDim, Piece>(p, at, shared.sample), shared);
  auto& seen = shared.tiles.seen;
  seen.clear();
  TokenPairs<Piece> x;
  if (Piece::kReadsAhead) x.load(p, at, PiOrder(at.share, Rows::row()), Rows::channel());
  const ExceededValues<kHeadDim> exceeded(shared.value_max, p.v_range);
#pragma unroll 1
  for (int tile = at.share, turn = 0; tile < at.tiles; tile += count, turn ^= 1) {
    const int next = Piece::kReadsAhead ? tile + count : at.tiles;
    if (!Piece::kReadsAhead) x.load(p, at, PiOrder(tile, Rows::row()), Rows::channel());
    x.check(Rows(), at, PiOrder(tile, Rows::row()));
    write_tile<kHeadDim>(p, at, tile, next, x, shared.constants, shared.tiles.transposed, shared.scratch, turn, seen, exceeded);
  }
  const Partial partial(p.shape, p.workspace);
  const int64_t row = at.plane * count + at.share;
  const int c = static_cast<int>(threadIdx.x);
  if (p.dp != DpFormat::kNone) {
    // Since a tile's last use of `values` there has been a barrier.
    const float norm = block_max<Rows::kThreads>(seen.norms[ptx::opaque_thread()], shared.scratch.values);
    if (c == 0) partial.norm[row] = norm;
    float most[kChannels];
    seen.channel_maxima(most);
    gather_maxima(shared.key_max, most);
    if (c < kHeadDim) partial.key_max[row * kHeadDim + c] = bits_float(shared.key_max[c]);
  }
  if (!has_channel_scales(p.pv) || at.valid <= kSampledValues) return;
  __syncthreads();
  const float most = c < kHeadDim ? bits_float(shared.value_max[c]) : 0.0f;
  const bool any = __syncthreads_or(most > 0.0f) != 0;
  if (c == 0) partial.exceeded[row] = any;
  if (any && c < kHeadDim) partial.value_max[row * kHeadDim + c] = most;
}

// What the backward pass has to know of all tokens; and the codes of a head's values once more, with scales from the largest
// value, if one exceeded what the sample's scales are for.
template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim, 256 / kHeadDim) finish_codes(const QuantizeKvParams p) {
  __shared__ CodesShared<kHeadDim> shared;
  ptx::griddepcontrol_wait();
  const int count = blocks_of_plane(p.shape), thread = static_cast<int>(threadIdx.x);
  const PlaneIndex at(p, static_cast<int>(blockIdx.x), count);
  const Partial partial(p.shape, p.workspace);
  const int64_t first = at.plane * count;
  if (p.dp != DpFormat::kNone && at.share == 0 && thread < kHeadDim) {
    float most = 0.0f, norm = 0.0f;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      most = fmaxf(most, partial.key_max[(first + i) * kHeadDim + thread]);
      norm = fmaxf(norm, partial.norm[first + i]);
    }
    p.k_max[at.plane * kHeadDim + thread] = most;
    if (thread == 0) p.v_norm[at.plane] = norm;
  }
  if (!has_channel_scales(p.pv) || at.valid <= kSampledValues) return;
  bool any = false;
  for (int i = thread; i < count; i += 2 * kHeadDim) any |= partial.exceeded[first + i] != 0;
  if (!__syncthreads_or(any)) return;

  ChannelStatistics over = sample_statistics<kHeadDim, Piece>(p, at, shared.sample);
  for (int i = 0; i < count; ++i) {
    if (partial.exceeded[first + i] == 0) continue;
    over.largest = fmaxf(over.largest, partial.value_max[(first + i) * kHeadDim + thread % kHeadDim]);
  }
  set_constants(p, at, over, shared);
  const ExceededValues<kHeadDim> exceeded(shared.value_max, p.v_range);
#pragma unroll 1
  for (int tile = at.share; tile < at.tiles; tile += count) {
    write_values_again<kHeadDim, Piece>(p, at, tile, shared.constants, shared.tiles.transposed, exceeded);
  }
}

// --------------------------------------------------------------------------------------------
// launches

template <int kHeadDim, class Piece>
const char* start(const QuantizeKvParams& p, Stream stream) {
  const int64_t planes = static_cast<int64_t>(p.shape.batch) * p.shape.kv_heads, blocks = planes * blocks_of_plane(p.shape);
  if (blocks > INT32_MAX) return "batch · key heads is too large; split the batch";
  const dim3 grid(static_cast<unsigned>(blocks)), block(2 * kHeadDim);
  const char* error = launch(write_codes<kHeadDim, Piece>, grid, block, 0, stream, p);
  const bool may_exceed = has_channel_scales(p.pv) && p.shape.keys > kSampledValues;
  if (error != nullptr || (p.dp == DpFormat::kNone && !may_exceed)) return error;
  return launch(finish_codes<kHeadDim, Piece>, grid, block, 0, stream, p, Start::kEarly);
}

}  // namespace

size_t quantize_kv_workspace_bytes(const AttentionShape& shape) { return Partial::bytes(shape); }

const char* quantize_kv(const QuantizeKvParams& params, Stream stream) {
  return with_pieces(params.k_dtype, params.v_dtype, params.shape.head_dim, [&](auto piece) {
    using P = decltype(piece);
    switch (params.shape.padded_dim) {
      case 64:
        return start<64, P>(params, stream);
      case 128:
        return start<128, P>(params, stream);
      case 256:
        return start<256, P>(params, stream);
      default:
        return "the padded head dimension must be 64, 128 or 256";
    }
  });
}

}  // namespace sage
