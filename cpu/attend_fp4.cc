// sage_jax_attend_fp4 (docs/nvfp4.md): online softmax over tiles of 64 keys.
//
// The products run in float32 on decoded operands, which hold them exactly; only the order of
// summation is this file's own. Work items are those of attend.cc: up to 128 rows of one key/value
// head, the queries of all its query heads one after another.
#include "fp4.h"
#include "mask.h"
#include "tiles.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kVectors = kTile / kLanes;
constexpr float kTop = 448.f * 6.f;  // the largest probability of a row, in units of P
constexpr float kOne = 1;

struct Worker {
  const AttendFp4& p;
  const Shape& s;
  Scratch memory;
  float* q = memory.take<float>(kBlock * s.Hp);
  float* sums = memory.take<float>(kBlock * s.Hp);    // Σ p v, relative to m
  float* k = memory.take<float>(kTile * s.Hp);        // panel matrix [Hp, 64]
  float* v = memory.take<float>(kTile * s.Hp);        // panel matrix [64, Hp]
  float* decoded = memory.take<float>(s.Hp > kTile ? s.Hp : kTile);
  float* scores = memory.take<float>(kTile * kTile);  // products, then probabilities
  F* l = memory.take<F>(kBlock);                      // partial sums per lane
  float *m = memory.take<float>(kBlock), *multiplier = memory.take<float>(kBlock);
  uint64_t* seen = memory.take<uint64_t>(kBlock);
  Interval* keys = memory.take<Interval>(kBlock);
  bool *bad = memory.take<bool>(kBlock), *sees_any = memory.take<bool>(kBlock);
  bool* sees_bad = memory.take<bool>(kBlock);
  int64_t b, head, first_row, rows;  // head: b K + the key/value head

  explicit Worker(const AttendFp4& params) : p(params), s(params.shape) {}

  int64_t query_head(int64_t r) const { return head % s.K * s.G() + (first_row + r) / s.T; }
  int64_t query(int64_t r) const { return (first_row + r) % s.T; }
  int64_t flat(int64_t r) const { return (b * s.N + query_head(r)) * s.T + query(r); }
  int64_t query_block(int64_t r) const {
    return (b * s.N + query_head(r)) * s.T128() + query(r) / kFp4Queries;
  }

  void run(int64_t item);
  void start();
  bool find_seen(int64_t first, uint64_t bad_keys);
  uint64_t unpack_keys(int64_t first, int64_t count);
  void unpack_values(int64_t first);
  void score(int64_t begin, int64_t count, int64_t first, int64_t tile_keys);
  void grow_maximum(int64_t r, float new_m);
  void softmax(int64_t begin, int64_t count, int64_t first);
  void finish();
};

void Worker::start() {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = flat(r);
    const uint8_t* scale = p.q4.scale + at * s.Hp / kFp4Block;
    decode_blocks(q + r * s.Hp, p.q4.codes + at * s.Hp / 2, scale, s.Hp);
    bad[r] = *scale == kNanScale;
    if (bad[r]) __builtin_memset(q + r * s.Hp, 0, s.Hp * sizeof(float));
    multiplier[r] = p.q_tensor[query_block(r)] * (p.scale * kLog2e) * p.k_tensor[head];
    keys[r] = visible_interval(p.masks, s.S, b, query(r));
    m[r] = -kInfinity;
    l[r] = F{};
    sees_any[r] = sees_bad[r] = false;
  }
  __builtin_memset(sums, 0, rows * s.Hp * sizeof(float));
}

// Sets seen[r] for the tile and returns whether any row has a key to work on.
bool Worker::find_seen(int64_t first, uint64_t bad_keys) {
  uint64_t any = 0;
  for (int64_t r = 0; r < rows; ++r) {
    uint64_t bits = visible_bits(p.masks, s, keys[r], b, query_head(r), query(r), first);
    sees_any[r] |= bits != 0;
    sees_bad[r] |= (bits & bad_keys) != 0;
    seen[r] = bits & ~bad_keys;
    any |= seen[r];
  }
  return any != 0;
}

// Decodes a tile of keys and returns those that hold a NaN or Inf.
uint64_t Worker::unpack_keys(int64_t first, int64_t count) {
  uint64_t bad_keys = 0;
  for (int64_t j = 0; j < kTile; ++j) {
    int64_t row = head * s.S + first + j;
    const uint8_t* scale = p.k4.scale + row * s.Hp / kFp4Block;
    bool used = j < count && *scale != kNanScale;
    if (j < count && !used) bad_keys |= uint64_t{1} << j;
    if (used) decode_blocks(decoded, p.k4.codes + row * s.Hp / 2, scale, s.Hp);
    for (int64_t h = 0; h < s.Hp; ++h) k[panel_offset(s.Hp, h, j)] = used ? decoded[h] : 0;
  }
  return bad_keys;
}

void Worker::unpack_values(int64_t first) {
  for (int64_t h = 0; h < s.Hp; ++h) {
    int64_t at = (head * s.Hp + h) * s.Sp() + first;
    decode_blocks(decoded, p.v4.codes + at / 2, p.v4.scale + at / kFp4Block, kTile);
    for (int64_t j = 0; j < kTile; ++j) v[panel_offset(kTile, j, h)] = decoded[j];
  }
}

// ΔS + q·k of rows begin ... begin + count - 1, in units of both tensor scales.
void Worker::score(int64_t begin, int64_t count, int64_t first, int64_t tile_keys) {
  __builtin_memset(scores, 0, count * kTile * sizeof(float));
  for (int64_t r = begin; r < begin + count; ++r) {
    const float* delta = p.delta + query_block(r) * s.S + first;
    __builtin_memcpy(scores + (r - begin) * kTile, delta, tile_keys * sizeof(float));
  }
  Left queries = {q + begin * s.Hp, s.Hp, 1};
  add_product(scores, kTile, count, kTile, queries, Right(k, s.Hp), {&kOne, 0});
}

void Worker::grow_maximum(int64_t r, float new_m) {
  F shrink = splat(exp2_fast(splat(m[r] - new_m))[0]);
  l[r] *= shrink;
  for (int64_t h = 0; h < s.Hp; h += kLanes) {
    float* at = sums + r * s.Hp + h;
    store(at, loadf(at) * shrink);
  }
  m[r] = new_m;
}

// Turns scores into FP4 probabilities relative to the running maximum, and updates m, l and, where
// the maximum grew, the sums.
void Worker::softmax(int64_t begin, int64_t count, int64_t first) {
  for (int64_t r = begin; r < begin + count; ++r) {
    float* row = scores + (r - begin) * kTile;
    if (!seen[r]) {
      __builtin_memset(row, 0, kTile * sizeof(float));
      continue;
    }
    float bias[kTile];
    if (p.masks.bias) load_bias(bias, p.masks, s, b, query_head(r), query(r), first);
    F x[kVectors], top = splat(-kInfinity);
    for (int64_t i = 0; i < kVectors; ++i) {
      x[i] = loadf(row + i * kLanes) * multiplier[r];
      if (p.masks.bias) x[i] += loadf(bias + i * kLanes);
      if (seen[r] != kAll) x[i] = lane_mask(seen[r] >> (i * kLanes)) ? x[i] : splat(-kInfinity);
      top = max(top, x[i]);
    }
    if (p.masks.bias) {  // a NaN or +Inf in the bias
      I broken{};
      for (int64_t i = 0; i < kVectors; ++i) broken |= !(x[i] < kInfinity);
      for (int i = 0; i < kLanes; ++i) sees_bad[r] |= broken[i] != 0;
    }
    float tile_top = largest(top);
    if (tile_top > m[r]) grow_maximum(r, tile_top);
    F base = splat(m[r] == -kInfinity ? 0 : m[r]);  // a bias of −Inf hides keys
    for (int64_t i = 0; i < kVectors; ++i) {
      F e = exp2_fast(x[i] - base);
      l[r] += e;
      store(row + i * kLanes, e * kTop);
    }
    for (int64_t j = 0; j < kTile; j += kFp4Block) round_block(row + j);
  }
}

void Worker::finish() {
  const float* mean = p.v_mean + head * s.Hp;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t at = flat(r);
    float sum = total(l[r]);
    if (sees_bad[r] || (sees_any[r] && bad[r])) sum = __builtin_nanf("");
    F factor = splat(sum == 0 ? 0 : p.v_tensor[head] / kTop / sum);
    float* row = sums + r * s.Hp;
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      store(row + h, sum == 0 ? F{} : loadf(row + h) * factor + loadf(mean + h));
    }
    store_row(p.out, ((b * s.T + query(r)) * s.N + query_head(r)) * s.H, row, s.H);
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
    int64_t tile_keys = s.S - first < kTile ? s.S - first : kTile;
    uint64_t bad_keys = unpack_keys(first, tile_keys);
    if (!find_seen(first, bad_keys)) continue;
    unpack_values(first);
    for (int64_t begin = 0; begin < rows; begin += kTile) {
      int64_t count = rows - begin < kTile ? rows - begin : kTile;
      uint64_t any = 0;
      for (int64_t r = begin; r < begin + count; ++r) any |= seen[r];
      if (!any) continue;
      score(begin, count, first, tile_keys);
      softmax(begin, count, first);
      Left probabilities = {scores, kTile, 1};
      add_product(sums + begin * s.Hp, s.Hp, count, s.Hp, probabilities, Right(v, kTile),
                  {&kOne, 0});
    }
  }
  finish();
}

}  // namespace

void attend_fp4(const AttendFp4& p, Pool& pool) {
  int64_t blocks = (p.shape.G() * p.shape.T + kBlock - 1) / kBlock;
  on_workers(pool, p.shape.B * p.shape.K * blocks, [&](Items& work) {
    Worker worker(p);
    for (int64_t item; work.take(&item);) worker.run(item);
  });
}

}  // namespace sage::SAGE_ISA
