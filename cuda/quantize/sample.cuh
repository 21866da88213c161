// What K and V lose, and V's scales begin with: means and largest values of a sample of the tokens of a (batch, key head)
// (docs/abi.md, section 1). Each block that writes codes reads the sample for itself, which takes less time than a launch.
#pragma once

#include <cfloat>

#include "quantize/key_tiles.cuh"

namespace sage {

inline constexpr int kSampledKeys = 128, kSampledValues = 256;  // tokens that stand for a sequence
inline constexpr float kSmallSampleMean = 8.0f;  // a mean of V below 1/8 of its largest value is not subtracted
inline constexpr float kHeadroom = 3.0f;         // a channel's scale is for values so much larger than the sample's
inline constexpr float kLeastLimit = 0x1p-100f;  // where the sample is zero

// Token i of a sample of kSize: all tokens of so few; of more one of each of kSize equal parts, at another place of each.
template <int kSize>
__device__ __forceinline__ int sample_token(int i, int valid) {
  if (valid <= kSize) return i;
  const unsigned place = i * kSize + i * 79 % kSize;
  return static_cast<int>(static_cast<uint64_t>(place) * valid / (kSize * kSize));
}

// A channel of K or V.
struct ChannelStatistics {
  float mean = 0.0f;
  float largest = 0.0f;  // of V: what its scale is for, |V| or, in e4m3, |V - mean|
};

template <int kHeadDim>
struct SampleShared {
  static constexpr int kRows = TokenThreads<kHeadDim>::kTokensAtOnce;
  float rows[2][kRows][kHeadDim];  // sums of K and V, then largest and smallest of V
  int used[2][kRows];              // tokens of K and V that count
};

// Waits for the thread's tokens; makes those that are not finite zeros. Bit i: token i counts, of the first `count` alone.
// Every lane takes part.
template <int kThreadsPerToken, class Piece, int kCount>
__device__ __forceinline__ uint32_t finite_tokens(Piece (&x)[kCount], int count) {
  uint32_t largest = 0, counts = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    largest = Piece::larger(largest, x[i].magnitude());
    counts |= i < count ? 1u << i : 0u;  // others have been read as zeros
  }
  if (__all_sync(kFullWarp, Piece::finite(largest))) return counts;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (whole_token<kThreadsPerToken>(x[i].finite())) continue;
    x[i].clear();
    counts &= ~(1u << i);
  }
  return counts;
}

// What a thread adds up of K or V: eight channels of tokens row, row + 16, ... of the sample.
template <int kHeadDim, class Piece, int kSize>
struct SampleRow {
  using Rows = TokenThreads<kHeadDim>;
  static constexpr int kTokens = kSize / Rows::kTokensAtOnce;
  static constexpr int kAtOnce = Piece::kReadsAhead ? 8 : 1;  // of these
  Piece x[kAtOnce];
  float sum[kChannels] = {};
  int used = 0;

  // Starts to read tokens first, first + 1, ... of these.
  __device__ __forceinline__ void load(const void* tensor, Dtype dtype, const PlaneIndex& at, const AttentionShape& shape,
                                       int first) {
    const int row = Rows::row(), stride = shape.kv_heads * shape.head_dim;
    const int64_t begin = static_cast<int64_t>(at.b) * shape.keys * stride +
                          (static_cast<int>(at.plane) - at.b * shape.kv_heads) * shape.head_dim;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int number = row + (first + i) * Rows::kTokensAtOnce;
      x[i].load(tensor, dtype, begin + static_cast<int64_t>(sample_token<kSize>(number, at.valid)) * stride, Rows::channel(),
                shape.head_dim, number < at.valid);
    }
  }
  // Adds them, and hands those that count to `also`.
  template <class Also>
  __device__ __forceinline__ void add(const PlaneIndex& at, int first, const Also& also) {
    const int left = (at.valid - Rows::row() + Rows::kTokensAtOnce - 1) / Rows::kTokensAtOnce - first;
    const uint32_t counts = finite_tokens<Rows::kThreadsPerToken>(x, left);
    used += __popc(counts);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float y[kChannels];
      x[i].unpack(y);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c] = first + i == 0 ? y[c] : sum[c] + y[c];
      if (counts >> i & 1) also(x[i]);
    }
  }
};

__host__ __device__ inline bool has_channel_scales(PvFormat pv) {
  return pv == PvFormat::kE4m3 || pv == PvFormat::kF16;
}

// Statistics of channel threadIdx.x % kHeadDim of K (for the first half of the block) or V. All threads take part.
template <int kHeadDim, class Piece>
__device__ __forceinline__ ChannelStatistics sample_statistics(const QuantizeKvParams& p, const PlaneIndex& at,
                                                               SampleShared<kHeadDim>& shared) {
  using Rows = TokenThreads<kHeadDim>;
  constexpr int kRows = SampleShared<kHeadDim>::kRows;
  const bool of_values = p.smooth_v || has_channel_scales(p.pv);
  const int row = Rows::row(), channel = Rows::channel();
  const int c = static_cast<int>(threadIdx.x) % kHeadDim, tensor = static_cast<int>(threadIdx.x) / kHeadDim;
  ChannelStatistics statistics;
  if (!p.smooth_k && !of_values) return statistics;

  SampleRow<kHeadDim, Piece, kSampledKeys> keys;
  SampleRow<kHeadDim, Piece, kSampledValues> values;
  typename Piece::Extremes extremes;
#pragma unroll
  for (int first = 0; first < values.kTokens; first += values.kAtOnce) {
    const bool of_keys = p.smooth_k && first < keys.kTokens;
    if (of_keys) keys.load(p.k, p.k_dtype, at, p.shape, first);
    if (of_values) values.load(p.v, p.v_dtype, at, p.shape, first);
    if (of_keys) keys.add(at, first, [](const Piece&) {});
    if (of_values) values.add(at, first, [&](const Piece& x) { extremes.add(x); });
    if constexpr (!Piece::kReadsAhead) __syncwarp();  // several tokens at once would take too many registers
  }
  const auto hand_out = [&](int to, const float (&x)[kChannels]) {
    auto* const out = reinterpret_cast<float4*>(&shared.rows[to][row][channel]);
    out[0] = make_float4(x[0], x[1], x[2], x[3]);
    out[1] = make_float4(x[4], x[5], x[6], x[7]);
  };
  hand_out(0, keys.sum);
  hand_out(1, values.sum);
  if (channel == 0) {
    shared.used[0][row] = keys.used;
    shared.used[1][row] = values.used;
  }
  __syncthreads();
  if (tensor == 0 ? p.smooth_k : p.smooth_v) {
    float z[kRows];
    int used = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) z[i] = shared.rows[tensor][i][c];
#pragma unroll
    for (int i = 0; i < kRows; ++i) used += shared.used[tensor][i];
#pragma unroll
    for (int half = kRows / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) z[i] += i < half ? z[i + half] : 0.0f;
    }
    statistics.mean = bf16_value(bf16_bits(z[0] * (1.0f / static_cast<float>(max(used, 1)))));
  }
  if (!of_values) return statistics;

  __syncthreads();
  float largest[kChannels], smallest[kChannels];
  extremes.unpack(largest, smallest);
  hand_out(0, largest);
  hand_out(1, smallest);
  __syncthreads();
  if (tensor == 0) return statistics;
  float most = -INFINITY, least = INFINITY;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    most = fmaxf(most, shared.rows[0][i][c]);
    least = fminf(least, shared.rows[1][i][c]);
  }
  if (kSmallSampleMean * fabsf(statistics.mean) < fmaxf(most, -least)) statistics.mean = 0.0f;
  // Rounding keeps order: this is the largest of the rounded |v - mean|.
  const float removed = p.pv == PvFormat::kE4m3 ? statistics.mean : 0.0f;
  statistics.largest = fmaxf(0.0f, fmaxf(most - removed, removed - least));
  if (at.valid > kSampledValues) {
    statistics.largest = fminf(fmaxf(kHeadroom * statistics.largest, kLeastLimit), FLT_MAX);
  }
  return statistics;
}

}  // namespace sage
