// What the backward pre-pass (backward_prepass.cu) finds out of each query: D, r, its terms, dO as codes, and the maxima
// that x and y are scaled by.
#pragma once

#include <cmath>

#include "sm80/prepass_share.cuh"

namespace sage::prepass {

inline constexpr float kSmallestR = 0x1p-100f;  // below, 1/r could overflow: such rows carry no gradient
inline constexpr float kRowBound = 8.0f / 7.0f;  // r bounds |dP − D|, at most 2‖dO‖·‖V‖, so that no code of G saturates

// Tokens of a thread at once, as many as registers hold.
template <class Piece>
inline constexpr int kTermsTokens = sizeof(Piece) == 16 ? 4 : 2;
template <int kHeadDim>
inline constexpr int kTermsBlocks = 256 / kHeadDim;  // of a multiprocessor

// QueryTerms, row_factor, dO's codes.
template <int kHeadDim, class Piece, bool kTrain8>
__global__ void __launch_bounds__(2 * kHeadDim, kTermsBlocks<kHeadDim>) query_terms(const PrepassCall call) {
  using Rows = TokenThreads<kHeadDim>;
  constexpr int kLanes = Rows::kThreadsPerToken, kTokens = kTermsTokens<Piece>;
  __shared__ uint32_t channel_max[2][kHeadDim];
  __shared__ alignas(16) float v_mean[kHeadDim];
  const BackwardCall& p = call.p;
  const AttentionShape& s = p.shape;
  const BackwardWorkspace& w = p.w;
  const HeadShare at(static_cast<int>(blockIdx.x), s.heads, call.query_shares, s.queries);
  const int64_t kv_plane = static_cast<int64_t>(at.batch) * s.kv_heads + at.head / (s.heads / s.kv_heads);
  for (int c = static_cast<int>(threadIdx.x); c < 2 * kHeadDim; c += Rows::kThreads) {
    channel_max[c / kHeadDim][c % kHeadDim] = 0;
    if (c < kHeadDim) v_mean[c] = p.v_mean[kv_plane * kHeadDim + c];
  }
  const bool clears_dq = kTrain8 && kv_plane < p.cleared_heads;  // sm90/backward_dq_sums.cuh
  const float v_norm = kTrain8 ? p.v_norm[kv_plane] : 0.0f;
  __syncthreads();

  const int stride = s.heads * s.head_dim, channel = Rows::channel();
  const int64_t head_at = static_cast<int64_t>(at.batch) * s.queries * stride + at.head * s.head_dim;
  // Every lane works out what follows from one token's sums; the first few of a token write it down.
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, own = lane % kTokens, token_lane = lane / kLanes * kLanes;
  float x_max[kChannels] = {}, y_max[kChannels] = {};
  constexpr int kParts = kPerThread / kTokens;  // of a tile
#pragma unroll 1
  for (int visit = 0; at.first + visit / kParts * at.step < at.tiles; ++visit) {
    const int tile = at.first + visit / kParts * at.step;
    const int first = tile * kTile + visit % kParts * 16 * kTokens + Rows::row();
    // ------------------------------------------------------------------------ sums
    Piece d_out[kTokens], out[kTokens];
    uint2 q[kTokens];
    const int64_t row = head_at + static_cast<int64_t>(first) * stride;
    const int64_t codes_row = (at.plane * s.queries + first) * kHeadDim + channel;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const bool inside = 16 * i < s.queries - first;
      const int64_t to = row + static_cast<unsigned>(16 * i * stride);
      d_out[i].load(p.dout, p.out_dtype, to, channel, s.head_dim, inside);
      out[i].load(p.out, p.out_dtype, to, channel, s.head_dim, inside);
      q[i] = make_uint2(0, 0);
      if (!inside) continue;
      if (kTrain8) q[i] = load_codes(p.q8 + codes_row + 16 * i * kHeadDim);
      if (clears_dq) {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.dq) + to + channel) = make_uint4(0, 0, 0, 0);
      }
    }
    const int query = first + 16 * own;
    float l = 0.0f, m = 0.0f, given_dlse = 0.0f, q_scale = 0.0f;
    if (query < s.queries) {
      const int64_t at_query = at.plane * s.queries + query;
      l = p.l[at_query], m = p.m[at_query], given_dlse = p.dlse[at_query], q_scale = p.q_scale[at_query];
    }
    uint32_t magnitudes[kTokens];
    float dots[kTokens], squares[kTokens], mean[kChannels];
    load_floats(mean, v_mean + channel);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float x[kChannels], o[kChannels];
      d_out[i].unpack(x);
      out[i].unpack(o);
      magnitudes[i] = d_out[i].magnitude();
      dots[i] = squares[i] = 0.0f;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        dots[i] = fmaf(x[c], o[c] - mean[c], dots[i]);
        squares[i] = fmaf(x[c], x[c], squares[i]);
      }
    }
    const uint32_t magnitude = combine_lanes<kLanes>(magnitudes, [](uint32_t a, uint32_t b) { return Piece::larger(a, b); });
    const float dot = combine_lanes<kLanes>(dots, Add());
    float square = combine_lanes<kLanes>(squares, Add()), unit = 1.0f;
    const float largest = Piece::value(magnitude);
    // Squares of tiny or huge values would leave float's range: those are taken again, relative to a power of two.
    const bool extreme = is_finite(largest) && largest != 0.0f && !(largest > 0x1p-50f && largest < 0x1p50f);
    if (__any_sync(kFullWarp, extreme)) {
      if (extreme) unit = largest < kTinyAmax ? 0.0f : bits_float(float_bits(largest) & 0x7f800000u);
      const float inverse = unit == 0.0f ? 0.0f : 1.0f / unit;
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const float by = __shfl_sync(kFullWarp, inverse, token_lane + i);
        float x[kChannels];
        d_out[i].unpack(x);
        squares[i] = 0.0f;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) squares[i] = fmaf(x[c] * by, x[c] * by, squares[i]);
      }
      square = combine_lanes<kLanes>(squares, Add());
    }

    // ------------------------------------------------------------------------ what follows from them, a token a lane
    const bool live = l != 0.0f;  // a NaN is live: it must reach the gradients
    const float dlse = live ? given_dlse : 0.0f, length = unit * sqrtf(square);
    const float delta = (p.exact_delta ? 0.0f : dot) - dlse;
    // One NaN or Inf in dO, O, Q or a key that this query sees: all it contributes is NaN.
    const bool sound = is_finite(length + dot + l + q_scale + dlse), counts = live && sound;
    const float poison = sound ? 0.0f : NAN;
    const float inverse_l = counts ? 1.0f / l : 0.0f;
    QueryTerms terms = {q_scale * (p.scale * kLog2E), (kTrain8 ? 8.0f : 0.0f) - m + poison, inverse_l, -delta * inverse_l};
    float row_factor = p.scale, y_factor = 0.0f;
    GroupScale codes = {1.0f, 1.0f};
    if (kTrain8) {
      if (p.dp == DpFormat::kInt8) codes = group_scale(counts ? largest : 0.0f, 127.0f);
      const float r = kRowBound * length * v_norm + fabsf(dlse);
      const float inverse_r = r > kSmallestR ? 1.0f / r : 0.0f;
      if (counts) y_factor = q_scale * (r * inverse_l);
      terms.gain = codes.scale * inverse_r;
      terms.offset = -delta * inverse_r;
      row_factor = p.scale * (1.0f / 256.0f) * (r * inverse_l);
    }
    row_factor += poison;
    if (!sound) terms.score = terms.gain = terms.offset = 0.0f;
    if (!live) {
      terms = {0.0f, -INFINITY, 0.0f, 0.0f};
      row_factor = 0.0f;
    }
    const int64_t padded_first = at.plane * at.tiles * kTile + first;
    if (lane - token_lane < kTokens) {
      w.terms[padded_first + 16 * own] = terms;
      w.row_factor[padded_first + 16 * own] = row_factor;
    }

    // ------------------------------------------------------------------------ codes and maxima
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float x_factor = __shfl_sync(kFullWarp, inverse_l, token_lane + i);
      const float inverse = __shfl_sync(kFullWarp, codes.inverse, token_lane + i);
      float x[kChannels];
      if (x_factor == 0.0f) d_out[i].clear();
      d_out[i].unpack(x);
      if (kTrain8) {
        const float by = __shfl_sync(kFullWarp, y_factor, token_lane + i);
        float code[kChannels];
        unpack_codes(code, q[i]);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          x_max[c] = fmaxf(x_max[c], fabsf(x[c] * x_factor));
          y_max[c] = fmaxf(y_max[c], fabsf(code[c] * by));
        }
      }
      const int64_t to = (padded_first + 16 * i) * kHeadDim + channel;
      if (p.dp == DpFormat::kInt8) {
        *reinterpret_cast<uint2*>(static_cast<int8_t*>(w.d_out) + to) = int8_codes(x, inverse);
      } else {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(w.d_out) + to) = halves(x, true);
      }
    }
  }
  if (!kTrain8) return;
  store_maxima<kHeadDim>(channel_max[0], x_max, w.x_max + kv_plane * kHeadDim);
  store_maxima<kHeadDim>(channel_max[1], y_max, w.y_max + kv_plane * kHeadDim);
}

}  // namespace sage::prepass
