// Keys and values to NVFP4 (docs/nvfp4.md, "Operations and layouts"), bit for bit as the specification:
// statistics of each tile of 64 tokens, their reduction over the sequence, and the codes.
#include "common/launch.h"
#include "common/params_fp4.h"
#include "quantize/fp4.cuh"
#include "quantize/key_tiles.cuh"

namespace sage {
namespace {

constexpr int kRowsAtOnce = 16;  // tokens that a block holds in one row of registers
constexpr float kSmallMean = 256.0f;  // a mean of V below 1/256 of its largest value is not subtracted
constexpr int kReduceRows = 32;  // tiles that a reducing block combines at once

// What the launches hand on to each other; tensor 0 is K, 1 is V.
struct Statistics {
  float *sums, *max, *min;  // [2, B, K, S64, Hp]; -inf and inf where no token counts
  float* amax;              // [2, B, K, Hp] largest |x - mean|
  int* used;                // [B, K, S64] tokens counted
  int64_t planes, tiles;    // B·K, B·K·S64

  __host__ __device__ Statistics(const AttentionShape& s, void* workspace)
      : planes(static_cast<int64_t>(s.batch) * s.kv_heads),
        tiles(planes * ((s.keys + kTileKeys - 1) / kTileKeys)) {
    sums = static_cast<float*>(workspace);
    max = sums + 2 * tiles * s.padded_dim;
    min = max + 2 * tiles * s.padded_dim;
    amax = min + 2 * tiles * s.padded_dim;
    used = reinterpret_cast<int*>(amax + 2 * planes * s.padded_dim);
  }
};

// One block a multiprocessor is asked for, as ptxas otherwise keeps to 96 registers and spills.
template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim, 1) fp4_statistics(const QuantizeKvFp4Params p) {
  using Rows = TokenThreads<kHeadDim>;
  __shared__ float rows[2][kRowsAtOnce][kHeadDim];
  __shared__ int used_tokens[kRowsAtOnce];
  const TileIndex at(p, false);
  const Statistics out(p.shape, p.workspace);
  const int row = Rows::row(), channel = Rows::channel();
  const int first = at.tile * kTileKeys + row;
  const TokenPairs<Piece> x(Rows(), p, at, EverySixteenth{first});
  const int64_t tile = at.plane * at.tiles + at.tile;
  const int c = static_cast<int>(threadIdx.x) % kHeadDim;  // two threads a channel
  const bool upper = static_cast<int>(threadIdx.x) >= kHeadDim;
  if (channel == 0) used_tokens[row] = x.used[0] + x.used[1] + x.used[2] + x.used[3];

#pragma unroll
  for (int tensor = 0; tensor < 2; ++tensor) {
    float y[kPerThread][kChannels];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) (tensor == 0 ? x.k[i] : x.v[i]).unpack(y[i]);
    const int64_t to = (tensor * out.tiles + tile) * kHeadDim + c;
    // The thread's largest value of a channel, and of its negative.
    const auto largest = [&](int k, float sign) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) top = x.used[i] ? fmaxf(top, sign * y[i][k]) : top;
      return top;
    };
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      // Tokens row, row + 16, row + 32, row + 48: the first two halvings of the tile happen here.
      rows[0][row][channel + k] = (y[0][k] + y[2][k]) + (y[1][k] + y[3][k]);
      rows[1][row][channel + k] = largest(k, 1.0f);
    }
    __syncthreads();
    float z[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) z[i] = rows[upper ? 1 : 0][i][c];
#pragma unroll
    for (int half = kRowsAtOnce / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) z[i] = upper ? fmaxf(z[i], z[i + half]) : z[i] + z[i + half];
    }
    (upper ? out.max : out.sums)[to] = z[0];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kChannels; ++k) rows[0][row][channel + k] = largest(k, -1.0f);
    __syncthreads();
    if (upper) continue;
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) top = fmaxf(top, rows[0][i][c]);
    out.min[to] = -top;
  }
  if (threadIdx.x != 0) return;
  int total = 0;
  for (int i = 0; i < kRowsAtOnce; ++i) total += used_tokens[i];
  out.used[tile] = total;
}

// A block reduces 32 channels of one tensor (blockIdx.y) and (batch, key head) over all tiles. Sums fold the
// upper half of the tiles onto the lower half, in place, until one is left.
__global__ void __launch_bounds__(kReduceRows * 32, 1) fp4_reduce(const QuantizeKvFp4Params p) {
  __shared__ float maxima[kReduceRows][32], minima[kReduceRows][32];
  __shared__ int counts[kReduceRows];
  const Statistics in(p.shape, p.workspace);
  const int width = p.shape.padded_dim, tiles = (p.shape.keys + kTileKeys - 1) / kTileKeys;
  const int tensor = static_cast<int>(blockIdx.y);
  const int64_t plane = blockIdx.x / (width / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32;
  const int channel = static_cast<int>(blockIdx.x) % (width / 32) * 32 + lane;
  const int64_t first = (tensor * in.tiles + plane * tiles) * width + channel;
  float* const sums = in.sums + first;

  float largest = -INFINITY, smallest = INFINITY;
  for (int i = row; i < tiles; i += kReduceRows) {
    largest = fmaxf(largest, in.max[first + static_cast<int64_t>(i) * width]);
    smallest = fminf(smallest, in.min[first + static_cast<int64_t>(i) * width]);
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
      const float other = i + half < length ? sums[static_cast<int64_t>(i + half) * width] : 0.0f;
      sums[static_cast<int64_t>(i) * width] += other;
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
  const float reciprocal = 1.0f / static_cast<float>(max(total, 1));
  const bool smooth = tensor == 0 ? p.smooth_k : p.smooth_v;
  float mean = smooth ? bf16_value(bf16_bits(sums[0] * reciprocal)) : 0.0f;
  if (tensor == 1 && kSmallMean * fabsf(mean) < fmaxf(largest, -smallest)) mean = 0.0f;
  (tensor == 0 ? p.k_mean : p.v_mean)[plane * width + channel] = mean;
  // Rounding keeps order: this is the largest of the rounded |x - mean|.
  in.amax[(tensor * in.planes + plane) * width + channel] =
      fmaxf(0.0f, fmaxf(largest - mean, mean - smallest));
}

template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim) fp4_write_codes(const QuantizeKvFp4Params p) {
  using Rows = TokenThreads<kHeadDim>;
  __shared__ float values[2][kRowsAtOnce][kHeadDim];  // 16 tokens of V each
  __shared__ float scratch[2][Rows::kThreads / kWarpSize];
  const TileIndex at(p, true);
  const Statistics in(p.shape, p.workspace);
  const int keys = p.shape.keys, row = Rows::row(), channel = Rows::channel();
  const int first = at.tile * kTileKeys + row;
  const auto token = [&](int i) { return first + EverySixteenth::distance(i); };
  const TokenPairs<Piece> x(Rows(), p, at, EverySixteenth{first});

  // Each thread reads a channel's maximum, half of them twice.
  const int c = static_cast<int>(threadIdx.x) % kHeadDim;
  const auto tensor_scale_of = [&](int tensor) {
    const float largest = in.amax[(tensor * in.planes + at.plane) * kHeadDim + c];
    return tensor_scale(block_max<Rows::kThreads>(largest, scratch[tensor]));
  };
  const GroupScale key_tensor = tensor_scale_of(0), value_tensor = tensor_scale_of(1);
  if (at.tile == 0 && threadIdx.x == 0) {
    p.k_tensor[at.plane] = key_tensor.scale;
    p.v_tensor[at.plane] = value_tensor.scale;
  }
  // A token's eight channels, smoothed and divided by their tensor's scale.
  const auto scaled = [&](const Piece& piece, int i, const float (&mean)[kChannels], float inverse,
                          float (&y)[kChannels]) {
    piece.unpack(y);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) y[k] = x.used[i] ? (y[k] - mean[k]) * inverse : 0.0f;
  };

  // ------------------------------------------------------------------ keys: blocks along channels
  float mean[kChannels];
  load_floats(mean, p.k_mean + at.plane * kHeadDim + channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    float y[kChannels];
    scaled(x.k[i], i, mean, key_tensor.inverse, y);
    const GroupScale scale = pair_scale(y, p.four_or_six);
    if (token(i) >= keys) continue;
    store_channels(p.k4, p.k_scale, (at.plane * keys + token(i)) * kHeadDim + channel, y, scale,
                   (x.bad >> i & 1) != 0 && channel == 0);
  }

  // ------------------------------------------------------------------ values: blocks along tokens
  load_floats(mean, p.v_mean + at.plane * kHeadDim + channel);
  const int64_t padded_keys = static_cast<int64_t>(at.tiles) * kTileKeys;
  const int part = static_cast<int>(threadIdx.x) / kHeadDim;
#pragma unroll
  for (int i = 0; i < kPerThread; i += 2) {
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float y[kChannels];
      scaled(x.v[i + half], i + half, mean, value_tensor.inverse, y);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) values[half][row][channel + k] = y[k];
    }
    __syncthreads();
    float block[2][kChannels];
#pragma unroll
    for (int j = 0; j < kFp4Block; ++j) block[j / kChannels][j % kChannels] = values[part][j][c];
    const GroupScale scale = own_scale(block, p.four_or_six);
    const int64_t to =
        (at.plane * kHeadDim + c) * padded_keys + at.tile * kTileKeys + (i + part) * kFp4Block;
    *reinterpret_cast<uint2*>(p.v4 + to / 2) = make_uint2(e2m1_codes(block[0], scale.inverse),
                                                          e2m1_codes(block[1], scale.inverse));
    p.v_scale[to / kFp4Block] = e4m3_code(scale.scale);
  }
}

template <int kHeadDim, class Piece>
const char* start(const QuantizeKvFp4Params& p, Stream stream) {
  const Statistics sizes(p.shape, nullptr);
  if (sizes.tiles > INT32_MAX) return "batch · key heads · key length is too large; split the batch";
  const dim3 grid(static_cast<unsigned>(sizes.tiles)), block(2 * kHeadDim);
  const char* error = launch(fp4_statistics<kHeadDim, Piece>, grid, block, 0, stream, p);
  if (error != nullptr) return error;
  const dim3 reduce(static_cast<unsigned>(sizes.tiles > 0 ? sizes.planes * (kHeadDim / 32) : 0), 2);
  error = launch(fp4_reduce, reduce, dim3(kReduceRows * 32), 0, stream, p);
  if (error != nullptr) return error;
  return launch(fp4_write_codes<kHeadDim, Piece>, grid, block, 0, stream, p);
}

}  // namespace

size_t quantize_kv_fp4_workspace_bytes(const AttentionShape& shape) {
  const Statistics sizes(shape, nullptr);
  const size_t tiles = static_cast<size_t>(sizes.tiles), planes = static_cast<size_t>(sizes.planes);
  return sizeof(float) * (6 * tiles + 2 * planes) * shape.padded_dim + sizeof(int) * tiles;
}

const char* quantize_kv_fp4(const QuantizeKvFp4Params& params, Stream stream) {
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
