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
#include "numerics/e4m3.h"
#include "ptx/grid_dependency.cuh"
#include "quantize/sample.cuh"

namespace sage {
namespace {

constexpr float kBadZeroScale = -0x1p-126f;
constexpr uint32_t kBadCodeByte = 0x80;  // -128, in the first byte of a bad key's codes

constexpr int kBlockChannels = 256 * 128;  // of all blocks: two blocks on each of 128 multiprocessors

// Blocks that share the tiles of a (batch, key head): j of G takes tiles j, j + G, j + 2G, ... G depends on the shape alone,
// because it sizes the workspace.
__host__ __device__ inline int blocks_of_plane(const AttentionShape& s) {
  const int tiles = (s.keys + kTileKeys - 1) / kTileKeys;
  const int64_t channels = static_cast<int64_t>(s.batch) * s.kv_heads * s.padded_dim;
  return max(1, static_cast<int>(min(static_cast<int64_t>(tiles), kBlockChannels / max(channels, int64_t{1}))));
}

// What the blocks of the first launch hand on.
struct Partial {
  float* value_max;  // [B, K, G, Hp] the largest |V|, in e4m3 |V - mean|, where `exceeded`
  float* key_max;    // [B, K, G, Hp] with dp: the largest |K̂|
  float* norm;       // [B, K, G] with dp: the largest norm of a row of v_dp
  int* exceeded;     // [B, K, G] whether a value may be larger than what its channel's scale is for

  __host__ __device__ Partial(const AttentionShape& s, void* workspace) {
    const int64_t rows = static_cast<int64_t>(s.batch) * s.kv_heads * blocks_of_plane(s);
    value_max = static_cast<float*>(workspace);
    key_max = value_max + rows * s.padded_dim;
    norm = key_max + rows * s.padded_dim;
    exceeded = reinterpret_cast<int*>(norm + rows);
  }
  static size_t bytes(const AttentionShape& s) {
    const size_t rows = static_cast<size_t>(s.batch) * s.kv_heads * blocks_of_plane(s);
    return rows * (2 * sizeof(float) * s.padded_dim + sizeof(float) + sizeof(int));
  }
};

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

// What the backward pass scales its operands by: of the keys that a thread has seen the largest |K̂| of its channels, and the
// largest norm of a row of v_dp: of all rows of a warp, each lane has seen some. For the whole plane they are k_max and
// v_norm. In shared memory, because registers are few.
template <int kThreads>
struct LargestKeys {
  float4 channels[2][kThreads];
  float norms[kThreads];

  __device__ __forceinline__ void clear() {
    channels[0][threadIdx.x] = channels[1][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    norms[threadIdx.x] = 0.0f;
  }
  __device__ __forceinline__ void add_norm(float x) {
    float& norm = norms[ptx::opaque_thread()];
    norm = fmaxf(norm, x);
  }

  // Rounding keeps order: the largest code is that of the largest magnitude.
  __device__ __forceinline__ void add_keys(const float (&x)[kPerThread][kChannels], const GroupScale& scale) {
    const auto larger = [&](float seen, int c) {
      const float largest = fmaxf(fmaxf(fabsf(x[0][c]), fabsf(x[1][c])), fmaxf(fabsf(x[2][c]), fabsf(x[3][c])));
      return fmaxf(seen, nearest_integer(__fmul_rn(largest, scale.inverse)) * scale.scale);
    };
#pragma unroll
    for (int c = 0; c < kChannels; c += 4) {
      float4& most = channels[c / 4][ptx::opaque_thread()];
      most = make_float4(larger(most.x, c), larger(most.y, c + 1), larger(most.z, c + 2), larger(most.w, c + 3));
    }
  }
  __device__ __forceinline__ void channel_maxima(float (&most)[kChannels]) const {
    const float4 low = channels[0][threadIdx.x], high = channels[1][threadIdx.x];
    most[0] = low.x, most[1] = low.y, most[2] = low.z, most[3] = low.w;
    most[4] = high.x, most[5] = high.y, most[6] = high.z, most[7] = high.w;
  }
  template <int kLanes>
  __device__ __forceinline__ void add_values(const uint2 (&codes)[kPerThread], float scale) {
    float squares[kPerThread];  // below 2^22: exact
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int x = static_cast<int>(codes[i].x), y = static_cast<int>(codes[i].y);
      squares[i] = static_cast<float>(__dp4a(x, x, __dp4a(y, y, 0)));
    }
    add_norm(sqrtf(combine_lanes<kLanes>(squares, Add())) * scale);
  }
  // A token in bf16. Squares are taken relative to the largest entry, so that those of tiny values do not underflow.
  template <int kLanes>
  __device__ __forceinline__ void add_values(const uint4& words) {
    Piece<Dtype::kBf16> piece;
    piece.words = words;
    float x[kChannels];
    piece.unpack(x);
    const float largest = lanes_max<kLanes>(largest_magnitude(x));
    const float inverse = largest < kTinyAmax ? 0.0f : 1.0f / largest;
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sum = fmaf(x[c] * inverse, x[c] * inverse, sum);
    add_norm(largest * sqrtf(lanes_sum<kLanes>(sum)));
  }
};

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

// Marks values that may be larger than what their channels' scales are for: codes as large as that of `range`, which is
// rounded down here. The sum's highest bits say so.
struct ExceededCodes {
  uint32_t add, seen = 0;

  explicit __device__ __forceinline__ ExceededCodes(float range) : add((0x80u - e4m3_code(range * 0.999f)) * 0x01010101u) {}
  __device__ __forceinline__ void mark() { seen |= 0x80u; }
  __device__ __forceinline__ void look(uint32_t codes) { seen |= (codes & 0x7f7f7f7fu) + add; }
  __device__ __forceinline__ bool any() const { return (seen & 0x80808080u) != 0; }
};

// A tile of 64 tokens; reads tile `next`, if there is one, into x as its registers become free. `turn` alternates.
template <int kHeadDim, class Piece>
__device__ __forceinline__ void write_tile(const QuantizeKvParams& p, const PlaneIndex& at, int tile_index, int next,
                                           TokenPairs<Piece>& x,
                                           const ChannelConstants<kHeadDim>& constants,
                                           TransposedTile<kHeadDim>& transposed,
                                           Scratch<2 * kHeadDim>& scratch, int turn,
                                           LargestKeys<2 * kHeadDim>& seen, ExceededCodes& exceeded) {
  using Rows = RowBlock<kHeadDim>;
  // Lest addresses wait in registers for the next tile.
  const int thread = ptx::opaque_thread(), row = Rows::row(thread), channel = Rows::channel(thread);
  const int64_t plane = ptx::opaque(static_cast<int>(at.plane)), tile = plane * at.tiles + tile_index;
  const uint32_t bad = x.bad;
  bool used[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) used[i] = x.used[i];
  const PiOrder tokens(tile_index, row);
  const int left = p.shape.keys - tokens.first;
  const int64_t first = (plane * p.shape.keys + tokens.first) * kHeadDim + channel;
  // Writes value(i) for the thread's tokens to an array of [B, K, S, Hp].
  const auto write_tokens = [&](auto* array, auto value) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const auto words = value(i);
      if (PiOrder::distance(i) < left) {
        *reinterpret_cast<std::remove_const_t<decltype(words)>*>(array + first + PiOrder::distance(i) * kHeadDim) =
            words;
      }
    }
  };
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
  write_tokens(p.k8, [&](int i) {
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
  if (!Piece::kReadsAhead) x.read_again(p, at, tokens, channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) x.v[i].unpack(y[i]);
  if (next < at.tiles) x.load_values(p, at, PiOrder(next, row), channel);
  if (p.pv == PvFormat::kF16 || p.pv == PvFormat::kBf16) {
    float inverse[kChannels];
    load_floats(inverse, constants.inverse + channel);
    write_tokens(static_cast<uint16_t*>(p.v_pv), [&](int i) {
      float scaled[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        scaled[c] = y[i][c] * inverse[c];
        // The scale's largest value is between 1 and 2 of its units.
        if (p.pv == PvFormat::kF16 && fabsf(scaled[c]) >= 1.0f) exceeded.mark();
      }
      return halves(scaled, p.pv == PvFormat::kBf16);
    });
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
    write_tokens(static_cast<int8_t*>(p.v_dp), [&](int i) { return codes[i] = int8_codes(y[i], scale.inverse); });
    seen.template add_values<Rows::kThreadsPerToken>(codes, scale.scale);
  } else if (p.dp == DpFormat::kBf16) {
    write_tokens(static_cast<uint16_t*>(p.v_dp), [&](int i) {
      const uint4 words = halves(y[i], true);
      seen.template add_values<Rows::kThreadsPerToken>(words);
      return words;
    });
  }
  if (p.pv == PvFormat::kE4m3) {
    float inverse[kChannels];
    load_floats(inverse, constants.inverse + ptx::opaque(channel));
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const uint32_t codes = ptx::cvt_e4m3x4_f32(__fmul_rn(y[0][c], inverse[c]), __fmul_rn(y[1][c], inverse[c]),
                                                 __fmul_rn(y[2][c], inverse[c]), __fmul_rn(y[3][c], inverse[c]));
      exceeded.look(codes);
      transposed.word(channel + c, row) = codes;
    }
  }
  if (p.pv != PvFormat::kE4m3 && p.pv != PvFormat::kInt8) return;
  __syncthreads();
  const int64_t padded_keys = static_cast<int64_t>(at.tiles) * kTileKeys;
  transposed.store(
      static_cast<uint8_t*>(p.v_pv) + plane * kHeadDim * padded_keys + tile_index * kTileKeys,
      padded_keys, thread);
}

template <int kHeadDim>
struct CodesShared {
  static constexpr int kThreads = RowBlock<kHeadDim>::kThreads;
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
  uint32_t channel_max[kHeadDim];
};

// Clears the block's maxima of its channels for another use.
template <int kHeadDim>
__device__ __forceinline__ void clear_maxima(uint32_t (&channel_max)[kHeadDim]) {
  __syncthreads();
  if (threadIdx.x < kHeadDim) channel_max[threadIdx.x] = 0;
  __syncthreads();
}

// The largest values of a block's tokens, to `out`. Reads them again.
template <int kHeadDim, class Piece>
__device__ __forceinline__ void store_value_maxima(const QuantizeKvParams& p, const PlaneIndex& at, int count,
                                                   CodesShared<kHeadDim>& shared, float* out) {
  using Rows = RowBlock<kHeadDim>;
  float mean[kChannels], most[kChannels] = {};
  load_floats(mean, shared.constants.value_mean + Rows::channel());
#pragma unroll 1
  for (int tile = at.share; tile < at.tiles; tile += count) {
    const TokenPairs<Piece> x(Rows(), p, at, PiOrder(tile, Rows::row()));
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      float y[kChannels];
      x.v[i].unpack(y);
      if (p.pv == PvFormat::kE4m3) subtract(y, mean, x.used[i]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) most[c] = fmaxf(most[c], fabsf(y[c]));
    }
  }
  clear_maxima(shared.channel_max);
  gather_maxima(shared.channel_max, most);
  if (threadIdx.x < kHeadDim) out[threadIdx.x] = bits_float(shared.channel_max[threadIdx.x]);
}

// Codes and scales of a block's tiles. kAgain: what exceeded its channel's scale in the first launch counts.
template <int kHeadDim, class Piece, bool kAgain>
__device__ __forceinline__ void write_tiles(const QuantizeKvParams& p, const PlaneIndex& at, int count,
                                            CodesShared<kHeadDim>& shared) {
  using Rows = RowBlock<kHeadDim>;
  const Partial partial(p.shape, p.workspace);
  const int c = static_cast<int>(threadIdx.x) % kHeadDim;
  const bool of_values = threadIdx.x >= kHeadDim;
  auto& constants = shared.constants;
  ChannelStatistics over = sample_statistics<kHeadDim, Piece>(p, at, shared.sample);
  if (kAgain && of_values) {
    for (int i = 0; i < count; ++i) {
      const int64_t row = at.plane * count + i;
      if (partial.exceeded[row]) over.largest = fmaxf(over.largest, partial.value_max[row * kHeadDim + c]);
    }
  }
  (of_values ? constants.value_mean : constants.key_mean)[c] = over.mean;
  if (at.share == 0) (of_values ? p.v_mean : p.k_mean)[at.plane * kHeadDim + c] = over.mean;
  if (of_values) {
    const GroupScale scale = value_scale(p, over.largest);
    constants.inverse[c] = scale.inverse;
    if (at.share == 0 && p.pv != PvFormat::kInt8) p.v_scale[at.plane * kHeadDim + c] = scale.scale;
  }
  clear_maxima(shared.channel_max);  // after which the sample's memory is free
  shared.tiles.seen.clear();
  TokenPairs<Piece> x;
  if (Piece::kReadsAhead) x.load(p, at, PiOrder(at.share, Rows::row()), Rows::channel());
  ExceededCodes exceeded(p.v_range);
#pragma unroll 1
  for (int tile = at.share, turn = 0; tile < at.tiles; tile += count, turn ^= 1) {
    const int next = Piece::kReadsAhead ? tile + count : at.tiles;
    if (!Piece::kReadsAhead) x.load(p, at, PiOrder(tile, Rows::row()), Rows::channel());
    x.check(Rows(), at, PiOrder(tile, Rows::row()));
    write_tile<kHeadDim>(p, at, tile, next, x, constants, shared.tiles.transposed, shared.scratch, turn, shared.tiles.seen,
                         exceeded);
  }
  if (kAgain) return;
  const int64_t row = at.plane * count + at.share;
  if (p.dp != DpFormat::kNone) {
    // Since a tile's last use of `values` there has been a barrier.
    const float norm = block_max<Rows::kThreads>(shared.tiles.seen.norms[ptx::opaque_thread()], shared.scratch.values);
    if (threadIdx.x == 0) partial.norm[row] = norm;
    float most[kChannels];
    shared.tiles.seen.channel_maxima(most);
    gather_maxima(shared.channel_max, most);
    if (threadIdx.x < kHeadDim) partial.key_max[row * kHeadDim + threadIdx.x] = bits_float(shared.channel_max[threadIdx.x]);
  }
  if (!has_channel_scales(p.pv) || at.valid <= kSampledValues) return;
  const bool any = __syncthreads_or(exceeded.any()) != 0;
  if (threadIdx.x == 0) partial.exceeded[row] = any;
  if (any) store_value_maxima<kHeadDim, Piece>(p, at, count, shared, partial.value_max + row * kHeadDim);
}

template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim, 256 / kHeadDim) write_codes(const QuantizeKvParams p) {
  __shared__ CodesShared<kHeadDim> shared;
  const int count = blocks_of_plane(p.shape);
  write_tiles<kHeadDim, Piece, false>(p, PlaneIndex(p, static_cast<int>(blockIdx.x), count), count, shared);
}

// What the backward pass has to know of all tokens; and codes once more, with a scale from the largest value, for a head in
// which a value exceeded what the sample's scale is for.
template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim, 256 / kHeadDim) finish_codes(const QuantizeKvParams p) {
  __shared__ CodesShared<kHeadDim> shared;
  ptx::griddepcontrol_wait();
  const int count = blocks_of_plane(p.shape), thread = static_cast<int>(threadIdx.x);
  const PlaneIndex at(p, static_cast<int>(blockIdx.x), count);
  const Partial partial(p.shape, p.workspace);
  const int64_t first = at.plane * count;
  if (p.dp != DpFormat::kNone && at.share == 0) {
    float most = 0.0f, norm = 0.0f;
    if (thread < kHeadDim) {
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        most = fmaxf(most, partial.key_max[(first + i) * kHeadDim + thread]);
        norm = fmaxf(norm, partial.norm[first + i]);
      }
      p.k_max[at.plane * kHeadDim + thread] = most;
      if (thread == 0) p.v_norm[at.plane] = norm;
    }
  }
  if (!has_channel_scales(p.pv) || at.valid <= kSampledValues) return;
  bool any = false;
  for (int i = thread; i < count; i += 2 * kHeadDim) any |= partial.exceeded[first + i] != 0;
  if (__syncthreads_or(any)) write_tiles<kHeadDim, Piece, true>(p, at, count, shared);
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
