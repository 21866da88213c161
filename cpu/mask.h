// Who sees whom (docs/abi.md, "Common operands"), one 64-bit word per query and tile of 64 keys.
#pragma once

#include "numerics.h"

namespace sage::SAGE_ISA {

constexpr uint64_t kAll = ~uint64_t{0};

struct Interval {  // keys begin ... end - 1; empty when begin >= end
  int64_t begin, end;
};

// The keys that bounds and window leave to query t.
inline Interval visible_interval(const Masks& masks, int64_t S, int64_t b, int64_t t) {
  const int32_t* bounds = masks.bounds + 3 * b;
  if (t >= bounds[0]) return {0, 0};
  int64_t diagonal = t + bounds[2];
  int64_t keys = bounds[1] < S ? bounds[1] : S;
  int64_t begin = masks.window_left >= kOpen ? 0 : diagonal - masks.window_left;
  int64_t end = masks.window_right >= kOpen ? keys : diagonal + masks.window_right + 1;
  return {begin > 0 ? begin : 0, end < keys ? end : keys};
}

inline uint64_t interval_bits(Interval keys, int64_t first) {
  int64_t begin = keys.begin - first, end = keys.end - first;
  if (end <= 0 || begin >= kTile || begin >= end) return 0;
  uint64_t bits = end >= kTile ? kAll : (uint64_t{1} << end) - 1;
  return begin <= 0 ? bits : bits & ~((uint64_t{1} << begin) - 1);
}

inline uint64_t segment_bits(const int32_t* kv_seg, int64_t keys, int32_t id) {
  uint64_t bits = 0;
  for (int64_t j = 0; j < keys; ++j) bits |= static_cast<uint64_t>(kv_seg[j] == id) << j;
  return bits;
}

inline uint64_t bool_bits(const bool* mask, int64_t keys) {
  uint64_t bits = 0;
  int64_t j = 0;
  for (; j + 8 <= keys; j += 8) {  // eight bytes of 0 or 1 become eight bits by one multiplication
    uint64_t bytes;
    __builtin_memcpy(&bytes, mask + j, 8);
    bits |= (bytes * 0x0102040810204080u >> 56) << j;
  }
  for (; j < keys; ++j) bits |= static_cast<uint64_t>(mask[j]) << j;
  return bits;
}

// The keys `first ... first + 63` that query t of head n sees; `keys` is its visible_interval.
inline uint64_t visible_bits(const Masks& masks, const Shape& shape, Interval keys, int64_t b,
                             int64_t n, int64_t t, int64_t first) {
  uint64_t bits = interval_bits(keys, first);
  if (!bits) return 0;
  int64_t count = shape.S - first < kTile ? shape.S - first : kTile;
  if (masks.q_seg) {
    bits &= segment_bits(masks.kv_seg + b * shape.S + first, count, masks.q_seg[b * shape.T + t]);
  }
  if (masks.mask && masks.mask_tile == kTile) {
    const Broadcast4& stride = masks.mask_strides;
    int64_t at = b * stride.b + n * stride.n + t / kTile * stride.t + first / kTile * stride.s;
    bits &= masks.mask[at] ? kAll : 0;
  } else if (masks.mask) {
    const Broadcast4& stride = masks.mask_strides;
    const bool* row = masks.mask + b * stride.b + n * stride.n + t * stride.t + first * stride.s;
    bits &= stride.s ? bool_bits(row, count) : *row ? kAll : 0;
  }
  return bits;
}

// The tile's bias times log2 e for query t of head n, 0 past the last key.
inline void load_bias(float* to, const Masks& masks, const Shape& shape, int64_t b, int64_t n,
                      int64_t t, int64_t first) {
  const Broadcast4& stride = masks.bias_strides;
  const float* row = masks.bias + b * stride.b + n * stride.n + t * stride.t + first * stride.s;
  for (int64_t j = 0; j < kTile; ++j) {
    to[j] = first + j < shape.S ? row[j * stride.s] * kLog2e : 0.f;
  }
}

// The keys of a tile that hold a NaN or Inf: only tiles with a negative scale have any.
inline uint64_t bad_bits(const int8_t* k8, float k_scale, int64_t keys, int64_t Hp) {
  uint64_t bits = 0;
  if (k_scale < 0) {
    for (int64_t j = 0; j < keys; ++j) bits |= static_cast<uint64_t>(k8[j * Hp] == -128) << j;
  }
  return bits;
}

// Lanes whose bit is set, as a mask of all ones or zeros; `bits` starts at the first lane.
inline I lane_mask(uint64_t bits) {
  I powers;
  for (int i = 0; i < kLanes; ++i) powers[i] = 1 << i;
  return (splat_int(static_cast<int32_t>(bits)) & powers) != 0;
}

}  // namespace sage::SAGE_ISA
