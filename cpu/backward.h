// What the passes of sage_jax_attend_backward share: blocks of 64 queries, tiles of 64 keys and
// their products.
//
// A block belongs to one query head and starts at a multiple of 64, as the INT8 groups of `sagebwd`
// want.
#pragma once

#include "mask.h"
#include "tiles.h"

namespace sage::SAGE_ISA {

struct Channel {  // e4m3 scales of a head's channels: arrays of Hp
  float *scale, *inverse;
};

// Facts that the main pass needs and the first pass finds. Heads of channels are b K + k.
struct Prepared {
  const AttendBackward& p;
  const Shape& s;
  int64_t blocks;          // of 64 queries in a head
  float *delta, *r;        // [B, N, T]
  float *x_amax, *y_amax;  // [B, N, blocks, Hp]
  Channel x, y, z;         // [B, K, Hp] each

  Channel of(const Channel& c, int64_t head) const {
    return {c.scale + head * s.Hp, c.inverse + head * s.Hp};
  }
};

Prepared prepare_backward(const AttendBackward& p, Scratch& memory, Pool& pool);

inline bool is_finite(float x) { return x - x == 0; }
// 0 where 1 / x could overflow.
inline float reciprocal(float x) { return x < 0x1p-100f ? 0 : 1 / x; }

struct Block {  // 64 queries of one head, at most `count` of them real
  const AttendBackward& p;
  const Shape& s;
  Code *q, *dout8;     // [64, Hp]: codes of Q and, with dp int8, of dO
  float* dout;         // [64, Hp]: with dp bf16, dO rounded to bf16
  float* multiplier;   // q_scale · c · log2 e
  float *dout_scale, *m, *inverse_l;
  bool* poisoned;    // rows whose gradients are NaN
  Interval* keys;    // empty for rows without a visible key
  uint64_t* seen;    // of the current tile
  Interval range{};  // of key indices that any row sees
  int64_t b = 0, n = 0, first = 0, count = 0;

  Block(const AttendBackward& params, Scratch& memory)
      : p(params),
        s(params.shape),
        q(memory.take<Code>(kTile * s.Hp)),
        dout8(memory.take<Code>(p.dp == Dp::int8 ? kTile * s.Hp : 0)),
        dout(memory.take<float>(kTile * s.Hp)),
        multiplier(memory.take<float>(4 * kTile)),
        dout_scale(multiplier + kTile),
        m(multiplier + 2 * kTile),
        inverse_l(multiplier + 3 * kTile),
        poisoned(memory.take<bool>(kTile)),
        keys(memory.take<Interval>(kTile)),
        seen(memory.take<uint64_t>(kTile)) {}

  int64_t head() const { return b * s.K + n / s.G(); }
  int64_t row(int64_t r) const { return (b * s.N + n) * s.T + first + r; }
  bool live(int64_t r) const { return r < count && p.l[row(r)] != 0; }

  // Loads the block; leaves dO as float32 in `dout`, zero for rows that are not live or poisoned.
  void load(int64_t batch, int64_t query_head, int64_t block) {
    b = batch;
    n = query_head;
    first = block * kTile;
    count = s.T - first < kTile ? s.T - first : kTile;
    range = {s.S, 0};
    for (int64_t r = 0; r < kTile; ++r) {
      float* to = dout + r * s.Hp;
      __builtin_memset(to, 0, s.Hp * sizeof(float));
      keys[r] = {0, 0};
      poisoned[r] = false;
      if (r < count) hold_codes(q + r * s.Hp, p.q8 + row(r) * s.Hp, s.Hp);
      else hold_zeros(q + r * s.Hp, s.Hp);
      multiplier[r] = dout_scale[r] = m[r] = inverse_l[r] = 0;
      if (!live(r)) continue;
      keys[r] = visible_interval(p.masks, s.S, b, first + r);
      if (keys[r].begin < range.begin) range.begin = keys[r].begin;
      if (keys[r].end > range.end) range.end = keys[r].end;
      int64_t at = ((b * s.T + first + r) * s.N + n) * s.H;
      load_row(to, p.out, at, s.H, s.Hp);
      bool sound = all_finite(to, s.Hp);
      load_row(to, p.dout, at, s.H, s.Hp);
      float l = p.l[row(r)];
      sound &= all_finite(to, s.Hp) && is_finite(l) && is_finite(p.dlse[row(r)]);
      poisoned[r] = !sound;
      if (poisoned[r]) {
        __builtin_memset(to, 0, s.Hp * sizeof(float));
        continue;
      }
      multiplier[r] = p.q_scale[row(r)] * (p.scale * kLog2e);
      m[r] = p.m[row(r)];
      inverse_l[r] = 1 / l;
    }
  }

  // Turns `dout` into the left operand of dO·Vᵀ: INT8 codes per token, or bf16 values.
  void encode_dout() {
    for (int64_t r = 0; r < kTile; ++r) {
      float* from = dout + r * s.Hp;
      F top{};
      for (int64_t h = 0; h < s.Hp; h += kLanes) top = max(top, absolute(loadf(from + h)));
      Group group(largest(top), 127);
      dout_scale[r] = group.scale;
      for (int64_t h = 0; h < s.Hp; h += kLanes) {
        F x = loadf(from + h);
        if (p.dp == Dp::bf16) {
          store(from + h, round_bf16(x));
        } else {
          I code = __builtin_convertvector(int8_values(x, splat(group.inverse)), I);
          hold_codes(dout8 + r * s.Hp + h, code);
        }
      }
    }
  }

  // Sets seen[r] for a tile; returns whether any row has a key to work on.
  bool find_seen(int64_t tile_first, uint64_t bad) {
    uint64_t any = 0;
    for (int64_t r = 0; r < kTile; ++r) {
      seen[r] = ~bad & visible_bits(p.masks, s, keys[r], b, n, first + r, tile_first);
      any |= seen[r];
    }
    return any != 0;
  }
};

// p, dS and what they multiply are e4m3 numbers (train8) or INT8 codes (sagebwd).
typedef FactorOf<kBf16Products> Exact;

struct KeyTile {  // the right operands of a tile of 64 keys
  const AttendBackward& p;
  const Shape& s;
  int32_t *k, *v8;      // packed for int_product
  float* v;             // with dp bf16: Vᵀ, panel matrix [Hp, 64]
  Exact::Type* z;       // panel matrix [64, Hp]: e4m3 values of K̂ (train8) or codes of K (sagebwd)
  float *scores, *d_p;  // [64, 64]: products of the current block
  float k_scale = 0, v_scale = 0;
  int64_t head = 0, first = 0, count = 0;

  KeyTile(const AttendBackward& params, Scratch& memory)
      : p(params),
        s(params.shape),
        k(memory.take<int32_t>(packed_size(s.Hp))),
        v8(memory.take<int32_t>(p.dp == Dp::int8 ? packed_size(s.Hp) : 0)),
        v(memory.take<float>(p.dp == Dp::bf16 ? kTile * s.Hp : 0)),
        z(memory.take<Exact::Type>(Exact::kDepth * s.Hp)),
        scores(memory.take<float>(kTile * kTile)),
        d_p(memory.take<float>(kTile * kTile)) {}

  const int8_t* k8() const { return p.k8 + (head * s.S + first) * s.Hp; }

  // Moves to a tile and returns which of its keys are bad.
  uint64_t move(int64_t to_head, int64_t to_first) {
    head = to_head;
    first = to_first;
    count = s.S - first < kTile ? s.S - first : kTile;
    int64_t tile = head * s.S64() + first / kTile;
    k_scale = p.k_scale[tile] < 0 ? -p.k_scale[tile] : p.k_scale[tile];
    v_scale = p.dp == Dp::int8 ? p.v_dp_scale[tile] : 1;
    return bad_bits(k8(), p.k_scale[tile], count, s.Hp);
  }

  void pack() {
    pack_keys(k, k8(), count, s.Hp);
    int64_t offset = (head * s.S + first) * s.Hp;
    if (p.dp == Dp::int8) {
      pack_keys(v8, static_cast<const int8_t*>(p.v_dp) + offset, count, s.Hp);
      return;
    }
    const auto* from = static_cast<const uint16_t*>(p.v_dp) + offset;
    for (int64_t j = 0; j < kTile; ++j) {
      float* to = v + panel_offset(s.Hp, 0, j / kLanes * kLanes) + j % kLanes;
      for (int64_t h = 0; h < s.Hp; h += kLanes) {
        F x = j < count ? load_bf16(from + j * s.Hp + h) : F{};
        for (int i = 0; i < kLanes; ++i) to[(h + i) * kPanel] = x[i];
      }
    }
  }

  void pack_z(const Channel* channels) {
    for (int64_t j = 0; j < kTile; ++j) {
      for (int64_t h = 0; h < s.Hp; h += kLanes) {
        F x = j < count ? load_codes(k8() + j * s.Hp + h) : F{};
        if (channels) x = round_e4m3(x * k_scale * loadf(channels->inverse + h));
        store_factors(z, j, h, x);
      }
    }
  }

  // scores = Q·Kᵀ as int32, d_p = dO·Vᵀ as int32 or, with dp bf16, float32.
  void products(const Block& block) {
    int_product(reinterpret_cast<int32_t*>(scores), kTile, block.q, s.Hp, k);
    if (p.dp == Dp::int8) {
      int_product(reinterpret_cast<int32_t*>(d_p), kTile, block.dout8, s.Hp, v8);
      return;
    }
    constexpr float kOne = 1;
    __builtin_memset(d_p, 0, kTile * kTile * sizeof(float));
    add_product(d_p, kTile, kTile, kTile, {block.dout, s.Hp, 1}, Right(v, s.Hp), {&kOne, 0});
  }

  // E and dP of row r as vectors, from the products; E is 0 for keys not seen. `use(lane offset, e,
  // dp)`.
  template <class Use>
  void row(const Block& block, int64_t r, const Use& use) const {
    float bias[kTile];
    if (p.masks.bias) load_bias(bias, p.masks, s, block.b, block.n, block.first + r, first);
    F factor = splat(block.multiplier[r] * k_scale), top = splat(block.m[r]);
    F d_factor = splat(block.dout_scale[r] * v_scale);
    for (int64_t j = 0; j < kTile; j += kLanes) {
      const float* at = scores + r * kTile + j;
      F x = to_float(load<I>(at)) * factor;
      if (p.masks.bias) x += loadf(bias + j);
      F e = exp2_fast(x - top);
      if (block.seen[r] != kAll) e = lane_mask(block.seen[r] >> j) ? e : F{};
      const float* d_at = d_p + r * kTile + j;
      F d = p.dp == Dp::int8 ? to_float(load<I>(d_at)) * d_factor : loadf(d_at);
      use(j, e, d);
    }
  }
};

}  // namespace sage::SAGE_ISA
