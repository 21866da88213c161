// sage_jax_quantize_kv (docs/abi.md, section 1):
//   1. per head: the means of K and V, and what V's channel scales are for, from a sample of the tokens;
//   2. per tile of 64 tokens: which keys are bad and, for scales per channel, the largest values;
//   3. per head: the channel scales of V;
//   4. per tile: codes and tile scales;
//   5. with dp, over the codes of each head: what the backward pass scales its operands by.
// The second sweep over k and v finds most of them still in cache.
#include "means.h"
#include "tiles.h"

namespace sage::SAGE_ISA {
namespace {

struct Plan {
  const QuantizeKv& p;
  Shape s;
  int64_t tiles;
  bool* bad;      // [B, K, Sp]: valid, but holds a NaN or Inf
  float* v_max;   // [B, K, S64, Hp]: the largest |v|, of e4m3 |v - v_mean|
  float* v_amax;  // [B, K, Hp]: what the channel's scale is for
  bool channel_scales;

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

constexpr int64_t kSampledKeys = 128, kSampledValues = 256;  // tokens that stand for a sequence
constexpr float kHeadroom = 3;                               // of channel scales over the sample
constexpr float kLeastLimit = 0x1p-100f;

// Token i of a sample of `size`: all tokens of so few; of more one of each of `size` equal parts, at another place of each.
int64_t sample_token(int64_t i, int64_t size, int64_t valid) {
  return valid <= size ? i : (size * i + 79 * i % size) * valid / (size * size);
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

// The rows of a sample [size, Hp], zeros for tokens that do not count, and how many do. `counts` says which.
int64_t load_sample(float* rows, bool* counts, int64_t size, const Plan& plan, int64_t head, Array from) {
  int64_t b = head / plan.s.K, valid = plan.valid_keys(b), Hp = plan.s.Hp, total = 0;
  for (int64_t i = 0; i < size; ++i) {
    float* row = rows + i * Hp;
    counts[i] = i < valid;
    if (counts[i]) {
      load_row(row, from, plan.row_offset(b, sample_token(i, size, valid), head % plan.s.K), plan.s.H, Hp);
      counts[i] = all_finite(row, Hp);
    }
    if (!counts[i]) __builtin_memset(row, 0, Hp * sizeof(float));
    total += counts[i];
  }
  return total;
}

// Rows i, i + 16, ... are added one after the other, and then the sixteen sums by halving; to the first row.
void sum_sample(float* rows, int64_t size, int64_t Hp) {
  for (int64_t i = 16 * Hp; i < size * Hp; i += kLanes) {
    float* to = rows + i % (16 * Hp);
    store(to, loadf(to) + loadf(rows + i));
  }
  halving_sum(rows, 16, Hp);
}

void summarise_head(const Plan& plan, int64_t head, float* rows) {
  const QuantizeKv& p = plan.p;
  int64_t Hp = plan.s.Hp;
  float *k_mean = p.k_mean + head * Hp, *v_mean = p.v_mean + head * Hp, *amax = plan.v_amax + head * Hp;
  bool counts[kSampledValues];
  __builtin_memset(k_mean, 0, Hp * sizeof(float));
  __builtin_memset(v_mean, 0, Hp * sizeof(float));
  if (p.smooth_k) {
    int64_t total = load_sample(rows, counts, kSampledKeys, plan, head, p.k);
    sum_sample(rows, kSampledKeys, Hp);
    store_mean(k_mean, rows, total, Hp);
  }
  if (!p.smooth_v && !plan.channel_scales) return;
  int64_t total = load_sample(rows, counts, kSampledValues, plan, head, p.v);
  float *tops = rows + kSampledValues * Hp, *bottoms = tops + Hp;
  for (int64_t h = 0; h < Hp; h += kLanes) {
    F top = splat(-kInfinity), bottom = splat(kInfinity);
    for (int64_t i = 0; i < kSampledValues; ++i) {
      if (!counts[i]) continue;
      top = max(top, loadf(rows + i * Hp + h));
      bottom = min(bottom, loadf(rows + i * Hp + h));
    }
    store(tops + h, top);
    store(bottoms + h, bottom);
    store(amax + h, max(top, F{} - bottom));
  }
  if (p.smooth_v) {
    sum_sample(rows, kSampledValues, Hp);
    store_mean(v_mean, rows, total, Hp);
    drop_small_means(v_mean, amax, Hp, kSmallSampleMean);
  }
  bool all = plan.valid_keys(head / plan.s.K) <= kSampledValues;
  for (int64_t h = 0; h < Hp; h += kLanes) {
    F mean = p.pv == Pv::e4m3 ? loadf(v_mean + h) : F{};
    // Rounding keeps order: this is the largest of the rounded |v - mean|.
    F most = max(F{}, max(loadf(tops + h) - mean, mean - loadf(bottoms + h)));
    if (!all) most = min(max(most * splat(kHeadroom), splat(kLeastLimit)), splat(__FLT_MAX__));
    store(amax + h, most);
  }
}

void find_bad(const Plan& plan, int64_t item, float* k, float* v) {
  TileAt at(plan, item);
  int64_t Hp = plan.s.Hp;
  bool* bad = plan.bad + at.head * plan.s.Sp() + at.first;
  const auto load = [&](float* row, Array from, int64_t j) {
    load_row(row, from, plan.row_offset(at.b, at.first + j, at.k), plan.s.H, Hp);
    return all_finite(row, Hp);
  };
  for (int64_t j = 0; j < kTile; ++j) {
    bad[j] = j < at.valid && !(load(k, plan.p.k, j) & load(v + j * Hp, plan.p.v, j));
  }
  if (!plan.channel_scales) return;
  for (int64_t h = 0; h < Hp; h += kLanes) {
    F mean = plan.p.pv == Pv::e4m3 ? loadf(plan.p.v_mean + at.head * Hp + h) : F{}, top{};
    for (int64_t j = 0; j < at.valid; ++j) {
      if (!bad[j]) top = max(top, absolute(loadf(v + j * Hp + h) - mean));
    }
    store(plan.v_max + item * Hp + h, top);
  }
}

void finish_head(const Plan& plan, int64_t head) {
  const QuantizeKv& p = plan.p;
  int64_t Hp = plan.s.Hp;
  float *amax = plan.v_amax + head * Hp, *scale = p.v_scale + head * Hp;
  if (plan.channel_scales && plan.valid_keys(head / plan.s.K) > kSampledValues) {
    for (int64_t item = head * plan.tiles; item < (head + 1) * plan.tiles; ++item) {
      const float* most = plan.v_max + item * Hp;
      for (int64_t h = 0; h < Hp; h += kLanes) store(amax + h, max(loadf(amax + h), loadf(most + h)));
    }
  }
  for (int64_t h = 0; h < Hp; ++h) {
    scale[h] = 1;
    if (p.pv == Pv::e4m3) scale[h] = Group(amax[h], p.v_range).scale;
    if (p.pv == Pv::f16) scale[h] = amax[h] < kTiny ? 0 : power_of_two(exponent_of(amax[h]));
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
  bool channel_scales = p.pv == Pv::e4m3 || p.pv == Pv::f16;
  Plan plan = {p,
               s,
               s.S64(),
               shared.take<bool>(heads * s.Sp()),
               shared.take<float>(channel_scales ? items * s.Hp : 0),
               shared.take<float>(heads * s.Hp),
               channel_scales};
  on_workers(pool, heads, [&](Items& work) {
    Scratch scratch;
    auto* rows = scratch.take<float>((kSampledValues + 2) * s.Hp);
    for (int64_t head; work.take(&head);) summarise_head(plan, head, rows);
  });
  on_workers(pool, items, [&](Items& work) {
    Scratch scratch;
    auto *k = scratch.take<float>(s.Hp), *v = scratch.take<float>(kTile * s.Hp);
    for (int64_t item; work.take(&item);) find_bad(plan, item, k, v);
  });
  if (p.pv != Pv::int8) {
    for (int64_t head = 0; head < heads; ++head) finish_head(plan, head);
  }
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
