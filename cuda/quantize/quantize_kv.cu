// Keys and values to 8 bits (docs/abi.md, section 1), bit for bit as the specification.
//
// Two launches: statistics over the sequence (means of K and V, largest |V - mean| per channel; strands.cuh), and the
// codes, with what the backward pass has to know of all of them. Where nothing runs over the sequence (no smoothing, V in
// bf16 or INT8; no keys), the first only clears the maxima, if there are any. The blocks of both stay, and read the next
// tile while they work on one.
//
// Requirements: sums keep the order of docs/abi.md, and no operation is contracted or approximated
// (no --use_fast_math).
#include <type_traits>

#include "common/launch.h"
#include "numerics/e4m3.h"
#include "quantize/strands.cuh"

namespace sage {
namespace {

constexpr float kBadZeroScale = -0x1p-126f;
constexpr uint32_t kBadCodeByte = 0x80;  // -128, in the first byte of a bad key's codes

__host__ __device__ inline bool has_channel_scales(PvFormat pv) {
  return pv == PvFormat::kE4m3 || pv == PvFormat::kF16;
}

__host__ __device__ inline bool runs_over_sequence(const QuantizeKvParams& p) {
  return p.smooth_k || p.smooth_v || has_channel_scales(p.pv);
}

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

// A tile of 64 tokens; reads tile `next`, if there is one, into x as its registers become free. `turn` alternates.
template <int kHeadDim, class Piece>
__device__ __forceinline__ void write_tile(const QuantizeKvParams& p, const PlaneIndex& at, int tile_index, int next,
                                           TokenPairs<Piece>& x,
                                           const ChannelConstants<kHeadDim>& constants,
                                           TransposedTile<kHeadDim>& transposed,
                                           Scratch<2 * kHeadDim>& scratch, int turn,
                                           LargestKeys<2 * kHeadDim>& seen) {
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
      for (int c = 0; c < kChannels; ++c) scaled[c] = y[i][c] * inverse[c];
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
      transposed.word(channel + c, row) =
          ptx::cvt_e4m3x4_f32(__fmul_rn(y[0][c], inverse[c]), __fmul_rn(y[1][c], inverse[c]),
                              __fmul_rn(y[2][c], inverse[c]), __fmul_rn(y[3][c], inverse[c]));
    }
  }
  if (p.pv != PvFormat::kE4m3 && p.pv != PvFormat::kInt8) return;
  __syncthreads();
  const int64_t padded_keys = static_cast<int64_t>(at.tiles) * kTileKeys;
  transposed.store(
      static_cast<uint8_t*>(p.v_pv) + plane * kHeadDim * padded_keys + tile_index * kTileKeys,
      padded_keys, thread);
}

// A block writes the tiles of a strand, the last that strand_statistics has read first: they may still lie in the L2
// cache.
template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim, 256 / kHeadDim) write_codes(const QuantizeKvParams p) {
  using Rows = RowBlock<kHeadDim>;
  __shared__ TransposedTile<kHeadDim> transposed;
  __shared__ ChannelConstants<kHeadDim> constants;
  __shared__ Scratch<Rows::kThreads> scratch;
  __shared__ uint32_t channel_max[kHeadDim];
  __shared__ LargestKeys<Rows::kThreads> seen;
  const int count = strands(p.shape);
  const PlaneIndex at(p, static_cast<int>(blockIdx.x), count);
  const StrandWalk walk(at, count);
  const int c = static_cast<int>(threadIdx.x) % kHeadDim;
  const bool of_values = threadIdx.x >= kHeadDim;
  ChannelStatistics over;
  if (runs_over_sequence(p)) over = ChannelStatistics(p, at.plane, c, of_values);
  (of_values ? constants.value_mean : constants.key_mean)[c] = over.mean;
  if (at.share == 0) (of_values ? p.v_mean : p.k_mean)[at.plane * kHeadDim + c] = over.mean;
  if (of_values) {
    const GroupScale scale = value_scale(p, over.largest);
    constants.inverse[c] = scale.inverse;
    if (at.share == 0 && p.pv != PvFormat::kInt8) p.v_scale[at.plane * kHeadDim + c] = scale.scale;
  }
  // The walk backwards, over tiles that exist.
  int visit = walk.count() - 1;
  while (walk.tile(visit) >= at.tiles) --visit;
  TokenPairs<Piece> x;
  if (Piece::kReadsAhead) x.load(p, at, PiOrder(walk.tile(visit), Rows::row()), Rows::channel());
  if (threadIdx.x < kHeadDim) channel_max[threadIdx.x] = 0;
  seen.clear();
  __syncthreads();
#pragma unroll 1
  for (int turn = 0; visit >= 0; turn ^= 1) {
    const int tile = walk.tile(visit);
    do {
      --visit;
    } while (visit >= 0 && walk.tile(visit) >= at.tiles);
    const int next = Piece::kReadsAhead && visit >= 0 ? walk.tile(visit) : at.tiles;
    if (!Piece::kReadsAhead) x.load(p, at, PiOrder(tile, Rows::row()), Rows::channel());
    x.check(Rows(), at, PiOrder(tile, Rows::row()));
    write_tile<kHeadDim>(p, at, tile, next, x, constants, transposed, scratch, turn, seen);
  }
  if (p.dp == DpFormat::kNone) return;
  // Since a tile's last use of `values` there has been a barrier.
  const float norm = block_max<Rows::kThreads>(seen.norms[ptx::opaque_thread()], scratch.values);
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<uint32_t*>(p.v_norm + at.plane), float_bits(norm));
  float most[kChannels];
  seen.channel_maxima(most);
  store_maxima<kHeadDim>(channel_max, most, p.k_max + at.plane * kHeadDim);
}

__global__ void __launch_bounds__(256) clear_all_largest(const QuantizeKvParams p) { clear_largest(p, blockIdx.x); }

// --------------------------------------------------------------------------------------------
// launches

template <int kHeadDim, class Piece>
const char* start(const QuantizeKvParams& p, Stream stream) {
  const int64_t planes = static_cast<int64_t>(p.shape.batch) * p.shape.kv_heads, blocks = planes * strands(p.shape);
  if (blocks > INT32_MAX) return "batch · key heads is too large; split the batch";
  const dim3 grid(static_cast<unsigned>(p.shape.keys > 0 ? blocks : 0)), block(2 * kHeadDim);
  if (tiles_of_keys(p.shape) > strands(p.shape) << kLevels) return "the key length is too large";
  const char* error = nullptr;
  if (runs_over_sequence(p) && p.shape.keys > 0) {
    auto* const statistics = counted_keys(p.shape) == Keys::kAll ? strand_statistics<kHeadDim, Piece, Keys::kAll>
                                                                 : strand_statistics<kHeadDim, Piece, Keys::kSample>;
    error = launch(statistics, grid, block, sizeof(StrandShared<kHeadDim>), stream, p);
  } else if (p.dp != DpFormat::kNone) {
    error = launch(clear_all_largest, dim3(static_cast<unsigned>(planes)), kHeadDim, 0, stream, p);
  }
  if (error != nullptr) return error;
  return launch(write_codes<kHeadDim, Piece>, grid, block, 0, stream, p);
}

}  // namespace

size_t quantize_kv_workspace_bytes(const AttentionShape& shape) { return Statistics::bytes(shape); }

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
