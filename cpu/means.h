// Sums over tokens in the order of docs/abi.md, section 1, which makes means reproducible.
#pragma once

#include "numerics.h"

namespace sage::SAGE_ISA {

// Adds the second half of `rows` rows to the first, again and again: the order that makes sums
// reproducible.
inline void halving_sum(float* x, int64_t rows, int64_t Hp) {
  for (int64_t half = rows / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half * Hp; i += kLanes) {
      store(x + i, loadf(x + i) + loadf(x + half * Hp + i));
    }
  }
}

// The same order as halving_sum over the tiles' sums, zero-padded to a power of two.
inline void add_tiles(float* sums, int64_t tiles, int64_t Hp) {
  int64_t padded = 1;
  while (padded < tiles) padded *= 2;
  for (int64_t half = padded / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half && i < tiles; ++i) {
      for (int64_t h = 0; h < Hp; h += kLanes) {
        float* to = sums + i * Hp + h;
        store(to, loadf(to) + (i + half < tiles ? loadf(to + half * Hp) : F{}));
      }
    }
    if (tiles > half) tiles = half;
  }
}

// sums · (1 / count), rounded to bf16 values.
inline void store_mean(float* mean, const float* sums, int64_t count, int64_t Hp) {
  float reciprocal = 1.f / static_cast<float>(count > 1 ? count : 1);
  for (int64_t h = 0; h < Hp; h += kLanes) {
    store(mean + h, round_bf16(loadf(sums + h) * reciprocal));
  }
}

// A mean of V that is so many times smaller than its largest value is not subtracted.
constexpr float kSmallMean = 256, kSmallSampleMean = 8;

inline void drop_small_means(float* mean, const float* largest, int64_t Hp, float times = kSmallMean) {
  for (int64_t h = 0; h < Hp; ++h) {
    if (times * (mean[h] < 0 ? -mean[h] : mean[h]) < largest[h]) mean[h] = 0;
  }
}

}  // namespace sage::SAGE_ISA
