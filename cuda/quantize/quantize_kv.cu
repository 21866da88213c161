// Keys and values to 8 bits (docs/abi.md, section 1), bit for bit as the specification.
//
// Three launches, one per dependency: statistics of each tile of 64 tokens, their reduction over
// the sequence (mean of K, largest |V| per channel), and the codes. Where nothing runs over the
// sequence (no smoothing, V in bf16 or INT8), the last launch is the only one.
//
// Requirements: sums keep the order of docs/abi.md, and no operation is contracted or approximated
// (no --use_fast_math).
#include "common/launch.h"
#include "numerics/e4m3.h"
#include "quantize/rows.cuh"

namespace sage {
namespace {

constexpr int kPerThread = kTileKeys / 16;  // tokens a thread holds
constexpr int kReduceRows = 32;  // partial results that a reducing block combines at once
constexpr float kBadZeroScale = -0x1p-126f;
constexpr uint32_t kBadCodeByte = 0x80;  // -128, in the first byte of a bad key's codes

// What the launches hand on to each other.
struct Statistics {
  float* key_sums;     // [B, K, S64, Hp]
  float* value_max;    // [B, K, S64, Hp]
  float* channel_max;  // [B, K, Hp]
  int* used;           // [B, K, S64] tokens counted

  __host__ __device__ Statistics(const AttentionShape& s, void* workspace) {
    const int64_t tiles =
        static_cast<int64_t>(s.batch) * s.kv_heads * ((s.keys + kTileKeys - 1) / kTileKeys);
    key_sums = static_cast<float*>(workspace);
    value_max = key_sums + tiles * s.padded_dim;
    channel_max = value_max + tiles * s.padded_dim;
    used = reinterpret_cast<int*>(channel_max +
                                  static_cast<int64_t>(s.batch) * s.kv_heads * s.padded_dim);
  }
};

bool has_channel_scales(PvFormat pv) { return pv == PvFormat::kE4m3 || pv == PvFormat::kF16; }

// A block's tile of 64 tokens of one (batch, key head).
struct TileIndex {
  int tile, tiles, head, b, valid;
  int64_t plane;

  __device__ explicit TileIndex(const QuantizeKvParams& p) {
    const int block = static_cast<int>(blockIdx.x);
    tiles = (p.shape.keys + kTileKeys - 1) / kTileKeys;
    tile = block % tiles;
    head = block / tiles % p.shape.kv_heads;
    b = block / tiles / p.shape.kv_heads;
    valid = min(p.bounds[3 * static_cast<int64_t>(b) + 1], p.shape.keys);
    plane = static_cast<int64_t>(b) * p.shape.kv_heads + head;
  }
};

// Eight channels of one token of K and V. `used` tokens are valid and finite; others read as zero.
struct TokenPair {
  float k[kChannels], v[kChannels];
  bool used, bad;

  template <class Rows>
  __device__ __forceinline__ void load(const QuantizeKvParams& p, const TileIndex& at, int token) {
    const AttentionShape& s = p.shape;
    const int64_t row =
        ((static_cast<int64_t>(at.b) * s.keys + token) * s.kv_heads + at.head) * s.head_dim;
    const bool valid = token < at.valid;
    if (valid) {
      load_channels(k, p.k, p.k_dtype, row, Rows::channel(), s.head_dim);
      load_channels(v, p.v, p.v_dtype, row, Rows::channel(), s.head_dim);
    }
    const bool finite =
        whole_token<Rows::kThreadsPerToken>(!valid || (all_finite(k) && all_finite(v)));
    used = valid && finite;
    bad = valid && !finite;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      k[c] = used ? k[c] : 0.0f;
      v[c] = used ? v[c] : 0.0f;
    }
  }
};

// ---------------------------------------------------------------------- statistics of a tile of
// tokens

template <int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim) tile_statistics(const QuantizeKvParams p) {
  using Rows = RowBlock<kHeadDim>;
  __shared__ float sums[16][kHeadDim], maxima[16][kHeadDim];
  __shared__ int used_tokens[16];
  const TileIndex at(p);
  const int row = Rows::row(), channel = Rows::channel();

  TokenPair x[kPerThread];
  int used = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    x[i].load<Rows>(p, at, at.tile * kTileKeys + row + 16 * i);
    used += x[i].used;
  }
  // Tokens row, row + 16, row + 32, row + 48: the first two halvings of the tile happen here.
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    sums[row][channel + c] = (x[0].k[c] + x[2].k[c]) + (x[1].k[c] + x[3].k[c]);
    maxima[row][channel + c] =
        fmaxf(fmaxf(fabsf(x[0].v[c]), fabsf(x[1].v[c])), fmaxf(fabsf(x[2].v[c]), fabsf(x[3].v[c])));
  }
  if (channel == 0) used_tokens[row] = used;
  __syncthreads();

  const Statistics out(p.shape, p.workspace);
  const int64_t tile = at.plane * at.tiles + at.tile;
  for (int c = static_cast<int>(threadIdx.x); c < kHeadDim; c += Rows::kThreads) {
    float y[16], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      y[i] = sums[i][c];
      largest = fmaxf(largest, maxima[i][c]);
    }
#pragma unroll
    for (int half = 8; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) y[i] += y[i + half];
    }
    out.key_sums[tile * kHeadDim + c] = y[0];
    out.value_max[tile * kHeadDim + c] = largest;
  }
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
  __shared__ float maxima[kReduceRows][32];
  __shared__ int counts[kReduceRows];
  const Statistics in(p.shape, p.workspace);
  const int width = p.shape.padded_dim, tiles = (p.shape.keys + kTileKeys - 1) / kTileKeys;
  const int64_t plane = blockIdx.x / (width / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32;
  const int channel = static_cast<int>(blockIdx.x) % (width / 32) * 32 + lane;
  float* sums = in.key_sums + plane * tiles * width + channel;
  const float* tile_max = in.value_max + plane * tiles * width + channel;

  float largest = 0.0f;
  for (int i = row; i < tiles; i += kReduceRows) {
    largest = fmaxf(largest, tile_max[static_cast<int64_t>(i) * width]);
  }
  maxima[row][lane] = largest;
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
      const float upper = i + half < length ? sums[static_cast<int64_t>(i + half) * width] : 0.0f;
      sums[static_cast<int64_t>(i) * width] += upper;
    }
    __syncthreads();
  }
  __syncthreads();
  if (row != 0) return;

  int total = 0;
  for (int i = 0; i < kReduceRows; ++i) {
    largest = fmaxf(largest, maxima[i][lane]);
    total += counts[i];
  }
  const int64_t at = plane * width + channel;
  const float reciprocal = 1.0f / static_cast<float>(max(total, 1));
  p.k_mean[at] = p.smooth_k ? bf16_value(bf16_bits(sums[0] * reciprocal)) : 0.0f;
  in.channel_max[at] = largest;
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

// Eight values as f16 or bf16, lowest channel first.
__device__ __forceinline__ uint4 halves(const float (&x)[kChannels], bool bf16) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = x[2 * i], high = x[2 * i + 1];
    words[i] = bf16 ? bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16
                    : f16_bits(low) | static_cast<uint32_t>(f16_bits(high)) << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A tile of V's codes on its way to [channels][tokens]: words of four tokens, 16-byte chunks
// swizzled so that neighbouring threads, eight channels apart, write to different banks.
template <int kHeadDim>
struct TransposedTile {
  alignas(16) uint32_t words[kHeadDim][kTileKeys / 4];

  static __device__ int chunk(int channel, int chunk) { return chunk ^ (channel / kChannels & 3); }

  __device__ uint32_t& word(int channel, int index) {
    return words[channel][chunk(channel, index / 4) * 4 + index % 4];
  }

  // Copies the tile to columns [column, column + 64) of a matrix of rows `stride` bytes apart.
  __device__ void store(uint8_t* out, int64_t stride) const {
    for (int i = static_cast<int>(threadIdx.x); i < kHeadDim * 4; i += 2 * kHeadDim) {
      const uint32_t* from = &words[i / 4][chunk(i / 4, i % 4) * 4];
      *reinterpret_cast<uint4*>(out + i / 4 * stride + i % 4 * 16) =
          make_uint4(from[0], from[1], from[2], from[3]);
    }
  }
};

template <int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim) write_codes(const QuantizeKvParams p) {
  using Rows = RowBlock<kHeadDim>;
  __shared__ TransposedTile<kHeadDim> transposed;
  __shared__ float scratch_k[Rows::kThreads / kWarpSize], scratch_v[Rows::kThreads / kWarpSize];
  const TileIndex at(p);
  const int keys = p.shape.keys, row = Rows::row(), channel = Rows::channel();
  const int64_t tile = at.plane * at.tiles + at.tile;
  const int64_t channels = at.plane * kHeadDim + channel;  // where this thread's channels lie

  // Row r of 16 holds the tokens that `pi` stores as word r of a channel: 2q, 2q+1, 8+2q, 9+2q of
  // the group of 16 tokens r / 4, with q = r % 4.
  const int first = at.tile * kTileKeys + row / 4 * 16 + row % 4 * 2;
  const auto token = [&](int i) { return first + i % 2 + i / 2 * 8; };
  TokenPair x[kPerThread];
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    x[i].load<Rows>(p, at, token(i));
    bad = bad || x[i].bad;
  }
  const bool bad_tile = __syncthreads_or(bad);

  // -------------------------------------------------------------------------------------------
  // keys
  float mean[kChannels] = {};
  if (p.smooth_k) load_channels(mean, p.k_mean, Dtype::kF32, channels, 0, kHeadDim);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x[i].k[c] = x[i].used ? x[i].k[c] - mean[c] : 0.0f;
    largest = fmaxf(largest, largest_magnitude(x[i].k));
  }
  const GroupScale key_scale = group_scale(block_max<Rows::kThreads>(largest, scratch_k), 127.0f);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    uint2 codes = int8_codes(x[i].k, key_scale.inverse);
    if (x[i].bad && channel == 0) codes.x = (codes.x & ~0xffu) | kBadCodeByte;
    if (token(i) >= keys) continue;
    *reinterpret_cast<uint2*>(p.k8 + (at.plane * keys + token(i)) * kHeadDim + channel) = codes;
  }
  if (threadIdx.x == 0) {
    const float negated = key_scale.scale == 0.0f ? kBadZeroScale : -key_scale.scale;
    p.k_scale[tile] = bad_tile ? negated : key_scale.scale;
  }

  // -----------------------------------------------------------------------------------------
  // values
  const bool int8_values = p.pv == PvFormat::kInt8 || p.dp == DpFormat::kInt8;
  GroupScale tile_scale = {0.0f, 0.0f};
  if (int8_values) {
    largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) largest = fmaxf(largest, largest_magnitude(x[i].v));
    tile_scale = group_scale(block_max<Rows::kThreads>(largest, scratch_v), 127.0f);
    if (threadIdx.x == 0) {
      if (p.pv == PvFormat::kInt8) p.v_scale[tile] = tile_scale.scale;
      if (p.dp == DpFormat::kInt8) p.v_dp_scale[tile] = tile_scale.scale;
    }
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t element = (at.plane * keys + token(i)) * kHeadDim + channel;
    if (token(i) >= keys || p.dp == DpFormat::kNone) continue;
    if (p.dp == DpFormat::kInt8) {
      *reinterpret_cast<uint2*>(static_cast<int8_t*>(p.v_dp) + element) =
          int8_codes(x[i].v, tile_scale.inverse);
    } else {
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.v_dp) + element) = halves(x[i].v, true);
    }
  }

  float inverse[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float channel_max = 0.0f;
    if (p.pv == PvFormat::kE4m3 || p.pv == PvFormat::kF16) {
      channel_max = Statistics(p.shape, p.workspace).channel_max[channels + c];
    }
    const GroupScale scale = channel_scale(p, channel_max);
    inverse[c] = p.pv == PvFormat::kInt8 ? tile_scale.inverse : scale.inverse;
    if (at.tile == 0 && row == 0) {
      if (p.pv != PvFormat::kInt8) p.v_scale[channels + c] = scale.scale;
      if (!p.smooth_k) p.k_mean[channels + c] = 0.0f;
    }
  }
  if (p.pv == PvFormat::kF16 || p.pv == PvFormat::kBf16) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (token(i) >= keys) continue;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) x[i].v[c] *= inverse[c];
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.v_pv) +
                                (at.plane * keys + token(i)) * kHeadDim + channel) =
          halves(x[i].v, p.pv == PvFormat::kBf16);
    }
    return;
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float v = x[i].v[c];
      const uint8_t code = p.pv == PvFormat::kE4m3 ? e4m3_code(v * inverse[c])
                                                   : static_cast<uint8_t>(int8_code(v, inverse[c]));
      word |= static_cast<uint32_t>(code) << (8 * i);
    }
    transposed.word(channel + c, row) = word;
  }
  __syncthreads();
  const int64_t padded_keys = static_cast<int64_t>(at.tiles) * kTileKeys;
  transposed.store(
      static_cast<uint8_t*>(p.v_pv) + at.plane * kHeadDim * padded_keys + at.tile * kTileKeys,
      padded_keys);
}

// --------------------------------------------------------------------------------------------
// launches

template <int kHeadDim>
const char* start(const QuantizeKvParams& p, Stream stream) {
  const int64_t planes = static_cast<int64_t>(p.shape.batch) * p.shape.kv_heads;
  const int64_t tiles = planes * ((p.shape.keys + kTileKeys - 1) / kTileKeys);
  if (tiles > INT32_MAX) return "batch · key heads · key length is too large; split the batch";
  const dim3 grid(static_cast<unsigned>(tiles)), block(2 * kHeadDim);
  const char* error = nullptr;
  if (p.smooth_k || has_channel_scales(p.pv)) {
    error = launch(tile_statistics<kHeadDim>, grid, block, 0, stream, p);
    if (error != nullptr) return error;
    const dim3 reduce_grid(static_cast<unsigned>(tiles > 0 ? planes * (kHeadDim / 32) : 0));
    error = launch(reduce_statistics, reduce_grid, dim3(kReduceRows * 32), 0, stream, p);
    if (error != nullptr) return error;
  }
  return launch(write_codes<kHeadDim>, grid, block, 0, stream, p);
}

}  // namespace

size_t quantize_kv_workspace_bytes(const AttentionShape& shape) {
  const size_t planes = static_cast<size_t>(shape.batch) * shape.kv_heads;
  const size_t tiles = planes * ((shape.keys + kTileKeys - 1) / kTileKeys);
  return sizeof(float) * (2 * tiles * shape.padded_dim + planes * shape.padded_dim) +
         sizeof(int) * tiles;
}

const char* quantize_kv(const QuantizeKvParams& params, Stream stream) {
  switch (params.shape.padded_dim) {
    case 64:
      return start<64>(params, stream);
    case 128:
      return start<128>(params, stream);
    case 256:
      return start<256>(params, stream);
    default:
      return "the padded head dimension must be 64, 128 or 256";
  }
}

}  // namespace sage
