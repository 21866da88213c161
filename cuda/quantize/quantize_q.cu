// Queries to INT8, with what K smoothing takes from the LSE (docs/abi.md, section 2): one launch.
//
// Requirements: q_block 1, 64 or 128. A block works on one (batch, head, group of tokens) after the other, and reads the
// next while it does: 64 tokens with a scale each, or q_block tokens that share one.
#include <algorithm>

#include "common/launch.h"
#include "ptx/grid_dependency.cuh"
#include "quantize/query_tokens.cuh"

namespace sage {
namespace {

template <int kHeadDim_, int kTokens_, bool kPerToken_, class Piece_>
struct QueryConfig {
  using Piece = Piece_;
  using Rows = TokenThreads<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kPerToken = kPerToken_;
  static constexpr int kPerThread = kTokens / Rows::kTokensAtOnce;
  // Of a multiprocessor.
  static constexpr int kBlocks = (kPerThread > 4 || !Piece::kReadsAhead ? 256 : 384) / kHeadDim;
  static_assert(kBlocks > 0, "a grid has blocks");
};

// The groups of tokens of a (batch, head) are shared out among blocks. Heads come first: blocks at work at the same time
// read whole rows of memory.
struct QueryShare {
  int head, share, shares, b, valid, stride;
  int64_t plane, begin;  // begin: of the head's first token, in elements; stride: from a token to the next

  __device__ QueryShare(const QuantizeQParams& p, int shares_) : shares(shares_) {
    const AttentionShape& s = p.shape;
    head = static_cast<int>(blockIdx.x) % s.heads;
    share = static_cast<int>(blockIdx.x) / s.heads % shares;
    b = static_cast<int>(blockIdx.x) / s.heads / shares;
    valid = min(p.bounds[3 * static_cast<int64_t>(b)], s.queries);
    plane = static_cast<int64_t>(b) * s.heads + head;
    stride = s.heads * s.head_dim;
    begin = static_cast<int64_t>(b) * s.queries * stride + head * s.head_dim;
  }
};

template <class Config>
using Pieces = typename Config::Piece[Config::kPerThread];

// Starts to read this thread's tokens of a group.
template <class Config>
__device__ __forceinline__ void load_group(const QuantizeQParams& p, const QueryShare& at, int group,
                                           Pieces<Config>& pieces) {
  const int token = group * Config::kTokens + Config::Rows::row();
  load_tokens(pieces, p.q, p.q_dtype, at.begin + static_cast<int64_t>(token) * at.stride, at.stride,
              Config::Rows::kTokensAtOnce, at.valid - token, Config::Rows::channel(), p.shape.head_dim);
}

template <class Config>
__device__ __forceinline__ void quantize_group(const QuantizeQParams& p, const QueryShare& at, int group,
                                               const float (&mean)[kChannels], Pieces<Config>& pieces,
                                               float* scratch) {
  using Rows = typename Config::Rows;
  const int channel = Rows::channel(), token = group * Config::kTokens + Rows::row();
  const int64_t first = at.plane * p.shape.queries + token;
  float shifts[Config::kPerThread];
  const float scale = quantize_tokens<typename Config::Piece, Config::kPerThread, Rows::kThreadsPerToken>(
      [&](int i) { return pieces[i].magnitude(); },
      [&](float largest) {
        if constexpr (Config::kPerToken) return largest;
        return block_max<Rows::kThreads>(largest, scratch);
      },
      [&](int i, float inverse) {
        float x[kChannels];
        pieces[i].unpack(x);
        const uint2 codes = int8_codes(x, inverse);
        shifts[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) shifts[i] = fmaf(x[c], mean[c], shifts[i]);
        const int distance = i * Rows::kTokensAtOnce;
        auto* const to = p.q8 + first * Config::kHeadDim + channel + distance * Config::kHeadDim;
        if (distance < p.shape.queries - token) *reinterpret_cast<uint2*>(to) = codes;
      });
  const float shift = combine_lanes<Rows::kThreadsPerToken>(shifts, Add());
  const int i = channel / kChannels, distance = i * Rows::kTokensAtOnce;
  if (i < Config::kPerThread && distance < p.shape.queries - token) {
    p.q_scale[first + distance] = distance < at.valid - token ? scale : 0.0f;
    p.lse_shift[first + distance] = isnan(scale) ? NAN : shift * p.scale;
  }
}

template <class Config>
__host__ __device__ inline int groups_of_queries(const AttentionShape& s) {
  return (s.queries + Config::kTokens - 1) / Config::kTokens;
}

struct QueryCall {
  QuantizeQParams p;
  int shares;  // blocks that share the groups of a head
};

template <class Config>
__global__ void __launch_bounds__(Config::Rows::kThreads, Config::kBlocks) quantize_queries(const QueryCall call) {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
  const QuantizeQParams& p = call.p;
  __shared__ float scratch[2][Config::Rows::kThreads / kWarpSize];  // in turns: a fast warp is one group ahead
  const QueryShare at(p, call.shares);
  const int groups = groups_of_queries<Config>(p.shape);
  Pieces<Config> next;
  if (Config::Piece::kReadsAhead) load_group<Config>(p, at, at.share, next);
  float mean[kChannels] = {};
  const int kv_head = at.head / (p.shape.heads / p.shape.kv_heads);
  if (p.k_mean != nullptr) {
    load_floats(mean, p.k_mean + (static_cast<int64_t>(at.b) * p.shape.kv_heads + kv_head) * Config::kHeadDim +
                          Config::Rows::channel());
  }
#pragma unroll 1
  for (int group = at.share, turn = 0; group < groups; group += at.shares, turn ^= 1) {
    Pieces<Config> pieces;
    if constexpr (Config::Piece::kReadsAhead) {
#pragma unroll
      for (int i = 0; i < Config::kPerThread; ++i) pieces[i] = next[i];
      if (group + at.shares < groups) load_group<Config>(p, at, group + at.shares, next);
    } else {
      load_group<Config>(p, at, group, pieces);
    }
    quantize_group<Config>(p, at, group, mean, pieces, scratch[turn]);
  }
}

template <class Config>
const char* start(const QuantizeQParams& p, Stream stream) {
  const int64_t planes = static_cast<int64_t>(p.shape.batch) * p.shape.heads;
  const int groups = groups_of_queries<Config>(p.shape);
  if (planes == 0 || groups == 0) return nullptr;
  const int64_t room = std::max<int64_t>(1, Config::kBlocks * multiprocessors() / planes);
  const int shares = static_cast<int>(std::min<int64_t>(room, groups));
  if (planes * shares > INT32_MAX) return "batch · heads is too large; split the batch";
  return launch(quantize_queries<Config>, dim3(static_cast<unsigned>(planes * shares)), Config::Rows::kThreads, 0,
                stream, QueryCall{p, shares});
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
