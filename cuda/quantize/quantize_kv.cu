// Keys and values to 8 bits (docs/abi.md, section 1), bit for bit as the specification.
//
// Three launches, one per dependency: statistics of each tile of 64 tokens, their reduction over
// the sequence (means of K and V, largest |V - mean| per channel), and the codes. Where nothing runs
// over the sequence (no smoothing, V in bf16 or INT8), the last launch is the only one.
//
// Requirements: sums keep the order of docs/abi.md, and no operation is contracted or approximated
// (no --use_fast_math).
#include "common/launch.h"
#include "numerics/e4m3.h"
#include "quantize/key_tiles.cuh"

namespace sage {
namespace {

constexpr int kReduceRows = 32;  // partial results that a reducing block combines at once
constexpr float kBadZeroScale = -0x1p-126f;
constexpr uint32_t kBadCodeByte = 0x80;  // -128, in the first byte of a bad key's codes

// What the launches hand on to each other.
struct Statistics {
  float* key_sums;     // [B, K, S64, Hp]
  float* value_sums;   // [B, K, S64, Hp]
  float* value_max;    // [B, K, S64, Hp]; -inf where no token counts
  float* value_min;    // [B, K, S64, Hp]; inf where no token counts
  float* channel_max;  // [B, K, Hp]: of |V|, for e4m3 of |V - mean|
  int* used;           // [B, K, S64] tokens counted

  __host__ __device__ Statistics(const AttentionShape& s, void* workspace) {
    const int64_t tiles =
        static_cast<int64_t>(s.batch) * s.kv_heads * ((s.keys + kTileKeys - 1) / kTileKeys);
    key_sums = static_cast<float*>(workspace);
    value_sums = key_sums + tiles * s.padded_dim;
    value_max = value_sums + tiles * s.padded_dim;
    value_min = value_max + tiles * s.padded_dim;
    channel_max = value_min + tiles * s.padded_dim;
    used = reinterpret_cast<int*>(channel_max +
                                  static_cast<int64_t>(s.batch) * s.kv_heads * s.padded_dim);
  }
};

__host__ __device__ inline bool has_channel_scales(PvFormat pv) {
  return pv == PvFormat::kE4m3 || pv == PvFormat::kF16;
}

// ---------------------------------------------------------------------- statistics of a tile of
// tokens

template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim) tile_statistics(const QuantizeKvParams p) {
  using Rows = RowBlock<kHeadDim>;
  __shared__ float rows[2][16][kHeadDim];  // sums of K and of V; then maxima of V and of -V
  __shared__ int used_tokens[16];
  const TileIndex at(p, false);
  const int row = Rows::row(), channel = Rows::channel();
  const int first = at.tile * kTileKeys + row;
  const TokenPairs<Piece> x(Rows(), p, at, [&](int i) { return first + 16 * i; });

  // Tokens row, row + 16, row + 32, row + 48: the first two halvings of the tile happen here.
  float y[kPerThread][kChannels];
#pragma unroll
  for (int tensor = 0; tensor < 2; ++tensor) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) x.unpack(tensor == 0 ? x.k[i] : x.v[i], i, y[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      rows[tensor][row][channel + c] = (y[0][c] + y[2][c]) + (y[1][c] + y[3][c]);
    }
  }
  if (channel == 0) used_tokens[row] = x.used[0] + x.used[1] + x.used[2] + x.used[3];
  __syncthreads();

  const Statistics out(p.shape, p.workspace);
  const int64_t tile = at.plane * at.tiles + at.tile;
  const int c = static_cast<int>(threadIdx.x) % kHeadDim;  // two threads a channel
  const int tensor = static_cast<int>(threadIdx.x) / kHeadDim;
  float z[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) z[i] = rows[tensor][i][c];
#pragma unroll
  for (int half = 8; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) z[i] += z[i + half];
  }
  (tensor == 0 ? out.key_sums : out.value_sums)[tile * kHeadDim + c] = z[0];
  __syncthreads();

#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    float largest = -INFINITY, smallest = INFINITY;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      largest = x.used[i] ? fmaxf(largest, y[i][k]) : largest;
      smallest = x.used[i] ? fminf(smallest, y[i][k]) : smallest;
    }
    rows[0][row][channel + k] = largest;
    rows[1][row][channel + k] = -smallest;
  }
  __syncthreads();
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = fmaxf(largest, rows[tensor][i][c]);
  (tensor == 0 ? out.value_max : out.value_min)[tile * kHeadDim + c] =
      tensor == 0 ? largest : -largest;
  if (threadIdx.x == 0) {
    int total = 0;
    for (int i = 0; i < 16; ++i) total += used_tokens[i];
    out.used[tile] = total;
  }
}

// ------------------------------------------------------------------------ reduction over the
// sequence

// A block reduces 32 channels of one (batch, key head) over all tiles. Sums fold the upper half of
// the tiles onto the lower half, in place, until one is left.
__global__ void __launch_bounds__(kReduceRows * 32, 1) reduce_statistics(const QuantizeKvParams p) {
  __shared__ float maxima[kReduceRows][32], minima[kReduceRows][32];
  __shared__ int counts[kReduceRows];
  const Statistics in(p.shape, p.workspace);
  const int width = p.shape.padded_dim, tiles = (p.shape.keys + kTileKeys - 1) / kTileKeys;
  const int64_t plane = blockIdx.x / (width / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32;
  const int channel = static_cast<int>(blockIdx.x) % (width / 32) * 32 + lane;
  const int64_t first = plane * tiles * width + channel;
  float *key_sums = in.key_sums + first, *value_sums = in.value_sums + first;
  const float *tile_max = in.value_max + first, *tile_min = in.value_min + first;

  float largest = -INFINITY, smallest = INFINITY;
  for (int i = row; i < tiles; i += kReduceRows) {
    largest = fmaxf(largest, tile_max[static_cast<int64_t>(i) * width]);
    smallest = fminf(smallest, tile_min[static_cast<int64_t>(i) * width]);
  }
  maxima[row][lane] = largest;
  minima[row][lane] = smallest;
  int used = 0;
  for (int i = static_cast<int>(threadIdx.x); i < tiles; i += kReduceRows * 32) {
    used += in.used[plane * tiles + i];
  }
  for (int step = 16; step > 0; step /= 2) used += __shfl_xor_sync(kFullWarp, used, step);
  if (lane == 0) counts[row] = used;

  int half = 1;
  while (2 * half < tiles) half *= 2;
  if (tiles == 1) half = 0;
  for (int length = tiles; half > 0; length = half, half /= 2) {
    for (int i = row; i < half; i += kReduceRows) {
      const bool paired = i + half < length;
      const int64_t lower = static_cast<int64_t>(i) * width;
      const int64_t upper = static_cast<int64_t>(i + half) * width;
      key_sums[lower] += paired ? key_sums[upper] : 0.0f;
      value_sums[lower] += paired ? value_sums[upper] : 0.0f;
    }
    __syncthreads();
  }
  __syncthreads();
  if (row != 0) return;

  int total = 0;
  for (int i = 0; i < kReduceRows; ++i) {
    largest = fmaxf(largest, maxima[i][lane]);
    smallest = fminf(smallest, minima[i][lane]);
    total += counts[i];
  }
  const int64_t at = plane * width + channel;
  const float reciprocal = 1.0f / static_cast<float>(max(total, 1));
  const auto mean = [&](float sum) { return bf16_value(bf16_bits(sum * reciprocal)); };
  const float value_mean = p.smooth_v ? mean(value_sums[0]) : 0.0f;
  p.k_mean[at] = p.smooth_k ? mean(key_sums[0]) : 0.0f;
  p.v_mean[at] = value_mean;
  // Rounding keeps order: this is the largest of the rounded |v - mean|.
  const float removed = p.pv == PvFormat::kE4m3 ? value_mean : 0.0f;
  in.channel_max[at] = fmaxf(0.0f, fmaxf(largest - removed, removed - smallest));
}

// ----------------------------------------------------------------------------------------------
// codes

// 2^-floor(log2 a) and its inverse for V in f16.
__device__ __forceinline__ GroupScale power_scale(float largest) {
  if (largest < kTinyAmax) return {0.0f, 0.0f};
  const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
  return {power_of_two(exponent), power_of_two(-exponent)};
}

__device__ __forceinline__ GroupScale channel_scale(const QuantizeKvParams& p, float largest) {
  if (p.pv == PvFormat::kE4m3) return group_scale(largest, p.v_range);
  if (p.pv == PvFormat::kF16) return power_scale(largest);
  return {1.0f, 1.0f};
}

// The scale of the block's tokens and channels as one INT8 group.
template <class Rows>
__device__ __forceinline__ GroupScale tile_scale(const float (&x)[kPerThread][kChannels],
                                                 float* scratch) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) largest = fmaxf(largest, largest_magnitude(x[i]));
  return group_scale(block_max<Rows::kThreads>(largest, scratch), 127.0f);
}

template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim) write_codes(const QuantizeKvParams p) {
  using Rows = RowBlock<kHeadDim>;
  __shared__ TransposedTile<kHeadDim> transposed;
  __shared__ float scratch[3][Rows::kThreads / kWarpSize];
  const TileIndex at(p, true);
  const int keys = p.shape.keys, row = Rows::row(), channel = Rows::channel();
  const int64_t tile = at.plane * at.tiles + at.tile;
  const int64_t channels = at.plane * kHeadDim + channel;  // where this thread's channels lie

  // Row r of 16 holds the tokens that `pi` stores as word r of a channel: 2q, 2q+1, 8+2q, 9+2q of
  // the group of 16 tokens r / 4, with q = r % 4.
  const int first = at.tile * kTileKeys + row / 4 * 16 + row % 4 * 2;
  const auto token = [&](int i) { return first + i % 2 + i / 2 * 8; };
  const TokenPairs<Piece> x(Rows(), p, at, token);
  const bool bad_tile = __syncthreads_or(x.bad != 0);
  // Calls write(i, element) for the thread's tokens, `element` counting in [B, K, S, Hp].
  const auto write_tokens = [&](auto write) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (token(i) < keys) write(i, (at.plane * keys + token(i)) * kHeadDim + channel);
    }
  };
  float y[kPerThread][kChannels];

  // -------------------------------------------------------------------------------------------
  // keys
  float mean[kChannels] = {};
  if (p.smooth_k) load_floats(mean, p.k_mean + channels);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    x.k[i].unpack(y[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) y[i][c] = x.used[i] ? y[i][c] - mean[c] : 0.0f;
  }
  const GroupScale key_scale = tile_scale<Rows>(y, scratch[0]);
  write_tokens([&](int i, int64_t element) {
    uint2 codes = int8_codes(y[i], key_scale.inverse);
    if ((x.bad >> i & 1) && channel == 0) codes.x = (codes.x & ~0xffu) | kBadCodeByte;
    *reinterpret_cast<uint2*>(p.k8 + element) = codes;
  });
  if (threadIdx.x == 0) {
    const float negated = key_scale.scale == 0.0f ? kBadZeroScale : -key_scale.scale;
    p.k_scale[tile] = bad_tile ? negated : key_scale.scale;
  }

  // -----------------------------------------------------------------------------------------
  // values
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) x.unpack(x.v[i], i, y[i]);
  if (at.tile == 0 && row == 0) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (!p.smooth_k) p.k_mean[channels + c] = 0.0f;
      if (!p.smooth_v) p.v_mean[channels + c] = 0.0f;
    }
  }
  float inverse[kChannels];
  // The thread's channel scales, which the first tile's threads write down.
  const auto scale_channels = [&] {
    float largest[kChannels] = {};
    if (has_channel_scales(p.pv)) {
      load_floats(largest, Statistics(p.shape, p.workspace).channel_max + channels);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const GroupScale scale = channel_scale(p, largest[c]);
      inverse[c] = scale.inverse;
      if (at.tile == 0 && row == 0) p.v_scale[channels + c] = scale.scale;
    }
  };
  if (p.pv == PvFormat::kF16 || p.pv == PvFormat::kBf16) {
    scale_channels();
    write_tokens([&](int i, int64_t element) {
      float scaled[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) scaled[c] = y[i][c] * inverse[c];
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.v_pv) + element) =
          halves(scaled, p.pv == PvFormat::kBf16);
    });
  } else if (p.pv == PvFormat::kInt8) {
    const GroupScale scale = tile_scale<Rows>(y, scratch[1]);
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
    load_floats(mean, p.v_mean + channels);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) y[i][c] = x.used[i] ? y[i][c] - mean[c] : 0.0f;
    }
  }
  if (p.dp == DpFormat::kInt8) {
    const GroupScale scale = tile_scale<Rows>(y, scratch[2]);
    if (threadIdx.x == 0) p.v_dp_scale[tile] = scale.scale;
    write_tokens([&](int i, int64_t element) {
      *reinterpret_cast<uint2*>(static_cast<int8_t*>(p.v_dp) + element) =
          int8_codes(y[i], scale.inverse);
    });
  } else if (p.dp == DpFormat::kBf16) {
    write_tokens([&](int i, int64_t element) {
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.v_dp) + element) = halves(y[i], true);
    });
  }
  if (p.pv == PvFormat::kE4m3) {
    scale_channels();
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
      static_cast<uint8_t*>(p.v_pv) + at.plane * kHeadDim * padded_keys + at.tile * kTileKeys,
      padded_keys);
}

// --------------------------------------------------------------------------------------------
// launches

template <int kHeadDim, class Piece>
const char* start(const QuantizeKvParams& p, Stream stream) {
  const int64_t planes = static_cast<int64_t>(p.shape.batch) * p.shape.kv_heads;
  const int64_t tiles = planes * ((p.shape.keys + kTileKeys - 1) / kTileKeys);
  if (tiles > INT32_MAX) return "batch · key heads · key length is too large; split the batch";
  const dim3 grid(static_cast<unsigned>(tiles)), block(2 * kHeadDim);
  const char* error = nullptr;
  if (p.smooth_k || p.smooth_v || has_channel_scales(p.pv)) {
    error = launch(tile_statistics<kHeadDim, Piece>, grid, block, 0, stream, p);
    if (error != nullptr) return error;
    const dim3 reduce_grid(static_cast<unsigned>(tiles > 0 ? planes * (kHeadDim / 32) : 0));
    error = launch(reduce_statistics, reduce_grid, dim3(kReduceRows * 32), 0, stream, p);
    if (error != nullptr) return error;
  }
  return launch(write_codes<kHeadDim, Piece>, grid, block, 0, stream, p);
}

}  // namespace

size_t quantize_kv_workspace_bytes(const AttentionShape& shape) {
  const size_t planes = static_cast<size_t>(shape.batch) * shape.kv_heads;
  const size_t tiles = planes * ((shape.keys + kTileKeys - 1) / kTileKeys);
  return sizeof(float) * (4 * tiles * shape.padded_dim + planes * shape.padded_dim) +
         sizeof(int) * tiles;
}

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
