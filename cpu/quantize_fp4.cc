// sage_jax_quantize_kv_fp4 and sage_jax_quantize_q_fp4 (docs/nvfp4.md).
//
// Keys and values in five sweeps, over tiles of 64 tokens and over heads in turn: which keys are
// bad and each tile's sums; means; each tile's largest magnitude; tensor scales; codes. Queries in
// blocks of 128; then ΔS in tiles of 64 keys.
#include "fp4.h"
#include "means.h"
#include "tiles.h"

namespace sage::SAGE_ISA {
namespace {

int64_t clamp_count(int64_t count, int64_t most) {
  return count < 0 ? 0 : count < most ? count : most;
}

float largest_of(const float* x, int64_t count) {
  F top{};
  for (int64_t i = 0; i < count; i += kLanes) top = max(top, absolute(loadf(x + i)));
  return largest(top);
}

void subtract(float* row, const float* mean, int64_t Hp) {
  for (int64_t h = 0; h < Hp; h += kLanes) store(row + h, loadf(row + h) - loadf(mean + h));
}

// to = max(to, |x|), channel by channel.
void raise_to_magnitudes(float* to, const float* x, int64_t Hp) {
  for (int64_t h = 0; h < Hp; h += kLanes) {
    F y = loadf(x + h);
    store(to + h, max(loadf(to + h), max(y, F{} - y)));
  }
}

void multiply(float* x, float factor, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, loadf(x + i) * factor);
}

void encode_row(uint8_t* codes, uint8_t* scale, const float* x, int64_t count, bool four_or_six) {
  for (int64_t i = 0; i < count; i += kFp4Block) {
    encode_block(codes + i / 2, scale + i / kFp4Block, x + i, four_or_six);
  }
}

struct Side {  // what a tile knows of K, or of V
  Array from;
  bool smooth;
  float *sums, *amax;     // [B, K, S64, Hp], [B, K, S64]
  float *mean, *tensor;  // [B, K, Hp], [B, K]
  float* largest;        // of |V|, [B, K, S64, Hp]; null for K
};

struct Plan {
  const QuantizeKvFp4& p;
  Shape s;
  bool* bad;  // [B, K, Sp]: valid, but holds a NaN or Inf
  Side sides[2];  // K, V
};

struct TileAt {
  int64_t b, k, head, first, valid;  // valid keys of the tile come first
  bool* bad;
  TileAt(const Plan& plan, int64_t item) {
    const Shape& s = plan.s;
    head = item / s.S64();
    first = item % s.S64() * kTile;
    b = head / s.K;
    k = head % s.K;
    valid = clamp_count(clamp_count(plan.p.bounds[3 * b + 1], s.S) - first, kTile);
    bad = plan.bad + head * s.Sp() + first;
  }
};

// The tile's rows [64, Hp], smoothed once the mean is known; zeros for keys that take no part.
void load_tile(float* to, const Plan& plan, const TileAt& at, const Side& side, bool smoothed) {
  const Shape& s = plan.s;
  for (int64_t j = 0; j < kTile; ++j) {
    float* row = to + j * s.Hp;
    if (j >= at.valid || at.bad[j]) {
      __builtin_memset(row, 0, s.Hp * sizeof(float));
      continue;
    }
    load_row(row, side.from, ((at.b * s.S + at.first + j) * s.K + at.k) * s.H, s.H, s.Hp);
    if (smoothed) subtract(row, side.mean + at.head * s.Hp, s.Hp);
  }
}

void find_bad(const Plan& plan, const TileAt& at, float* row) {
  const Shape& s = plan.s;
  for (int64_t j = 0; j < kTile; ++j) {
    at.bad[j] = false;
    for (const Side& side : plan.sides) {
      if (j >= at.valid) continue;
      load_row(row, side.from, ((at.b * s.S + at.first + j) * s.K + at.k) * s.H, s.H, s.Hp);
      at.bad[j] |= !all_finite(row, s.Hp);
    }
  }
}

void sum_tile(const Plan& plan, int64_t item, float* x) {
  TileAt at(plan, item);
  find_bad(plan, at, x);
  for (const Side& side : plan.sides) {
    if (!side.smooth) continue;
    load_tile(x, plan, at, side, false);
    if (side.largest) {
      float* largest = side.largest + item * plan.s.Hp;
      __builtin_memset(largest, 0, plan.s.Hp * sizeof(float));
      for (int64_t j = 0; j < kTile; ++j) raise_to_magnitudes(largest, x + j * plan.s.Hp, plan.s.Hp);
    }
    halving_sum(x, kTile, plan.s.Hp);
    __builtin_memcpy(side.sums + item * plan.s.Hp, x, plan.s.Hp * sizeof(float));
  }
}

void find_means(const Plan& plan, int64_t head) {
  const Shape& s = plan.s;
  const bool* bad = plan.bad + head * s.Sp();
  int64_t count = 0, keys = clamp_count(plan.p.bounds[3 * (head / s.K) + 1], s.S);
  for (int64_t j = 0; j < keys; ++j) count += !bad[j];
  for (const Side& side : plan.sides) {
    float* mean = side.mean + head * s.Hp;
    __builtin_memset(mean, 0, s.Hp * sizeof(float));
    if (!side.smooth || !s.S64()) continue;
    float* sums = side.sums + head * s.S64() * s.Hp;
    add_tiles(sums, s.S64(), s.Hp);
    store_mean(mean, sums, count, s.Hp);
    if (!side.largest) continue;
    float* largest = side.largest + head * s.S64() * s.Hp;
    for (int64_t i = 1; i < s.S64(); ++i) raise_to_magnitudes(largest, largest + i * s.Hp, s.Hp);
    drop_small_means(mean, largest, s.Hp);
  }
}

void find_tensor_scale(const Plan& plan, int64_t head) {
  for (const Side& side : plan.sides) {
    float top = 0;
    for (int64_t tile = 0; tile < plan.s.S64(); ++tile) {
      float amax = side.amax[head * plan.s.S64() + tile];
      if (amax > top) top = amax;
    }
    side.tensor[head] = TensorScale(top).scale;
  }
}

void encode_keys(const Plan& plan, const TileAt& at, float* x) {
  const Shape& s = plan.s;
  load_tile(x, plan, at, plan.sides[0], true);
  multiply(x, inverse_power(plan.sides[0].tensor[at.head]), kTile * s.Hp);
  for (int64_t j = 0; j < kTile && at.first + j < s.S; ++j) {
    int64_t row = at.head * s.S + at.first + j;
    uint8_t* scale = plan.p.k4.scale + row * s.Hp / kFp4Block;
    encode_row(plan.p.k4.codes + row * s.Hp / 2, scale, x + j * s.Hp, s.Hp, plan.p.four_or_six);
    if (at.bad[j]) *scale = kNanScale;
  }
}

void encode_values(const Plan& plan, const TileAt& at, float* x) {
  const Shape& s = plan.s;
  load_tile(x, plan, at, plan.sides[1], true);
  multiply(x, inverse_power(plan.sides[1].tensor[at.head]), kTile * s.Hp);
  for (int64_t h = 0; h < s.Hp; ++h) {
    int64_t at_token = (at.head * s.Hp + h) * s.Sp() + at.first;
    float channel[kTile];
    for (int64_t j = 0; j < kTile; ++j) channel[j] = x[j * s.Hp + h];
    encode_row(plan.p.v4.codes + at_token / 2, plan.p.v4.scale + at_token / kFp4Block, channel,
               kTile, plan.p.four_or_six);
  }
}

// ------------------------------------------------------------------------------------- queries

struct QueryBlock {
  const QuantizeQFp4& p;
  const Shape& s;
  Scratch memory;
  float* x = memory.take<float>(kFp4Queries * s.Hp);
  float* sums = memory.take<float>(kFp4Queries * s.Hp);
  bool* bad = memory.take<bool>(kFp4Queries);

  explicit QueryBlock(const QuantizeQFp4& params) : p(params), s(params.shape) {}

  void load(int64_t head, int64_t first, int64_t tokens, int64_t valid);
  void find_mean(float* mean, int64_t count);
  void run(int64_t item, float* scaled_mean);
};

// Loads the queries, zeros for those that take no part, and what smoothing K takes from their LSE.
void QueryBlock::load(int64_t head, int64_t first, int64_t tokens, int64_t valid) {
  int64_t b = head / s.N, n = head % s.N;
  const float* k_mean = p.k_mean + (b * s.K + n / s.G()) * s.Hp;
  for (int64_t i = 0; i < kFp4Queries; ++i) {
    float *row = x + i * s.Hp, shift = 0;
    bad[i] = false;
    if (i < valid) {
      load_row(row, p.q, ((b * s.T + first + i) * s.N + n) * s.H, s.H, s.Hp);
      bad[i] = !all_finite(row, s.Hp);
    }
    if (i >= valid || bad[i]) __builtin_memset(row, 0, s.Hp * sizeof(float));
    F sum{};
    for (int64_t h = 0; h < s.Hp; h += kLanes) sum += loadf(row + h) * loadf(k_mean + h);
    shift = bad[i] ? __builtin_nanf("") : total(sum) * p.scale;
    if (i < tokens) p.lse_shift[head * s.T + first + i] = shift;
  }
}

void QueryBlock::find_mean(float* mean, int64_t count) {
  int64_t half = kTile * s.Hp;
  __builtin_memcpy(sums, x, 2 * half * sizeof(float));
  halving_sum(sums, kTile, s.Hp);
  halving_sum(sums + half, kTile, s.Hp);
  __builtin_memcpy(sums + s.Hp, sums + half, s.Hp * sizeof(float));
  add_tiles(sums, 2, s.Hp);
  store_mean(mean, sums, count, s.Hp);
}

// Codes of a block, and its mean divided by its tensor scale.
void QueryBlock::run(int64_t item, float* scaled_mean) {
  int64_t head = item / s.T128(), first = item % s.T128() * kFp4Queries;
  int64_t tokens = clamp_count(s.T - first, kFp4Queries);
  int64_t valid = clamp_count(p.bounds[3 * (head / s.N)] - first, tokens), count = 0;
  load(head, first, tokens, valid);
  for (int64_t i = 0; i < valid; ++i) count += !bad[i];
  __builtin_memset(scaled_mean, 0, s.Hp * sizeof(float));
  if (p.smooth_q) find_mean(scaled_mean, count);
  for (int64_t i = 0; i < valid; ++i) {
    if (!bad[i]) subtract(x + i * s.Hp, scaled_mean, s.Hp);
  }
  float least = largest_of(scaled_mean, s.Hp) * kMeanFloor, top = largest_of(x, kFp4Queries * s.Hp);
  TensorScale tensor(top > least ? top : least);
  p.q_tensor[item] = tensor.scale;
  multiply(x, tensor.inverse, kFp4Queries * s.Hp);
  multiply(scaled_mean, tensor.inverse, s.Hp);
  for (int64_t i = 0; i < tokens; ++i) {
    int64_t row = head * s.T + first + i;
    uint8_t* scale = p.q4.scale + row * s.Hp / kFp4Block;
    encode_row(p.q4.codes + row * s.Hp / 2, scale, x + i * s.Hp, s.Hp, p.four_or_six);
    if (bad[i]) *scale = kNanScale;
  }
}

struct Correction {  // ΔS of one tile of keys and all query blocks of its group of heads
  const QuantizeQFp4& p;
  const float* means;  // [B, N, T128, Hp], divided by tensor scales
  const Shape& s;
  Scratch memory;
  float* keys = memory.take<float>(kTile * s.Hp);  // panel matrix [Hp, 64]
  float* row = memory.take<float>(s.Hp);
  float* products = memory.take<float>(kTile * kTile);

  Correction(const QuantizeQFp4& params, const float* scaled_means)
      : p(params), means(scaled_means), s(params.shape) {}

  void load_keys(int64_t head, int64_t first);
  void run(int64_t item);
};

void Correction::load_keys(int64_t head, int64_t first) {
  int64_t b = head / s.K, valid = clamp_count(p.bounds[3 * b + 1], s.S);
  float inverse = inverse_power(p.k_tensor[head]);
  for (int64_t j = 0; j < kTile; ++j) {
    bool used = first + j < valid;
    if (used) {
      load_row(row, p.k, ((b * s.S + first + j) * s.K + head % s.K) * s.H, s.H, s.Hp);
      used = all_finite(row, s.Hp);
    }
    if (used) subtract(row, p.k_mean + head * s.Hp, s.Hp);
    for (int64_t h = 0; h < s.Hp; ++h) {
      keys[panel_offset(s.Hp, h, j)] = used ? row[h] * inverse : 0;
    }
  }
}

void Correction::run(int64_t item) {
  int64_t head = item / s.S64(), first = item % s.S64() * kTile;
  int64_t count = clamp_count(s.S - first, kTile), blocks = s.G() * s.T128();
  int64_t first_block = head * blocks;  // the query heads of a group follow each other
  const float one = 1;
  load_keys(head, first);
  for (int64_t begin = 0; begin < blocks; begin += kTile) {
    int64_t rows = clamp_count(blocks - begin, kTile);
    __builtin_memset(products, 0, rows * kTile * sizeof(float));
    Left left = {means + (first_block + begin) * s.Hp, s.Hp, 1};
    add_product(products, kTile, rows, kTile, left, Right(keys, s.Hp), {&one, 0});
    for (int64_t r = 0; r < rows; ++r) {
      float* to = p.delta + (first_block + begin + r) * s.S + first;
      __builtin_memcpy(to, products + r * kTile, count * sizeof(float));
    }
  }
}

}  // namespace

void quantize_kv_fp4(const QuantizeKvFp4& p, Pool& pool) {
  const Shape& s = p.shape;
  int64_t heads = s.B * s.K, items = heads * s.S64();
  Scratch shared;
  auto side = [&](Array from, bool smooth, bool values, float* mean, float* tensor) {
    float* sums = shared.take<float>(smooth ? items * s.Hp : 0);
    float* largest = values && smooth ? shared.take<float>(items * s.Hp) : nullptr;
    return Side{from, smooth, sums, shared.take<float>(items), mean, tensor, largest};
  };
  Plan plan = {p,
               s,
               shared.take<bool>(heads * s.Sp()),
               {side(p.k, p.smooth_k, false, p.k_mean, p.k_tensor),
                side(p.v, p.smooth_v, true, p.v_mean, p.v_tensor)}};
  auto each_tile = [&](auto body) {
    on_workers(pool, items, [&](Items& work) {
      Scratch scratch;
      float* x = scratch.take<float>(kTile * s.Hp);
      for (int64_t item; work.take(&item);) body(item, x);
    });
  };
  auto each_head = [&](auto body) {
    on_workers(pool, heads, [&](Items& work) {
      for (int64_t head; work.take(&head);) body(head);
    });
  };
  each_tile([&](int64_t item, float* x) { sum_tile(plan, item, x); });
  each_head([&](int64_t head) { find_means(plan, head); });
  each_tile([&](int64_t item, float* x) {
    TileAt at(plan, item);
    for (const Side& side : plan.sides) {
      load_tile(x, plan, at, side, true);
      side.amax[item] = largest_of(x, kTile * s.Hp);
    }
  });
  each_head([&](int64_t head) { find_tensor_scale(plan, head); });
  each_tile([&](int64_t item, float* x) {
    TileAt at(plan, item);
    encode_keys(plan, at, x);
    encode_values(plan, at, x);
  });
}

void quantize_q_fp4(const QuantizeQFp4& p, Pool& pool) {
  const Shape& s = p.shape;
  int64_t blocks = s.B * s.N * s.T128();
  Scratch shared;
  float* means = shared.take<float>(blocks * s.Hp);
  on_workers(pool, blocks, [&](Items& work) {
    QueryBlock block(p);
    for (int64_t item; work.take(&item);) block.run(item, means + item * s.Hp);
  });
  on_workers(pool, s.B * s.K * s.S64(), [&](Items& work) {
    Correction correction(p, means);
    for (int64_t item; work.take(&item);) correction.run(item);
  });
}

}  // namespace sage::SAGE_ISA
