// The softmax of one 16 × 64 tile of scores, in the registers of one warp, and its running state.
// Lane 4g + t holds in s[n][0..1] the scores of row g and keys 8n + 2t, 8n + 2t + 1, and in
// s[n][2..3] those of row g + 8 (the accumulators of m16n8k32).
#pragma once

#include <cfloat>

#include "common/mask.cuh"
#include "common/scale.cuh"
#include "common/tile.cuh"
#include "ptx/math.cuh"

namespace sage {

inline constexpr int kKeyGroups = kTileKeys / 8;  // accumulator tiles of 8 keys

// Keys of a tile that hold a NaN or Inf, as a lane sees them: bit 2n + c for key 8n + 2t + c.
template <class KeyTile>
__device__ inline uint32_t bad_keys(const unsigned char* tile) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  uint32_t bad = 0;
#pragma unroll 1
  for (int n = 0; n < kKeyGroups; ++n) {
    for (int c = 0; c < 2; ++c) {
      const auto code = static_cast<int8_t>(tile[KeyTile::offset(8 * n + 2 * t + c, 0)]);
      bad |= (code == kBadCode ? 1u : 0u) << (2 * n + c);
    }
  }
  return bad;
}

// The state of the online softmax of rows g and g + 8: docs/abi.md, section 3. `m` is the largest
// score so far, `l` the lane's share of the row sum, NaN once the row has seen a bad key.
struct RowSoftmax {
  float m[2] = {-INFINITY, -INFINITY};
  float l[2] = {0.0f, 0.0f};

  // Replaces the scores that do not count by kNoScore, and poisons the rows that see a bad key.
  // `query` is the row of s[.][0..1], `key` the first key of the tile.
  __device__ __forceinline__ void hide(int (&s)[kKeyGroups][4], const Mask& mask, int query,
                                       int key, uint32_t bad) {
    const int t = static_cast<int>(threadIdx.x) % 4;
    uint32_t seen = 0;  // bit 4n + c for s[n][c]
#pragma unroll 1
    for (int n = kKeyGroups - 1; n >= 0; --n) {
      uint32_t group = 0;
#pragma unroll 1
      for (int c = 0; c < 4; ++c) {
        group |= (mask.visible(query + (c >> 1) * 8, key + 8 * n + 2 * t + (c & 1)) ? 1u : 0u) << c;
      }
      const uint32_t hidden = bad >> (2 * n) & 3u;
      if (group & hidden) l[0] = NAN;
      if (group >> 2 & hidden) l[1] = NAN;
      seen = seen << 4 | (group & ~(hidden | hidden << 2));
    }
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[n][c] = seen >> (4 * n + c) & 1u ? s[n][c] : kNoScore;
    }
  }

  // Raises m to cover `top` and gives the factors by which what was accumulated so far shrinks.
  // Returns whether any row of the warp changed: rarely, after the first few tiles.
  __device__ __forceinline__ bool raise_maximum(const float (&top)[2], float (&shrink)[2]) {
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float higher = fmaxf(m[r], top[r]);
      changed = changed || higher != m[r];
      shrink[r] = higher == -INFINITY ? 1.0f : ptx::ex2(m[r] - higher);
      m[r] = higher;
    }
    return __any_sync(kFullWarp, changed);
  }
};

// The largest accumulator of each row, kNoScore where no key of the tile counts.
__device__ __forceinline__ void row_maximum(const int (&s)[kKeyGroups][4], int (&best)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    best[r] = max(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int n = 1; n < kKeyGroups; ++n) {
      best[r] = max(max(best[r], s[n][2 * r]), s[n][2 * r + 1]);
    }
    best[r] = quad_max(best[r]);
  }
}

// e[n][c] = 2^((s − best)·multiplier + shift), and the sum over the lane's keys. The difference of
// two accumulators is exact, so the largest score gives 2^shift whatever the size of the scores;
// kNoScore gives 0, also where `best` is kNoScore.
__device__ __forceinline__ void exponentials(const int (&s)[kKeyGroups][4], const int (&best)[2],
                                             const float (&multiplier)[2], const float (&shift)[2],
                                             float (&e)[kKeyGroups][4], float (&sum)[2]) {
  const float top[2] = {fmaxf(__int_as_float(best[0]), -FLT_MAX),
                        fmaxf(__int_as_float(best[1]), -FLT_MAX)};
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int r = c >> 1;
      const float below = __int_as_float(s[n][c]) - top[r];
      e[n][c] = ptx::ex2(fmaf(below, multiplier[r], shift[r]));
      sum[r] += e[n][c];
    }
  }
}

}  // namespace sage
