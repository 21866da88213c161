// sage_jax_attend (docs/abi.md, section 3): online softmax over tiles of 64 keys.
//
// A work item is up to 128 rows of one key/value head: the queries of all its query heads, one
// after another, so that K and V are unpacked once for them all. Unpacking a tile of keys costs
// about as much as 10 rows of products.
#include "mask.h"
#include "tiles.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int64_t kBlock = 128;

struct Worker {
  const Attend& p;
  const Shape& s;
  Scratch memory;
  int16_t* q = memory.take<int16_t>(kBlock * s.Hp);
  float* sums = memory.take<float>(kBlock * s.Hp);      // Σ p v, relative to m
  int32_t* k = memory.take<int32_t>(kTile * s.Hp / 2);  // packed tile of keys
  float* v = memory.take<float>(kTile * s.Hp);          // panel matrix [64, Hp]
  float* scores = memory.take<float>(kTile * kTile);    // int32 products, then probabilities
  float* halves = memory.take<float>(p.f16_accumulate ? kTile * s.Hp : 0);
  uint8_t* bytes = memory.take<uint8_t>(16 * s.Hp);
  F* l = memory.take<F>(kBlock);  // partial sums per lane
  float *m = memory.take<float>(kBlock), *weight = memory.take<float>(kBlock);
  float* multiplier = memory.take<float>(kBlock);  // q_scale · c · log2 e
  uint64_t* seen = memory.take<uint64_t>(kBlock);
  Interval* keys = memory.take<Interval>(kBlock);
  bool *sees_any = memory.take<bool>(kBlock), *sees_bad = memory.take<bool>(kBlock);
  int64_t b, head, first_row, rows;  // head: b K + the key/value head

  explicit Worker(const Attend& params) : p(params), s(params.shape) {}

  int64_t query_head(int64_t r) const { return head % s.K * s.G() + (first_row + r) / s.T; }
  int64_t query(int64_t r) const { return (first_row + r) % s.T; }
  int64_t flat(int64_t r) const { return (b * s.N + query_head(r)) * s.T + query(r); }

  void run(int64_t item);
  void start();
  bool find_seen(int64_t first, uint64_t bad);
  void unpack_values(int64_t first);
  template <Pv kPv>
  void softmax(int64_t begin, int64_t count, int64_t first, float k_scale);
  void multiply(int64_t begin, int64_t count);
  void finish();
};

void Worker::start() {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = flat(r);
    widen(q + r * s.Hp, p.q8 + at * s.Hp, s.Hp);
    multiplier[r] = p.q_scale[at] * (p.scale * kLog2e);
    keys[r] = visible_interval(p.masks, s.S, b, query(r));
    m[r] = -kInfinity;
    l[r] = F{};
    sees_any[r] = sees_bad[r] = false;
    weight[r] = 1;
  }
  __builtin_memset(sums, 0, rows * s.Hp * sizeof(float));
}

// Sets seen[r] for the tile and returns whether any row has a key to work on.
bool Worker::find_seen(int64_t first, uint64_t bad) {
  uint64_t any = 0;
  for (int64_t r = 0; r < rows; ++r) {
    uint64_t bits = visible_bits(p.masks, s, keys[r], b, query_head(r), query(r), first);
    sees_any[r] |= bits != 0;
    sees_bad[r] |= (bits & bad) != 0;
    seen[r] = bits & ~bad;
    any |= seen[r];
  }
  return any != 0;
}

void Worker::unpack_values(int64_t first) {
  if (p.pv == Pv::f16 || p.pv == Pv::bf16) {
    const auto* from = static_cast<const uint16_t*>(p.v_pv) + (head * s.S + first) * s.Hp;
    for (int64_t j = 0; j < kTile; ++j) {
      for (int64_t h = 0; h < s.Hp; h += kLanes) {
        const uint16_t* at = from + j * s.Hp + h;
        F x = first + j >= s.S ? F{} : p.pv == Pv::f16 ? load_f16(at) : load_bf16(at);
        store(v + panel_offset(kTile, j, h), x);
      }
    }
    return;
  }
  const auto* from = static_cast<const uint8_t*>(p.v_pv) + head * s.Hp * s.Sp() + first;
  for (int64_t group = 0; group < kTile; group += 16) {
    for (int64_t h = 0; h < s.Hp; h += 16) {
      transpose_bytes(bytes + h, s.Hp, from + h * s.Sp() + group, s.Sp());
    }
    for (int position = 0; position < 16; ++position) {
      int64_t j = group + kPi[position];
      for (int64_t h = 0; h < s.Hp; h += kLanes) {
        const uint8_t* at = bytes + position * s.Hp + h;
        F x = p.pv == Pv::int8 ? load_codes(reinterpret_cast<const int8_t*>(at))
                               : from_e4m3(__builtin_convertvector(load<Bytes>(at), I));
        store(v + panel_offset(kTile, j, h), x);
      }
    }
  }
}

template <Pv kPv>
inline F round_probability(F e) {
  if constexpr (kPv == Pv::e4m3) return round_e4m3(e * 256.f);
  if constexpr (kPv == Pv::f16) return round_f16(e);
  if constexpr (kPv == Pv::bf16) return round_bf16(e);
  return round_even(e * 127.f);
}

// Turns the products of rows begin ... begin + count - 1 into probabilities relative to the running
// maximum (int8: to the tile's own), and updates m, l and, where the maximum grew, the sums.
template <Pv kPv>
void Worker::softmax(int64_t begin, int64_t count, int64_t first, float k_scale) {
  constexpr int kVectors = kTile / kLanes;
  int64_t tile = first / kTile;
  for (int64_t r = begin; r < begin + count; ++r) {
    float* row = scores + (r - begin) * kTile;
    if (!seen[r]) {
      __builtin_memset(row, 0, kTile * sizeof(float));
      if (kPv == Pv::int8) weight[r] = 0;
      continue;
    }
    float bias[kTile];
    if (p.masks.bias) load_bias(bias, p.masks, s, b, query_head(r), query(r), first);
    F x[kVectors], top = splat(-kInfinity), factor = splat(multiplier[r] * k_scale);
    for (int v = 0; v < kVectors; ++v) {
      x[v] = to_float(load<I>(row + v * kLanes)) * factor;
      if (p.masks.bias) x[v] += loadf(bias + v * kLanes);
      if (seen[r] != kAll) x[v] = lane_mask(seen[r] >> (v * kLanes)) ? x[v] : splat(-kInfinity);
      top = max(top, x[v]);
    }
    float tile_top = largest(top), new_m = tile_top > m[r] ? tile_top : m[r];
    if (p.masks.bias) {  // a NaN or +Inf in the bias
      I broken{};
      for (int v = 0; v < kVectors; ++v) broken |= !(x[v] < kInfinity);
      for (int i = 0; i < kLanes; ++i) sees_bad[r] |= broken[i] != 0;
    }
    if (new_m > m[r]) {
      F shrink = splat(exp2_fast(splat(m[r] - new_m))[0]);
      l[r] *= shrink;
      for (int64_t h = 0; h < s.Hp; h += kLanes) {
        float* at = sums + r * s.Hp + h;
        store(at, loadf(at) * shrink);
      }
      m[r] = new_m;
    }
    F base = splat(kPv == Pv::int8 ? tile_top : new_m), sum{};
    if (base[0] == -kInfinity) base = F{};  // a bias of −Inf hides keys: probability 0, not NaN
    for (int v = 0; v < kVectors; ++v) {
      F e = exp2_fast(x[v] - base);
      sum += e;
      store(row + v * kLanes, round_probability<kPv>(e));
    }
    if constexpr (kPv == Pv::int8) {
      float relative = exp2_fast(splat(tile_top == -kInfinity ? tile_top : tile_top - new_m))[0];
      weight[r] = relative * (1.f / 127.f) * p.v_scale[head * s.S64() + tile];
      sum *= relative;
    }
    l[r] += sum;
  }
}

void Worker::multiply(int64_t begin, int64_t count) {
  Left probabilities = {scores, kTile, 1};
  Right values(v, kTile);
  Weights weights = {weight + begin, 1};
  float* to = sums + begin * s.Hp;
  if (!p.f16_accumulate) {
    add_product(to, s.Hp, count, s.Hp, probabilities, values, weights);
    return;
  }
  auto round_halves = [&](float* into) {
    for (int64_t i = 0; i < count * s.Hp; i += kLanes) {
      F x = round_f16(loadf(halves + i));
      if (into) store(into + i, loadf(into + i) + x);
      else store(halves + i, x);
    }
  };
  __builtin_memset(halves, 0, count * s.Hp * sizeof(float));
  add_product(halves, s.Hp, count, s.Hp, probabilities, values.rows(0, 32), weights);
  round_halves(nullptr);
  probabilities.data += 32;
  add_product(halves, s.Hp, count, s.Hp, probabilities, values.rows(32, 32), weights);
  round_halves(to);
}

void Worker::finish() {
  float unit = p.pv == Pv::e4m3 ? 1.f / 256.f : 1.f;
  const float* scales = p.pv == Pv::int8 ? nullptr : p.v_scale + head * s.Hp;
  const float* mean = p.pv == Pv::e4m3 ? p.v_mean + head * s.Hp : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = flat(r);
    float sum = total(l[r]);
    if (sees_bad[r] || (sees_any[r] && is_nan(p.q_scale[at]))) sum = __builtin_nanf("");
    F inverse = splat(sum == 0 ? 0 : unit / sum);
    float* row = sums + r * s.Hp;
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      F x = loadf(row + h) * inverse;
      if (scales) x *= loadf(scales + h);
      store(row + h, mean && sum != 0 ? x + loadf(mean + h) : x);
    }
    store_row(p.out, ((b * s.T + query(r)) * s.N + query_head(r)) * s.H, row, s.H);
    p.m[at] = is_nan(p.q_scale[at]) && sees_any[r] ? sum : m[r];
    p.l[at] = sum;
    p.lse[at] = sum == 0 ? -kInfinity : (m[r] + __builtin_log2f(sum)) * kLn2 + p.lse_shift[at];
  }
}

void Worker::run(int64_t item) {
  int64_t group_rows = s.G() * s.T, blocks = (group_rows + kBlock - 1) / kBlock;
  head = item / blocks;
  b = head / s.K;
  first_row = item % blocks * kBlock;
  rows = group_rows - first_row < kBlock ? group_rows - first_row : kBlock;
  start();
  Interval range = {s.S, 0};
  for (int64_t r = 0; r < rows; ++r) {
    if (keys[r].begin >= keys[r].end) continue;
    range.begin = keys[r].begin < range.begin ? keys[r].begin : range.begin;
    range.end = keys[r].end > range.end ? keys[r].end : range.end;
  }
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    int64_t count = s.S - first < kTile ? s.S - first : kTile;
    const int8_t* k8 = p.k8 + (head * s.S + first) * s.Hp;
    float k_scale = p.k_scale[head * s.S64() + first / kTile];
    uint64_t bad = bad_bits(k8, k_scale, count, s.Hp);
    if (!find_seen(first, bad)) continue;
    pack_keys(k, k8, count, s.Hp);
    unpack_values(first);
    for (int64_t begin = 0; begin < rows; begin += kTile) {
      int64_t part = rows - begin < kTile ? rows - begin : kTile;
      uint64_t any = 0;
      for (int64_t r = begin; r < begin + part; ++r) any |= seen[r];
      if (!any) continue;
      int_product(reinterpret_cast<int32_t*>(scores), part, q + begin * s.Hp, s.Hp, k);
      float magnitude = k_scale < 0 ? -k_scale : k_scale;
      switch (p.pv) {
        case Pv::e4m3:
          softmax<Pv::e4m3>(begin, part, first, magnitude);
          break;
        case Pv::f16:
          softmax<Pv::f16>(begin, part, first, magnitude);
          break;
        case Pv::bf16:
          softmax<Pv::bf16>(begin, part, first, magnitude);
          break;
        case Pv::int8:
          softmax<Pv::int8>(begin, part, first, magnitude);
          break;
      }
      multiply(begin, part);
    }
  }
  finish();
}

}  // namespace

void attend(const Attend& p, Pool& pool) {
  int64_t blocks = (p.shape.G() * p.shape.T + kBlock - 1) / kBlock;
  on_workers(pool, p.shape.B * p.shape.K * blocks, [&](Items& work) {
    Worker worker(p);
    for (int64_t item; work.take(&item);) worker.run(item);
  });
}

}  // namespace sage::SAGE_ISA
