// Queries to INT8, with what K smoothing takes from the LSE (docs/abi.md, section 2): one launch.
//
// Requirements: q_block 1, 64 or 128. One block a (batch, head, group of tokens): 64 tokens with a
// scale each, or q_block tokens that share one.
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
};

template <class Config>
__global__ void __launch_bounds__(Config::Rows::kThreads, 1)
    quantize_queries(const QuantizeQParams p) {
  using Rows = typename Config::Rows;
  constexpr int kPerThread = Config::kPerThread;
  __shared__ float scratch[Rows::kThreads / kWarpSize];
  const AttentionShape& shape = p.shape;
  const int groups = (shape.queries + Config::kTokens - 1) / Config::kTokens;
  const int block = static_cast<int>(blockIdx.x);
  // Heads first: blocks at work at the same time read whole rows of memory.
  const int head = block % shape.heads, first = block / shape.heads % groups * Config::kTokens;
  const int b = block / shape.heads / groups;
  const int valid = min(p.bounds[3 * static_cast<int64_t>(b)], shape.queries);
  const int channel = Rows::channel();
  const int64_t plane = static_cast<int64_t>(b) * shape.heads + head;

  // ------------------------------------------------------------------------ read, look for NaN and
  // Inf
  typename Config::Piece pieces[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int token = first + Rows::row() + i * Rows::kTokensAtOnce;
    const int64_t row =
        ((static_cast<int64_t>(b) * shape.queries + token) * shape.heads + head) * shape.head_dim;
    if (token < valid) pieces[i].load(p.q, p.q_dtype, row, channel, shape.head_dim);
  }
  float x[kPerThread][kChannels];
  float largest[kPerThread];
  bool finite[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    finite[i] = whole_token<Rows::kThreadsPerToken>(pieces[i].finite());
    pieces[i].unpack(x[i]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x[i][c] = finite[i] ? x[i][c] : 0.0f;
    largest[i] = largest_magnitude(x[i]);
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

  // ------------------------------------------------------------------- codes, scales, q·mean of
  // the keys
  float mean[kChannels];
  const int kv_head = head / (shape.heads / shape.kv_heads);
  load_floats(mean, p.k_mean + (static_cast<int64_t>(b) * shape.kv_heads + kv_head) *
                                   Config::kHeadDim + channel);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int token = first + Rows::row() + i * Rows::kTokensAtOnce;
    const GroupScale group = group_scale(largest[i], 127.0f);
    float shift = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) shift = fmaf(x[i][c], mean[c], shift);
#pragma unroll
    for (int step = Rows::kThreadsPerToken / 2; step > 0; step /= 2) {
      shift += __shfl_xor_sync(kFullWarp, shift, step);
    }
    if (token >= shape.queries) continue;  // after the last operation of the whole warp
    const int64_t at = plane * shape.queries + token;
    *reinterpret_cast<uint2*>(p.q8 + at * Config::kHeadDim + channel) =
        int8_codes(x[i], group.inverse);
    if (channel == 0) {
      p.q_scale[at] = !finite[i] ? NAN : token < valid ? group.scale : 0.0f;
      p.lse_shift[at] = finite[i] ? shift * p.scale : NAN;
    }
  }
}

template <class Config>
const char* start(const QuantizeQParams& p, Stream stream) {
  const int64_t blocks = static_cast<int64_t>(p.shape.batch) * p.shape.heads *
                         ((p.shape.queries + Config::kTokens - 1) / Config::kTokens);
  if (blocks > INT32_MAX) return "batch · heads · query length is too large; split the batch";
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
