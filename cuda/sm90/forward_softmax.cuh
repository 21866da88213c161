// From INT8 scores in wgmma accumulators to probabilities: masks, exponentials, sums.
//
// Lane 4g + t of a warp holds in s[4n], s[4n + 1] the scores of row g and keys 8n + 2t, 8n + 2t + 1, in
// s[4n + 2], s[4n + 3] those of row g + 8, as the bits of floats that start at Config::kStart.
#pragma once

#include "common/mask.cuh"
#include "common/scale.cuh"
#include "common/tile.cuh"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"
#include "sm90/forward_interpolation.cuh"

namespace sage::sm90 {

// Replaces the scores that do not count by -inf, and poisons the rows that see a bad key.
// `query` is the row of s[4n], s[4n + 1]; that of s[4n + 2], s[4n + 3] is query + 8. Bits 0 and 1 of `none`: no row sees any of
// the first 64 keys, of the others; of `some`: they have to be asked pair by pair. Where neither is set all rows see all of them.
// Bad keys, segments and masks of pairs are asked for in any case.
template <class Config>
__device__ __forceinline__ void hide(int (&s)[Config::kScores], const Mask& mask, int query, int key,
                                     uint32_t none, uint32_t some, bool bad_keys, const unsigned char* tile,
                                     float (&l)[2]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  if (!bad_keys && mask.spans_only()) {
#pragma unroll
    for (int part = 0; part < Config::kScores; part += 32) {  // 64 keys
      if (!((none | some) >> part / 32 & 1u)) continue;
      Span seen[2] = {mask.keys_of(query), mask.keys_of(query + 8)};
      if (none >> part / 32 & 1u) seen[0].count = seen[1].count = 0;
#pragma unroll
      for (int i = part; i < part + 32; ++i) {
        s[i] = seen[i >> 1 & 1].contains(key + 2 * t + i / 4 * 8 + (i & 1)) ? s[i] : kNoScore;
      }
    }
    return;
  }
#pragma unroll
  for (int part = 0; part < Config::kScores; part += 32) {
    uint32_t seen = 0, bad = 0;
#pragma unroll 1
    for (int i = 31; i >= 0; --i) {
      const int within = (part + i) / 4 * 8 + 2 * t + (i & 1), r = i >> 1 & 1;
      bool counts = !(none >> part / 32 & 1u) && mask.visible(query + 8 * r, key + within);
      if (counts && bad_keys) {
        const auto code = static_cast<int8_t>(tile[SharedTile<8, Config::kHeadDim>::offset(within, 0)]);
        counts = code != kBadCode;
        bad |= counts ? 0u : 1u << r;
      }
      seen = seen << 1 | (counts ? 1u : 0u);
    }
    if (bad & 1) l[0] = NAN;
    if (bad & 2) l[1] = NAN;
#pragma unroll
    for (int i = 0; i < 32; ++i) s[part + i] = seen >> i & 1 ? s[part + i] : kNoScore;
  }
}

// Probabilities of keys 64 to 127 of a tile by interpolation, and their sums added to l.
template <class Config>
__device__ __forceinline__ void interpolated_exponentials(const int (&scores)[Config::kScores], const float (&multiplier)[2],
                                                          const float (&shift)[2], float (&l)[2],
                                                          uint32_t (&p)[Config::kProbabilities]) {
  const Interpolation rows[2] = {{multiplier[0], shift[0]}, {multiplier[1], shift[1]}};
  uint32_t sum[2];
#pragma unroll
  for (int i = Config::kScores / 2; i < Config::kScores; i += 8) {  // 16 keys
    uint32_t e[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        e[n][r] = rows[r](scores[i + 4 * n + 2 * r], scores[i + 4 * n + 2 * r + 1]);
        sum[r] = n == 0 && i == Config::kScores / 2 ? e[n][r] : ptx::add_f16x2(sum[r], e[n][r]);  // at most 8 · 64
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      p[i / 4 + r] = ptx::cvt_e4m3x2_f16x2(e[0][r]) | static_cast<uint32_t>(ptx::cvt_e4m3x2_f16x2(e[1][r])) << 16;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float low, high;
    ptx::cvt_f32_f16x2(low, high, sum[r]);
    l[r] += low + high;
  }
}

// Probabilities of 16 keys at a time, with two warpgroups in a pipeline: while the unit for exponentials works on some, the
// arguments of the next are computed, and the ones before are summed and packed. e = 2^(score ·
// multiplier + shift), whose shift takes the accumulators' start away again: kStart · multiplier, rounded,
// is off by at most a unit of the INT8 product, which itself is off by about 200.
// `zero` makes arguments depend on earlier results, for ptxas: it computes all arguments first otherwise,
// and leaves that unit alone with the rest.
template <class Config>
__device__ __forceinline__ void exponentials(const int (&scores)[Config::kScores],
                                             const float (&multiplier)[Config::kKeys / kTileKeys][2],
                                             const float (&shift)[Config::kKeys / kTileKeys][2],
                                             float zero, float (&l)[2],
                                             uint32_t (&p)[Config::kProbabilities]) {
  using Values = typename Config::Values;
  constexpr int kChunk = 8, kChunks = Config::kScores / kChunk / (Config::kInterpolates ? 2 : 1);
  constexpr int kAhead = Config::kGroups == 2 ? 1 : 0;  // with three, other warps fill the gaps
  float x[2][kChunk], e[2][kChunk] = {}, sum[2][2];
  const auto argue = [&](int c) {
    const int h = c * 16 / kTileKeys;
    float start[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) start[r] = c > 1 && kAhead > 0 ? fmaf(e[c & 1][2 * r], zero, shift[h][r]) : shift[h][r];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int r = i >> 1 & 1;
      x[c & 1][i] = fmaf(__int_as_float(scores[kChunk * c + i]), multiplier[h][r], start[r]);
    }
  };
  const auto finish = [&](int c) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      float& of = sum[i & 1][i >> 1 & 1];
      of = c == 0 && i < 4 ? e[c & 1][i] : of + e[c & 1][i];
    }
    Values::pack(p + Values::kRegisters * c, e[c & 1]);
  };
  if (kAhead > 0) argue(0);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (c + kAhead < kChunks) argue(c + kAhead);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) e[c & 1][i] = ptx::ex2(x[c & 1][i]);
    if (c >= kAhead) finish(c - kAhead);
  }
  if (kAhead > 0) finish(kChunks - 1);
  l[0] += sum[0][0] + sum[1][0];
  l[1] += sum[0][1] + sum[1][1];
  if constexpr (Config::kInterpolates) interpolated_exponentials<Config>(scores, multiplier[1], shift[1], l, p);
}

}  // namespace sage::sm90
