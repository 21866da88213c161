// Which values of a tile of scores count, where a mask or a bad key has a say. Not for tiles that Mask::view calls kNothing.
//
// A lane 4g + t holds 32 of a tile 64 columns wide: bit 4n + c stands for row g + 8·(c/2) and column 8n + 2t + c%2.
// `t` is given, because some callers would rather find it again than keep it in a register.
#pragma once

#include "common/mask.cuh"
#include "common/scale.cuh"

namespace sage {

// Those that lie in the spans of rows g and g + 8. The tile begins at column `first`.
__device__ __forceinline__ uint32_t seen_in_spans(const Span& upper, const Span& lower, int first) {
  const int column = first + 2 * (static_cast<int>(threadIdx.x) % 4);
  uint32_t seen = 0;
#pragma unroll
  for (int bit = 0; bit < 32; ++bit) {
    const Span& span = bit & 2 ? lower : upper;
    seen |= (span.contains(column + bit / 4 * 8 + (bit & 1)) ? 1u : 0u) << bit;
  }
  return seen;
}

// Rows are queries, the lane's `query` and query + 8; columns are keys from `key` on, whose codes lie in a `Tile` at `codes`.
template <class Tile>
__device__ __forceinline__ uint32_t seen_of_queries(const Mask& mask, int query, int key, bool bad_keys,
                                                    const unsigned char* codes, int t) {
  if (!bad_keys && mask.spans_only()) {
    return seen_in_spans(mask.keys_of(query), mask.keys_of(query + 8), key);
  }
  uint32_t seen = 0;
#pragma unroll 1
  for (int i = 31; i >= 0; --i) {
    const int column = i / 4 * 8 + 2 * t + (i & 1);
    bool counts = mask.visible(query + (i >> 1 & 1) * 8, key + column);
    if (counts && bad_keys) counts = static_cast<int8_t>(codes[Tile::offset(column, 0)]) != kBadCode;
    seen = seen << 1 | (counts ? 1u : 0u);
  }
  return seen;
}

// Rows are keys, the lane's `key` and key + 8, which count if they are sound; columns are queries from `query` on.
// `dense_offset`: from the mask of this head to that of another, in elements.
__device__ __forceinline__ uint32_t seen_of_keys(const Mask& mask, int key, int query, const bool (&sound)[2], int t,
                                                 int64_t dense_offset = 0) {
  if (mask.spans_only()) {
    Span upper = mask.queries_of(key), lower = mask.queries_of(key + 8);
    upper.count = sound[0] ? upper.count : 0;
    lower.count = sound[1] ? lower.count : 0;
    return seen_in_spans(upper, lower, query);
  }
  uint32_t seen = 0;
#pragma unroll 1
  for (int i = 31; i >= 0; --i) {
    const int column = i / 4 * 8 + 2 * t + (i & 1), r = i >> 1 & 1;
    const bool counts = (r == 0 ? sound[0] : sound[1]) && mask.visible(query + column, key + 8 * r, dense_offset);
    seen = seen << 1 | (counts ? 1u : 0u);
  }
  return seen;
}

}  // namespace sage
