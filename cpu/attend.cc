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

// P·V multiplies bf16 numbers where that is fast and exact: f16 numbers have more bits.
template <Pv kPv>
using Values = FactorOf<kBf16Products && kPv != Pv::f16>;

struct Worker {
  const Attend& p;
  const Shape& s;
  Scratch memory;
  Code* q = memory.take<Code>(kBlock * s.Hp);
  float* sums = memory.take<float>(kBlock * s.Hp);       // Σ p v, relative to m
  int32_t* k = memory.take<int32_t>(packed_size(s.Hp));  // of the tile of keys
  float* v = memory.take<float>(kTile * s.Hp);           // panel matrix [64, Hp]
  float* scores = memory.take<float>(kTile * kTile);     // int32 products, then probabilities
  float* halves = memory.take<float>(p.f16_accumulate ? kTile * s.Hp : 0);
  uint8_t* bytes = memory.take<uint8_t>(16 * s.Hp);
  F* l = memory.take<F>(kBlock);  // partial sums per lane
  float *m = memory.take<float>(kBlock), *weight = memory.take<float>(kBlock);
  float* part = memory.take<float>(kBlock);        // int8: of the tile's maximum in the row's
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
  F logits(int64_t r, float* row, int64_t first, float k_scale);
  template <Pv kPv>
  void unpack_values(int64_t first);
  template <Pv kPv>
  void move_maxima(int64_t begin, F* tops, float* base, int64_t tile);
  template <Pv kPv>
  void softmax(int64_t begin, int64_t count, int64_t first, float k_scale);
  template <Pv kPv>
  void multiply(int64_t begin, int64_t count);
  template <Pv kPv>
  void attend_tile(int64_t first, float k_scale);
  void finish();
};

void Worker::start() {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = flat(r);
    hold_codes(q + r * s.Hp, p.q8 + at * s.Hp, s.Hp);
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

template <Pv kPv>
inline F load_value(const void* from) {
  if constexpr (kPv == Pv::f16) return load_f16(static_cast<const uint16_t*>(from));
  if constexpr (kPv == Pv::bf16) return load_bf16(static_cast<const uint16_t*>(from));
  if constexpr (kPv == Pv::int8) return load_codes(static_cast<const int8_t*>(from));
  return load_e4m3(static_cast<const uint8_t*>(from));
}

template <Pv kPv>
void Worker::unpack_values(int64_t first) {
  constexpr bool transposed = kPv == Pv::e4m3 || kPv == Pv::int8;
  constexpr int64_t size = transposed ? 1 : 2;
  const auto* from =
      static_cast<const uint8_t*>(p.v_pv) +
      (transposed ? head * s.Hp * s.Sp() + first : (head * s.S + first) * s.Hp * size);
  auto* to = reinterpret_cast<typename Values<kPv>::Type*>(v);
  for (int64_t group = 0; group < kTile; group += 16) {
    for (int64_t h = 0; transposed && h < s.Hp; h += 16) {
      transpose_bytes(bytes + h, s.Hp, from + h * s.Sp() + group, s.Sp());
    }
    for (int position = 0; position < 16; ++position) {
      int64_t j = group + (transposed ? kPi[position] : position);
      for (int64_t h = 0; h < s.Hp; h += kLanes) {
        const uint8_t* at = transposed ? bytes + position * s.Hp + h : from + (j * s.Hp + h) * size;
        store_factors(to, j, h, transposed || first + j < s.S ? load_value<kPv>(at) : F{});
      }
    }
  }
}

template <Pv kPv>
inline F round_probability(F e) {  // of at most 1, or hardly more
  if constexpr (kPv == Pv::e4m3) return round_to_grid<3, -6>(e * 256.f);
  if constexpr (kPv == Pv::f16) return round_f16(e);
  if constexpr (kPv == Pv::bf16) return round_bf16(e);
  return round_even(e * 127.f);
}

// Turns the products of row r into logits, hidden keys' −Inf, and returns their largest per lane.
F Worker::logits(int64_t r, float* row, int64_t first, float k_scale) {
  float bias[kTile];
  if (p.masks.bias) load_bias(bias, p.masks, s, b, query_head(r), query(r), first);
  F top = splat(-kInfinity), factor = splat(multiplier[r] * k_scale);
  I broken{};  // a NaN or +Inf in the bias
  for (int64_t j = 0; j < kTile; j += kLanes) {
    F x = to_float(load<I>(row + j)) * factor;
    if (p.masks.bias) x += loadf(bias + j);
    if (seen[r] != kAll) x = lane_mask(seen[r] >> j) ? x : splat(-kInfinity);
    if (p.masks.bias) broken |= !(x < kInfinity);
    top = max(top, x);
    store(row + j, x);
  }
  for (int i = 0; p.masks.bias && i < kLanes; ++i) sees_bad[r] |= broken[i] != 0;
  return top;
}

// Updates m, l and, where the maximum grew, the sums of kLanes rows from the largest logits of
// each; base: what to subtract from them.
template <Pv kPv>
void Worker::move_maxima(int64_t begin, F* tops, float* base, int64_t tile) {
  F top = largest_of_each(tops), old = loadf(m + begin), grown = max(top, old);
  float shrink[kLanes];
  store(shrink, exp2_fast(old - grown));
  for (int i = 0; i < kLanes && begin + i < rows; ++i) {
    if (!(grown[i] > old[i])) continue;
    l[begin + i] *= shrink[i];
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      float* at = sums + (begin + i) * s.Hp + h;
      store(at, loadf(at) * shrink[i]);
    }
  }
  store(m + begin, grown);
  F from = kPv == Pv::int8 ? top : grown;
  // A bias of −Inf hides keys: probability 0, not NaN.
  store(base, from == -kInfinity ? F{} : from);
  if constexpr (kPv == Pv::int8) {
    F relative = exp2_fast(top == -kInfinity ? top : top - grown);
    store(part + begin, relative);
    store(weight + begin, relative * (1.f / 127.f) * p.v_scale[head * s.S64() + tile]);
  }
}

// Turns the products of rows begin ... begin + count - 1 into probabilities relative to the running
// maximum (int8: to the tile's own), and updates m, l and the sums.
template <Pv kPv>
void Worker::softmax(int64_t begin, int64_t count, int64_t first, float k_scale) {
  constexpr int64_t step = kTile / Values<kPv>::kDepth * kLanes;
  for (int64_t group = 0; group < count; group += kLanes) {
    int64_t together = count - group < kLanes ? count - group : kLanes;
    float base[kLanes], *start = scores + group * kTile;
    F tops[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      tops[i] = i < together ? logits(begin + group + i, start + i * kTile, first, k_scale)
                             : splat(-kInfinity);
    }
    move_maxima<kPv>(begin + group, tops, base, first / kTile);
    for (int64_t i = 0; i < together; ++i) {
      float* row = start + i * kTile;
      F sum{};
      auto probability = [&](int64_t j) {
        F e = exp2_fast(loadf(row + j) - base[i]);
        sum += e;
        return round_probability<kPv>(e);
      };
      for (int64_t j = 0; j < kTile; j += step) {
        if constexpr (step == kLanes) {
          store(row + j, probability(j));
        } else {
          F low = probability(j);
          store(row + j / 2, pair_of(low, probability(j + kLanes)));
        }
      }
      if (kPv == Pv::int8) sum *= part[begin + group + i];
      l[begin + group + i] += sum;
    }
  }
}

template <Pv kPv>
void Worker::multiply(int64_t begin, int64_t count) {
  typedef typename Values<kPv>::Type T;
  LeftOf<T> probabilities = {reinterpret_cast<const T*>(scores), kTile, 1};
  Right<T> values(reinterpret_cast<const T*>(v), Values<kPv>::kDepth);
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
  constexpr int64_t half = Values<kPv>::kDepth / 2;
  __builtin_memset(halves, 0, count * s.Hp * sizeof(float));
  add_product(halves, s.Hp, count, s.Hp, probabilities, values.rows(0, half), weights);
  round_halves(nullptr);
  probabilities.data += half;
  add_product(halves, s.Hp, count, s.Hp, probabilities, values.rows(half, half), weights);
  round_halves(to);
}

// One tile of keys, for all rows of the item.
template <Pv kPv>
void Worker::attend_tile(int64_t first, float k_scale) {
  unpack_values<kPv>(first);
  for (int64_t begin = 0; begin < rows; begin += kTile) {
    int64_t count = rows - begin < kTile ? rows - begin : kTile;
    uint64_t any = 0;
    for (int64_t r = begin; r < begin + count; ++r) any |= seen[r];
    if (!any) continue;
    int_product(reinterpret_cast<int32_t*>(scores), count, q + begin * s.Hp, s.Hp, k);
    softmax<kPv>(begin, count, first, k_scale);
    multiply<kPv>(begin, count);
  }
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
    float magnitude = k_scale < 0 ? -k_scale : k_scale;
    switch (p.pv) {
      case Pv::e4m3:
        attend_tile<Pv::e4m3>(first, magnitude);
        break;
      case Pv::f16:
        attend_tile<Pv::f16>(first, magnitude);
        break;
      case Pv::bf16:
        attend_tile<Pv::bf16>(first, magnitude);
        break;
      case Pv::int8:
        attend_tile<Pv::int8>(first, magnitude);
        break;
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
