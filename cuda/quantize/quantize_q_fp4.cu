// Queries to NVFP4, bit for bit as the specification, and ΔS = mean · K'ᵀ (docs/nvfp4.md; SageAttention3,
// arXiv 2505.11594, section 3.2): two launches, the second of which reads K once more, unquantized.
#include "common/launch.h"
#include "common/params_fp4.h"
#include "ptx/shared.cuh"
#include "quantize/fp4.cuh"

namespace sage {
namespace {

constexpr int kRowsAtOnce = 16;                           // tokens in one row of registers
constexpr int kPerThread = kFp4Queries / kRowsAtOnce;     // tokens a thread holds
constexpr int kMeansPerThread = 8, kMeanLanes = 4;        // of the second launch
constexpr int kMeansAtOnce = kMeansPerThread * kMeanLanes;

// A block has 128 queries of one head. Their mean, divided by their tensor's scale, goes to the workspace
// [B, N, T128, Hp].
template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(2 * kHeadDim, 1) fp4_queries(const QuantizeQFp4Params p) {
  using Rows = TokenThreads<kHeadDim>;
  __shared__ float rows[2][kRowsAtOnce][kHeadDim];  // sums of either 64 queries; then their mean
  __shared__ float scratch[Rows::kThreads / kWarpSize];
  __shared__ int used_tokens[kRowsAtOnce];
  const AttentionShape& shape = p.shape;
  const int blocks = static_cast<int>(query_blocks(shape));
  const int index = static_cast<int>(blockIdx.x);
  const int head = index % shape.heads, block = index / shape.heads % blocks;
  const int b = index / shape.heads / blocks, row = Rows::row(), channel = Rows::channel();
  const int first = block * kFp4Queries + row;
  const int valid = min(p.bounds[3 * static_cast<int64_t>(b)], shape.queries);
  const int64_t plane = static_cast<int64_t>(b) * shape.heads + head;
  const int64_t kv_plane =
      static_cast<int64_t>(b) * shape.kv_heads + head / (shape.heads / shape.kv_heads);

  Piece pieces[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int token = first + kRowsAtOnce * i;
    const int64_t at =
        ((static_cast<int64_t>(b) * shape.queries + token) * shape.heads + head) * shape.head_dim;
    if (token < valid) pieces[i].load(p.q, p.q_dtype, at, channel, shape.head_dim);
  }
  float x[kPerThread][kChannels] = {}, mean[kChannels];
  uint32_t bad = 0, used = 0;  // bit i: of token i
  load_floats(mean, p.k_mean + kv_plane * kHeadDim + channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int token = first + kRowsAtOnce * i;
    if (!ptx::always(shape.queries, kPerThread + i)) continue;  // one after the other: fewer registers
    const bool finite = whole_token<Rows::kThreadsPerToken>(pieces[i].finite());
    bad |= finite ? 0u : 1u << i;
    used |= finite && token < valid ? 1u << i : 0u;
    pieces[i].unpack(x[i]);
    float shift = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      x[i][c] = finite ? x[i][c] : 0.0f;
      shift = fmaf(x[i][c], mean[c], shift);
    }
    shift = lanes_sum<Rows::kThreadsPerToken>(shift);
    if (channel == 0 && token < shape.queries) {
      p.lse_shift[plane * shape.queries + token] = finite ? shift * p.scale : NAN;
    }
  }

  // ------------------------------------------------------------------------------- the queries' mean
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    rows[0][row][channel + c] = (x[0][c] + x[2][c]) + (x[1][c] + x[3][c]);
    rows[1][row][channel + c] = (x[4][c] + x[6][c]) + (x[5][c] + x[7][c]);
  }
  if (channel == 0) used_tokens[row] = __popc(used);
  __syncthreads();
  const int c = static_cast<int>(threadIdx.x) % kHeadDim;
  const int part = static_cast<int>(threadIdx.x) / kHeadDim;
  float z[kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < kRowsAtOnce; ++i) z[i] = rows[part][i][c];
  __syncthreads();
  rows[part][0][c] = sum_by_halves(z);
  int count = 0;
  for (int i = 0; i < kRowsAtOnce; ++i) count += used_tokens[i];
  __syncthreads();
  const float reciprocal = 1.0f / static_cast<float>(max(count, 1));
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const float sum = rows[0][0][channel + k] + rows[1][0][channel + k];
    mean[k] = p.smooth_q ? bf16_value(bf16_bits(sum * reciprocal)) : 0.0f;
  }

  // ---------------------------------------------------------------------------------------- codes
  float largest = largest_magnitude(mean) * kMeanFloor;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) x[i][k] = used >> i & 1 ? x[i][k] - mean[k] : 0.0f;
    largest = fmaxf(largest, largest_magnitude(x[i]));
  }
  const GroupScale tensor = tensor_scale(block_max<Rows::kThreads>(largest, scratch));
  const int64_t at_block = plane * blocks + block;
  if (threadIdx.x == 0) p.q_tensor[at_block] = tensor.scale;
  if (row == 0) {
    float* const to = static_cast<float*>(p.workspace) + at_block * kHeadDim + channel;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) to[k] = mean[k] * tensor.inverse;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int token = first + kRowsAtOnce * i;
    if (!ptx::always(shape.queries, i)) continue;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) x[i][k] *= tensor.inverse;
    const GroupScale scale = pair_scale(x[i], p.four_or_six);
    if (token >= shape.queries) continue;
    store_channels(p.q4, p.q_scale, (plane * shape.queries + token) * kHeadDim + channel, x[i],
                   scale, (bad >> i & 1) != 0 && channel == 0);
  }
}

// A block has 64 keys of one (batch, key head) and the means of all its query heads, 32 at a time.
template <int kHeadDim, class Piece>
__global__ void __launch_bounds__(kTileKeys* kMeanLanes, 2) fp4_delta(const QuantizeQFp4Params p) {
  // keys [kHeadDim][65], means [32][kHeadDim]
  constexpr int kStride = kTileKeys + 1;
  float* const keys = reinterpret_cast<float*>(ptx::dynamic_shared());
  float* const means = keys + kHeadDim * kStride;
  const AttentionShape& shape = p.shape;
  const int tiles = (shape.keys + kTileKeys - 1) / kTileKeys;
  const int index = static_cast<int>(blockIdx.x), head = index % shape.kv_heads;
  const int first = index / shape.kv_heads % tiles * kTileKeys, b = index / shape.kv_heads / tiles;
  const int valid = min(p.bounds[3 * static_cast<int64_t>(b) + 1], shape.keys);
  const int64_t plane = static_cast<int64_t>(b) * shape.kv_heads + head;
  const float inverse = inverse_power(p.k_tensor[plane]);

  constexpr int kThreadsPerToken = kHeadDim / kChannels;
  const int channel = static_cast<int>(threadIdx.x) % kThreadsPerToken * kChannels;
  float mean[kChannels];
  load_floats(mean, p.k_mean + plane * kHeadDim + channel);
  for (int j = static_cast<int>(threadIdx.x) / kThreadsPerToken; j < kTileKeys;
       j += kTileKeys * kMeanLanes / kThreadsPerToken) {
    Piece piece;
    const int token = first + j;
    const int64_t at =
        ((static_cast<int64_t>(b) * shape.keys + token) * shape.kv_heads + head) * shape.head_dim;
    if (token < valid) piece.load(p.k, p.k_dtype, at, channel, shape.head_dim);
    const bool used = whole_token<kThreadsPerToken>(piece.finite()) && token < valid;
    float y[kChannels];
    piece.unpack(y);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      keys[(channel + k) * kStride + j] = used ? (y[k] - mean[k]) * inverse : 0.0f;
    }
  }

  const int key = static_cast<int>(threadIdx.x) % kTileKeys;
  const int lane = static_cast<int>(threadIdx.x) / kTileKeys * kMeansPerThread;
  // The query heads of a group follow each other.
  const int rows = shape.heads / shape.kv_heads * static_cast<int>(query_blocks(shape));
  const float* const from = static_cast<const float*>(p.workspace) + plane * rows * kHeadDim;
  float* const to = p.delta + plane * rows * shape.keys + first + key;
  for (int begin = 0; begin < rows; begin += kMeansAtOnce) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kMeansAtOnce * kHeadDim;
         i += kTileKeys * kMeanLanes) {
      means[i] = begin + i / kHeadDim < rows ? from[static_cast<int64_t>(begin) * kHeadDim + i] : 0.0f;
    }
    __syncthreads();
    float sums[kMeansPerThread] = {};
#pragma unroll 4
    for (int h = 0; h < kHeadDim; ++h) {
      const float k = keys[h * kStride + key];
#pragma unroll
      for (int r = 0; r < kMeansPerThread; ++r) {
        sums[r] = fmaf(means[(lane + r) * kHeadDim + h], k, sums[r]);
      }
    }
    if (first + key >= shape.keys) continue;
#pragma unroll
    for (int r = 0; r < kMeansPerThread; ++r) {
      const int at = begin + lane + r;
      if (at < rows) to[static_cast<int64_t>(at) * shape.keys] = sums[r];
    }
  }
}

template <int kHeadDim, class Piece>
const char* start(const QuantizeQFp4Params& p, Stream stream) {
  const AttentionShape& s = p.shape;
  const int64_t blocks = static_cast<int64_t>(s.batch) * s.heads * query_blocks(s);
  const int64_t tiles =
      static_cast<int64_t>(s.batch) * s.kv_heads * ((s.keys + kTileKeys - 1) / kTileKeys);
  if (blocks > INT32_MAX || tiles > INT32_MAX) {
    return "batch · heads · length is too large; split the batch";
  }
  const char* error = launch(fp4_queries<kHeadDim, Piece>, dim3(static_cast<unsigned>(blocks)),
                             dim3(2 * kHeadDim), 0, stream, p);
  if (error != nullptr || blocks == 0) return error;
  constexpr size_t kShared = sizeof(float) * kHeadDim * (kTileKeys + 1 + kMeansAtOnce);
  static_assert(kShared <= 99 * 1024, "sm_86, sm_89 and sm_120 offer a block 99 KiB");
  return launch(fp4_delta<kHeadDim, Piece>, dim3(static_cast<unsigned>(tiles)),
                dim3(kTileKeys * kMeanLanes), kShared, stream, p);
}

}  // namespace

size_t quantize_q_fp4_workspace_bytes(const AttentionShape& shape) {
  return sizeof(float) * static_cast<size_t>(shape.batch) * shape.heads *
         static_cast<size_t>(query_blocks(shape)) * shape.padded_dim;
}

const char* quantize_q_fp4(const QuantizeQFp4Params& params, Stream stream) {
  return with_pieces(params.q_dtype, params.k_dtype, params.shape.head_dim, [&](auto piece) {
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
