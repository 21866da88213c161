// Codes of queries (docs/abi.md, section 2): what quantize_q.cu and the forward kernel of sm_90a share.
#pragma once

#include "quantize/rows.cuh"

namespace sage {

// Starts to read a thread's tokens, `distance` tokens apart, of which those from the `valid`-th on count as zeros; `first` is
// where the first one begins, `stride` how far one token is from the next, in elements.
template <class Piece, int kPerThread>
__device__ __forceinline__ void load_tokens(Piece (&pieces)[kPerThread], const void* tensor, Dtype dtype, int64_t first,
                                            int stride, int distance, int valid, int channel, int head_dim) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    pieces[i].load(tensor, dtype, first + static_cast<unsigned>(i * distance * stride), channel, head_dim,
                   i * distance < valid);
  }
}

// Quantizes the tokens whose pieces kThreadsPerToken neighbouring threads hold. largest(x): what a token's scale is for, where
// x is its largest magnitude. codes(i, x, c) takes eight channels of the thread's i-th token, which may not be finite, and their
// codes. Returns, to threads i < kPerThread of a token's, the scale of its i-th: a NaN where the token is not finite.
template <int kThreadsPerToken, class Piece, int kPerThread, class Largest, class Codes>
__device__ __forceinline__ float quantize_tokens(const Piece (&pieces)[kPerThread], const Largest& largest,
                                                 const Codes& codes) {
  // Of the thread's tokens each lane finds the scale of one: the others' come from the lanes beside it.
  uint32_t magnitudes[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) magnitudes[i] = pieces[i].magnitude();
  const uint32_t magnitude = combine_lanes<kThreadsPerToken>(
      magnitudes, [](uint32_t a, uint32_t b) { return Piece::larger(a, b); });
  const bool finite = Piece::finite(magnitude);
  const GroupScale scale = group_scale(largest(finite ? Piece::value(magnitude) : 0.0f), 127.0f);
  const float own_inverse = finite ? scale.inverse : 0.0f;  // times NaN and Inf NaN, whose code is 0
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float inverse = __shfl_sync(kFullWarp, own_inverse, i, kPerThread);
    float x[kChannels];
    pieces[i].unpack(x);
    codes(i, x, int8_codes(x, inverse));
  }
  return finite ? scale.scale : NAN;
}

}  // namespace sage
