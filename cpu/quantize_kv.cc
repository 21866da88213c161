// sage_jax_quantize_kv (docs/abi.md, section 1), in sweeps over tiles of 64 tokens:
//   1. which keys are bad, each tile's sums of K (its part of the sample) and V and, for scales per channel, extremes of V;
//   2. per head: the means of K and V and the channel scales of V;
//   3. codes and tile scales;
//   4. with dp, over the codes of each head: what the backward pass scales its operands by.
// The second sweep over k and v finds most of them still in cache.
#include "means.h"
#include "tiles.h"

namespace sage::SAGE_ISA {
namespace {

struct Plan {
  const QuantizeKv& p;
  Shape s;
  int64_t tiles;
  bool* bad;               // [B, K, Sp]: valid, but holds a NaN or Inf
  int32_t* counts;         // [B, K, S64, 2]: keys and values that the tile's sums are of
  float *k_sums, *v_sums;  // [B, K, S64, Hp]: over the tile
  float *v_max, *v_min;    // [B, K, S64, Hp]
  float* v_amax;           // [B, K, Hp]: largest |v - v_mean|

  int64_t valid_keys(int64_t b) const {
    int64_t keys = p.bounds[3 * b + 1];
    return keys < 0 ? 0 : keys < s.S ? keys : s.S;
  }
  int64_t row_offset(int64_t b, int64_t j, int64_t k) const {
    return ((b * s.S + j) * s.K + k) * s.H;
  }
};

struct TileAt {
  int64_t b, k, head, first, valid;  // head = b K + k; valid keys of the tile come first
  TileAt(const Plan& plan, int64_t item) {
    int64_t tile = item % plan.tiles;
    head = item / plan.tiles;
    b = head / plan.s.K;
    k = head % plan.s.K;
    first = tile * kTile;
    int64_t left = plan.valid_keys(b) - first;
    valid = left < 0 ? 0 : left < kTile ? left : kTile;
  }
};

// Whether a key counts towards the mean that K loses: of many, sixteen of each 128 do (docs/abi.md, section 1).
bool in_sample(int64_t key, int64_t keys) {
  int64_t chunk = key / 128;
  return keys < 1024 || key % 128 / 16 == (chunk + chunk / 8) % 8;
}

// Loads the tile's rows, zeros for keys that take no part.
void load_tile(float* to, const Plan& plan, const TileAt& at, Array from) {
  const bool* bad = plan.bad + at.head * plan.s.Sp() + at.first;
  for (int64_t j = 0; j < kTile; ++j) {
    float* row = to + j * plan.s.Hp;
    if (j < at.valid && !bad[j]) {
      int64_t offset = plan.row_offset(at.b, at.first + j, at.k);
      load_row(row, from, offset, plan.s.H, plan.s.Hp);
    } else {
      __builtin_memset(row, 0, plan.s.Hp * sizeof(float));
    }
  }
}

// Which keys and values of a tile its sums are of.
struct Counted {
  bool keys[kTile], values[kTile];
};

// Loads the tile's rows, zeros for those that its sums are not of.
void find_bad(const Plan& plan, const TileAt& at, float* k, float* v, Counted& counted, int32_t* counts) {
  bool* bad = plan.bad + at.head * plan.s.Sp() + at.first;
  const auto load = [&](float* row, Array from, int64_t j) {
    load_row(row, from, plan.row_offset(at.b, at.first + j, at.k), plan.s.H, plan.s.Hp);
    return all_finite(row, plan.s.Hp);
  };
  counts[0] = counts[1] = 0;
  for (int64_t j = 0; j < kTile; ++j) {
    float *key = k + j * plan.s.Hp, *value = v + j * plan.s.Hp;
    bool valid = j < at.valid, good_key = valid && load(key, plan.p.k, j), good_value = valid && load(value, plan.p.v, j);
    bad[j] = valid && !(good_key && good_value);
    counts[0] += counted.keys[j] = good_key && in_sample(at.first + j, plan.s.S);
    counts[1] += counted.values[j] = good_value;
    if (!counted.keys[j]) __builtin_memset(key, 0, plan.s.Hp * sizeof(float));
    if (!good_value) __builtin_memset(value, 0, plan.s.Hp * sizeof(float));
  }
}

void summarise_tile(const Plan& plan, int64_t item, float* k, float* v) {
  TileAt at(plan, item);
  int64_t Hp = plan.s.Hp;
  Counted counted;
  find_bad(plan, at, k, v, counted, plan.counts + 2 * item);
  if (plan.p.smooth_k) {
    halving_sum(k, kTile, Hp);
    __builtin_memcpy(plan.k_sums + item * Hp, k, Hp * sizeof(float));
  }
  for (int64_t h = 0; h < Hp; h += kLanes) {
    F top = splat(-kInfinity), bottom = splat(kInfinity);
    for (int64_t j = 0; j < at.valid; ++j) {
      if (!counted.values[j]) continue;
      top = max(top, loadf(v + j * Hp + h));
      bottom = min(bottom, loadf(v + j * Hp + h));
    }
    store(plan.v_max + item * Hp + h, top);
    store(plan.v_min + item * Hp + h, bottom);
  }
  if (plan.p.smooth_v) {
    halving_sum(v, kTile, Hp);
    __builtin_memcpy(plan.v_sums + item * Hp, v, Hp * sizeof(float));
  }
}

// The mean of the tiles' sums (which are overwritten) over `count` tokens; 0 where `smooth` is not.
void finish_mean(float* mean, bool smooth, float* sums, int64_t tiles, int64_t Hp, int32_t count) {
  __builtin_memset(mean, 0, Hp * sizeof(float));
  if (!smooth || !tiles) return;
  add_tiles(sums, tiles, Hp);
  store_mean(mean, sums, count, Hp);
}

void finish_head(const Plan& plan, int64_t head) {
  const QuantizeKv& p = plan.p;
  int64_t Hp = plan.s.Hp, tiles = plan.tiles, first = head * tiles * Hp;
  float* v_mean = p.v_mean + head * Hp;
  int32_t keys = 0, values = 0;
  for (int64_t item = head * tiles; item < (head + 1) * tiles; ++item) {
    keys += plan.counts[2 * item];
    values += plan.counts[2 * item + 1];
  }
  finish_mean(p.k_mean + head * Hp, p.smooth_k, plan.k_sums + first, tiles, Hp, keys);
  finish_mean(v_mean, p.smooth_v, plan.v_sums + first, tiles, Hp, values);
  float* amax = plan.v_amax + head * Hp;
  const auto extremes = [&](int64_t h, auto use) {
    F top = splat(-kInfinity), bottom = splat(kInfinity);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      top = max(top, loadf(plan.v_max + first + tile * Hp + h));
      bottom = min(bottom, loadf(plan.v_min + first + tile * Hp + h));
    }
    use(top, bottom);
  };
  for (int64_t h = 0; h < Hp; h += kLanes) {
    extremes(h, [&](F top, F bottom) { store(amax + h, max(top, F{} - bottom)); });
  }
  drop_small_means(v_mean, amax, Hp);
  if (p.pv == Pv::int8) return;
  for (int64_t h = 0; h < Hp; h += kLanes) {
    F mean = p.pv == Pv::e4m3 ? loadf(v_mean + h) : F{};
    // Rounding keeps order: this is the largest of the rounded |v - mean|.
    extremes(h, [&](F top, F bottom) { store(amax + h, max(F{}, max(top - mean, mean - bottom))); });
  }
  for (int64_t h = 0; h < Hp; ++h) {
    float top = plan.v_amax[head * Hp + h], scale = 1;
    if (p.pv == Pv::e4m3) scale = Group(top, p.v_range).scale;
    if (p.pv == Pv::f16) scale = top < kTiny ? 0 : power_of_two(exponent_of(top));
    p.v_scale[head * Hp + h] = scale;
  }
}

float largest_of(const float* x, int64_t count) {
  F top{};
  for (int64_t i = 0; i < count; i += kLanes) top = max(top, absolute(loadf(x + i)));
  return largest(top);
}

// INT8 codes of a tile of 64 × Hp with one scale, which is returned.
float int8_tile(int8_t* codes, const float* x, int64_t Hp) {
  Group group(largest_of(x, kTile * Hp), 127);
  for (int64_t i = 0; i < kTile * Hp; i += kLanes) {
    store_codes(codes + i, int8_values(loadf(x + i), splat(group.inverse)));
  }
  return group.scale;
}

// Codes [64, Hp] of one byte to the transposed layout [Hp, Sp].
void store_transposed(uint8_t* to, int64_t Sp, const uint8_t* codes, int64_t Hp, uint8_t* rows) {
  for (int64_t group = 0; group < kTile; group += 16) {
    for (int p = 0; p < 16; ++p) {
      __builtin_memcpy(rows + p * Hp, codes + (group + kPi[p]) * Hp, Hp);
    }
    for (int64_t h = 0; h < Hp; h += 16) transpose_bytes(to + h * Sp + group, Sp, rows + h, Hp);
  }
}

struct TileScratch {
  float *k, *v;                // [64, Hp]
  uint8_t *codes, *reordered;  // [64, Hp], [16, Hp]
};

// Subtracts a mean from the tokens that take part.
void subtract(float* x, const float* mean, const Plan& plan, const TileAt& at) {
  const bool* bad = plan.bad + at.head * plan.s.Sp() + at.first;
  for (int64_t j = 0; j < at.valid; ++j) {
    if (bad[j]) continue;
    float* row = x + j * plan.s.Hp;
    for (int64_t h = 0; h < plan.s.Hp; h += kLanes) store(row + h, loadf(row + h) - loadf(mean + h));
  }
}

void encode_k(const Plan& plan, const TileAt& at, int64_t item, const TileScratch& scratch) {
  const Shape& s = plan.s;
  const bool* bad = plan.bad + at.head * s.Sp() + at.first;
  subtract(scratch.k, plan.p.k_mean + at.head * s.Hp, plan, at);
  auto* codes = reinterpret_cast<int8_t*>(scratch.codes);
  float scale = int8_tile(codes, scratch.k, s.Hp);
  int64_t keys = s.S - at.first < kTile ? s.S - at.first : kTile;
  for (int64_t j = 0; j < keys; ++j) {
    if (!bad[j]) continue;
    codes[j * s.Hp] = -128;
    if (scale >= 0) scale = scale == 0 ? -0x1p-126f : -scale;
  }
  plan.p.k_scale[item] = scale;
  __builtin_memcpy(plan.p.k8 + (at.head * s.S + at.first) * s.Hp, codes, keys * s.Hp);
}

void encode_v(const Plan& plan, const TileAt& at, int64_t item, const TileScratch& scratch) {
  const Shape& s = plan.s;
  int64_t keys = s.S - at.first < kTile ? s.S - at.first : kTile;
  int64_t dense = (at.head * s.S + at.first) * s.Hp;        // in [B, K, S, Hp]
  int64_t transposed = at.head * s.Hp * s.Sp() + at.first;  // in [B, K, Hp, Sp]
  const float* amax = plan.v_amax + at.head * s.Hp;
  auto* halves = static_cast<uint16_t*>(plan.p.v_pv) + dense;
  auto* bytes = static_cast<uint8_t*>(plan.p.v_pv) + transposed;
  if (plan.p.pv == Pv::int8) {
    plan.p.v_scale[item] = int8_tile(reinterpret_cast<int8_t*>(scratch.codes), scratch.v, s.Hp);
    store_transposed(bytes, s.Sp(), scratch.codes, s.Hp, scratch.reordered);
    return;
  }
  for (int64_t h = 0; h < s.Hp; h += kLanes) {
    F inverse;
    for (int i = 0; i < kLanes; ++i) {
      float top = amax[h + i];
      inverse[i] = plan.p.pv == Pv::e4m3 ? Group(top, plan.p.v_range).inverse
                   : top < kTiny         ? 0
                                         : power_of_two(-exponent_of(top));
    }
    for (int64_t j = 0; j < (plan.p.pv == Pv::e4m3 ? kTile : keys); ++j) {
      F x = loadf(scratch.v + j * s.Hp + h);
      if (plan.p.pv == Pv::bf16) {
        store_bf16(halves + j * s.Hp + h, x);
      } else if (plan.p.pv == Pv::f16) {
        store_f16(halves + j * s.Hp + h, x * inverse);
      } else {
        store(scratch.codes + j * s.Hp + h, __builtin_convertvector(e4m3_code(x * inverse), Bytes));
      }
    }
  }
  if (plan.p.pv == Pv::e4m3) {
    store_transposed(bytes, s.Sp(), scratch.codes, s.Hp, scratch.reordered);
  }
}

void encode_v_dp(const Plan& plan, const TileAt& at, int64_t item, const TileScratch& scratch) {
  const Shape& s = plan.s;
  int64_t keys = s.S - at.first < kTile ? s.S - at.first : kTile;
  int64_t dense = (at.head * s.S + at.first) * s.Hp;
  if (plan.p.dp == Dp::int8) {
    auto* codes = reinterpret_cast<int8_t*>(scratch.codes);
    plan.p.v_dp_scale[item] = int8_tile(codes, scratch.v, s.Hp);
    __builtin_memcpy(static_cast<int8_t*>(plan.p.v_dp) + dense, codes, keys * s.Hp);
  } else if (plan.p.dp == Dp::bf16) {
    auto* to = static_cast<uint16_t*>(plan.p.v_dp) + dense;
    for (int64_t i = 0; i < keys * s.Hp; i += kLanes) store_bf16(to + i, loadf(scratch.v + i));
  }
}

// What the backward pass scales its operands by: the largest |K̂| of each channel, and norm of a row of v_dp.
void find_largest(const Plan& plan, int64_t head) {
  const QuantizeKv& p = plan.p;
  const Shape& s = plan.s;
  const bool* bad = plan.bad + head * s.Sp();
  float *k_max = p.k_max + head * s.Hp, v_norm = 0;
  __builtin_memset(k_max, 0, s.Hp * sizeof(float));
  for (int64_t j = 0; j < s.S; ++j) {
    int64_t tile = head * s.S64() + j / kTile, at = (head * s.S + j) * s.Hp;
    float length = 0;
    if (p.dp == Dp::bf16) {
      length = norm(s.Hp, [&](int64_t h) { return load_bf16(static_cast<const uint16_t*>(p.v_dp) + at + h); });
    } else {  // squares of codes add up exactly
      F sum{};
      for (int64_t h = 0; h < s.Hp; h += kLanes) {
        F code = load_codes(static_cast<const int8_t*>(p.v_dp) + at + h);
        sum += code * code;
      }
      length = __builtin_sqrtf(total(sum)) * p.v_dp_scale[tile];
    }
    if (length > v_norm) v_norm = length;
    if (bad[j]) continue;
    F scale = splat(__builtin_fabsf(p.k_scale[tile]));
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      store(k_max + h, max(loadf(k_max + h), absolute(load_codes(p.k8 + at + h)) * scale));
    }
  }
  p.v_norm[head] = v_norm;
}

}  // namespace

void quantize_kv(const QuantizeKv& p, Pool& pool) {
  const Shape& s = p.shape;
  int64_t heads = s.B * s.K, items = heads * s.S64();
  Scratch shared;
  Plan plan = {p,
               s,
               s.S64(),
               shared.take<bool>(heads * s.Sp()),
               shared.take<int32_t>(2 * items),
               shared.take<float>(p.smooth_k ? items * s.Hp : 0),
               shared.take<float>(p.smooth_v ? items * s.Hp : 0),
               shared.take<float>(items * s.Hp),
               shared.take<float>(items * s.Hp),
               shared.take<float>(heads * s.Hp)};
  on_workers(pool, items, [&](Items& work) {
    Scratch scratch;
    auto *k = scratch.take<float>(kTile * s.Hp), *v = scratch.take<float>(kTile * s.Hp);
    for (int64_t item; work.take(&item);) summarise_tile(plan, item, k, v);
  });
  on_workers(pool, heads, [&](Items& work) {
    for (int64_t head; work.take(&head);) finish_head(plan, head);
  });
  on_workers(pool, items, [&](Items& work) {
    Scratch memory;
    TileScratch scratch = {memory.take<float>(kTile * s.Hp), memory.take<float>(kTile * s.Hp),
                           memory.take<uint8_t>(kTile * s.Hp), memory.take<uint8_t>(16 * s.Hp)};
    for (int64_t item; work.take(&item);) {
      TileAt at(plan, item);
      load_tile(scratch.k, plan, at, p.k);
      load_tile(scratch.v, plan, at, p.v);
      encode_k(plan, at, item, scratch);
      const float* v_mean = p.v_mean + at.head * s.Hp;
      if (p.pv == Pv::e4m3 && p.smooth_v) subtract(scratch.v, v_mean, plan, at);
      encode_v(plan, at, item, scratch);
      if (p.pv != Pv::e4m3 && p.smooth_v) subtract(scratch.v, v_mean, plan, at);
      encode_v_dp(plan, at, item, scratch);
    }
  });
  if (p.dp == Dp::none) return;
  on_workers(pool, heads, [&](Items& work) {
    for (int64_t head; work.take(&head);) find_largest(plan, head);
  });
}

}  // namespace sage::SAGE_ISA
