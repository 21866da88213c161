// Queries to INT8, with what K smoothing takes from the LSE (docs/abi.md, section 2): one launch.
//
// Requirements: q_block 1, 64 or 128. A block works on one (batch, head, group of tokens) after the other, and reads the
// next while it does: 64 tokens with a scale each, or q_block tokens that share one.
#include <algorithm>

#include "common/launch.h"
#include "quantize/rows.cuh"

namespace sage {
namespace {

template <int kHeadDim_, int kTokens_, bool kPerToken_, class Piece_>
struct QueryConfig {
  using Piece = Piece_;
  using Rows = RowBlock<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kPerToken = kPerToken_;
  static constexpr int kPerThread = kTokens / Rows::kTokensAtOnce;
  static constexpr int kBlocks = (kPerThread > 4 ? 256 : 384) / kHeadDim;  // of a multiprocessor
  static_assert(kBlocks > 0, "a grid has blocks");
};

// A group of tokens. Heads come first: blocks at work at the same time read whole rows of memory.
template <class Config>
struct TokenGroup {
  int head, first, b, valid;

  __device__ TokenGroup(const QuantizeQParams& p, int item) {
    const int groups = (p.shape.queries + Config::kTokens - 1) / Config::kTokens;
    head = item % p.shape.heads;
    first = item / p.shape.heads % groups * Config::kTokens;
    b = item / p.shape.heads / groups;
    valid = min(p.bounds[3 * static_cast<int64_t>(b)], p.shape.queries);
  }
  __device__ int token(int i) const { return first + Config::Rows::row() + i * Config::Rows::kTokensAtOnce; }
  __device__ void load(const QuantizeQParams& p, typename Config::Piece (&pieces)[Config::kPerThread]) const {
    const AttentionShape& shape = p.shape;
#pragma unroll
    for (int i = 0; i < Config::kPerThread; ++i) {
      const int64_t row =
          ((static_cast<int64_t>(b) * shape.queries + token(i)) * shape.heads + head) * shape.head_dim;
      pieces[i] = typename Config::Piece();
      if (token(i) < valid) pieces[i].load(p.q, p.q_dtype, row, Config::Rows::channel(), shape.head_dim);
    }
  }
};

template <class Config>
__device__ __forceinline__ void quantize_group(const QuantizeQParams& p, const TokenGroup<Config>& at,
                                               const typename Config::Piece (&pieces)[Config::kPerThread],
                                               float* scratch) {
  using Rows = typename Config::Rows;
  constexpr int kPerThread = Config::kPerThread;
  const AttentionShape& shape = p.shape;
  const int channel = Rows::channel();
  const int64_t plane = static_cast<int64_t>(at.b) * shape.heads + at.head;
  float mean[kChannels];
  const int kv_head = at.head / (shape.heads / shape.kv_heads);
  load_floats(mean, p.k_mean + (static_cast<int64_t>(at.b) * shape.kv_heads + kv_head) *
                                   Config::kHeadDim + channel);

  // ------------------------------------------------------------------------ look for NaN and Inf
  float x[kPerThread][kChannels];
  float largest[kPerThread], shift[kPerThread];  // shift: q·mean of the keys
  bool finite[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    finite[i] = whole_token<Rows::kThreadsPerToken>(pieces[i].finite());
    pieces[i].unpack(x[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x[i][c] = finite[i] ? x[i][c] : 0.0f;
    largest[i] = largest_magnitude(x[i]);
    shift[i] = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) shift[i] = fmaf(x[i][c], mean[c], shift[i]);
  }

  // --------------------------------------------------------------------------------------------
  // scales
  if constexpr (Config::kPerToken) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) largest[i] = lanes_max<Rows::kThreadsPerToken>(largest[i]);
  } else {
    for (int i = 1; i < kPerThread; ++i) largest[0] = fmaxf(largest[0], largest[i]);
    largest[0] = block_max<Rows::kThreads>(largest[0], scratch);
    for (int i = 1; i < kPerThread; ++i) largest[i] = largest[0];
  }

  // --------------------------------------------------------------------------------------------
  // codes
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int token = at.token(i);
    const GroupScale group = group_scale(largest[i], 127.0f);
    const float whole = lanes_sum<Rows::kThreadsPerToken>(shift[i]);
    if (token >= shape.queries) continue;  // after the last operation of the whole warp
    const int64_t row = plane * shape.queries + token;
    *reinterpret_cast<uint2*>(p.q8 + row * Config::kHeadDim + channel) =
        int8_codes(x[i], group.inverse);
    if (channel == 0) {
      p.q_scale[row] = !finite[i] ? NAN : token < at.valid ? group.scale : 0.0f;
      p.lse_shift[row] = finite[i] ? whole * p.scale : NAN;
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::Rows::kThreads, Config::kBlocks)
    quantize_queries(const QuantizeQParams p) {
  __shared__ float scratch[2][Config::Rows::kThreads / kWarpSize];  // in turns: a fast warp is one group ahead
  const int groups = (p.shape.queries + Config::kTokens - 1) / Config::kTokens;
  const int items = p.shape.batch * p.shape.heads * groups;
  int item = static_cast<int>(blockIdx.x), turn = 0;
  typename Config::Piece next[Config::kPerThread];
  TokenGroup<Config>(p, item).load(p, next);
#pragma unroll 1
  for (; item < items; item += static_cast<int>(gridDim.x), turn ^= 1) {
    typename Config::Piece pieces[Config::kPerThread];
#pragma unroll
    for (int i = 0; i < Config::kPerThread; ++i) pieces[i] = next[i];
    const int after = item + static_cast<int>(gridDim.x);
    if (after < items) TokenGroup<Config>(p, after).load(p, next);
    quantize_group<Config>(p, TokenGroup<Config>(p, item), pieces, scratch[turn]);
  }
}

template <class Config>
const char* start(const QuantizeQParams& p, Stream stream) {
  const int64_t items = static_cast<int64_t>(p.shape.batch) * p.shape.heads *
                        ((p.shape.queries + Config::kTokens - 1) / Config::kTokens);
  if (items > INT32_MAX / 2) return "batch · heads · query length is too large; split the batch";
  const int64_t blocks = std::min<int64_t>(items, Config::kBlocks * multiprocessors());
  return launch(quantize_queries<Config>, dim3(static_cast<unsigned>(blocks)),
                Config::Rows::kThreads, 0, stream, p);
}

template <int kHeadDim>
const char* start_blocks(const QuantizeQParams& p, Stream stream) {
  return with_pieces(p.q_dtype, p.q_dtype, p.shape.head_dim, [&](auto piece) {
    using P = decltype(piece);
    switch (p.q_block) {
      case 1:
        return start<QueryConfig<kHeadDim, 64, true, P>>(p, stream);
      case 64:
        return start<QueryConfig<kHeadDim, 64, false, P>>(p, stream);
      case 128:
        return start<QueryConfig<kHeadDim, 128, false, P>>(p, stream);
      default:
        return "q_block must be 1, 64 or 128";
    }
  });
}

}  // namespace

const char* quantize_q(const QuantizeQParams& params, Stream stream) {
  switch (params.shape.padded_dim) {
    case 64:
      return start_blocks<64>(params, stream);
    case 128:
      return start_blocks<128>(params, stream);
    case 256:
      return start_blocks<256>(params, stream);
    default:
      return "the padded head dimension must be 64, 128 or 256";
  }
}

}  // namespace sage
