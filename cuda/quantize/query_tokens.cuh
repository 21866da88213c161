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

// Finds the scales of tokens whose channels kThreadsPerToken neighbouring threads hold, kPerThread tokens each in a `Piece` or
// several. magnitude(i): that of the thread's share of its i-th token. largest(x): what the token's scale is for, where x is its
// largest magnitude. write(i, inverse): for each i in turn, with the inverse of that token's scale, or 0 where the token is not
// finite: the codes of its channels, each times that, are 0 then (int8_codes). Returns, to threads i < kPerThread of a token's,
// the scale of its i-th: a NaN where that is not finite.
template <class Piece, int kPerThread, int kThreadsPerToken, class Magnitude, class Largest, class Write>
__device__ __forceinline__ float quantize_tokens(const Magnitude& magnitude, const Largest& largest, const Write& write) {
  // Of the thread's tokens each lane finds the scale of one: the others' come from the lanes beside it.
  uint32_t magnitudes[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) magnitudes[i] = magnitude(i);
  const uint32_t most = combine_lanes<kThreadsPerToken>(
      magnitudes, [](uint32_t a, uint32_t b) { return Piece::larger(a, b); });
  const bool finite = Piece::finite(most);
  const GroupScale scale = group_scale(largest(finite ? Piece::value(most) : 0.0f), 127.0f);
  const float own_inverse = finite ? scale.inverse : 0.0f;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) write(i, __shfl_sync(kFullWarp, own_inverse, i, kPerThread));
  return finite ? scale.scale : NAN;
}

}  // namespace sage
