// sage_jax_attend_backward (docs/abi.md, section 4), the main pass: dq, dk, dv and dlogits.
//
// A unit of work is a key/value head and a part of its queries. It walks its blocks of 64 queries,
// four at a time, over all tiles of 64 keys that they see; dq of a block is complete at the end of
// the walk, dk and dv collect in float32 arrays of the unit. How many parts there are follows from
// the shape alone, and parts are added in order, so the result does not depend on the number of
// threads.
#include "backward.h"

namespace sage::SAGE_ISA {
namespace {

constexpr int64_t kTogether = 4;  // blocks that share an unpacked tile of keys
constexpr int64_t kUnits = 16;    // wanted: enough to keep common machines busy
constexpr float kOne = 1;

struct Unit {
  const Prepared& f;
  const AttendBackward& p;
  const Shape& s;
  Scratch memory;
  KeyTile tile;

  struct Queries {  // a block and what the gradient products need of it
    Block block;
    Exact::Type *x, *y;  // panel matrices [64, Hp]: right operands of Pᵀ·x = dV and Gᵀ·y = dK
    float* dq;           // [64, Hp]
    float x_scale = 0, y_scale = 0;  // sagebwd: of the codes in x and y
    Queries(const AttendBackward& p, Scratch& memory)
        : block(p, memory),
          x(memory.take<Exact::Type>(Exact::kDepth * p.shape.Hp)),
          y(memory.take<Exact::Type>(Exact::kDepth * p.shape.Hp)),
          dq(memory.take<float>(kTile * p.shape.Hp)) {}
  } queries[kTogether];
  Exact::Type* pairs = memory.take<Exact::Type>(kBf16Products ? kTile * kTile / 2 : 0);

  explicit Unit(const Prepared& facts)
      : f(facts),
        p(facts.p),
        s(facts.s),
        tile(p, memory),
        queries{{p, memory}, {p, memory}, {p, memory}, {p, memory}} {}

  bool train8() const { return p.backward == Backward::train8; }

  void load(Queries& to, int64_t head, int64_t index);
  void train8_operands(Queries& to);
  void sagebwd_operands(Queries& to);
  void train8_rows(const Block& block);
  void sagebwd_rows(const Block& block, float* p_scale, float* s_scale);
  void write_dlogits(const Block& block, int64_t r);
  void add(Queries& to, float* dk, float* dv);
  void store_dq(Queries& from);
  void run(int64_t head, int64_t begin, int64_t end, float* dk, float* dv);
};

// `index` counts the blocks of all query heads that share the key/value head.
void Unit::load(Queries& to, int64_t head, int64_t index) {
  Block& block = to.block;
  block.load(head / s.K, head % s.K * s.G() + index / f.blocks, index % f.blocks);
  __builtin_memset(to.dq, 0, kTile * s.Hp * sizeof(float));
  if (train8()) train8_operands(to);
  else sagebwd_operands(to);
  block.encode_dout();
}

void Unit::train8_operands(Queries& to) {
  Block& block = to.block;
  Channel x_channels = f.of(f.x, block.head()), y_channels = f.of(f.y, block.head());
  for (int64_t r = 0; r < kTile; ++r) {
    bool used = block.live(r) && !block.poisoned[r];
    int64_t at = used ? block.row(r) : 0;
    F y_factor = splat(used ? f.r[at] * block.inverse_l[r] : 0);
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      F x{}, y{};
      if (used) {
        x = loadf(block.dout + r * s.Hp + h) * block.inverse_l[r];
        x = round_e4m3(x * loadf(x_channels.inverse + h));
        y = load_codes(p.q8 + at * s.Hp + h) * p.q_scale[at] * y_factor;
        y = round_e4m3(y * loadf(y_channels.inverse + h));
      }
      store_factors(to.x, r, h, x);
      store_factors(to.y, r, h, y);
    }
  }
}

void Unit::sagebwd_operands(Queries& to) {
  Block& block = to.block;
  F top{};
  for (int64_t i = 0; i < kTile * s.Hp; i += kLanes)
    top = max(top, absolute(loadf(block.dout + i)));
  Group group(largest(top), 127);
  to.x_scale = group.scale;
  to.y_scale = 0;
  for (int64_t r = 0; r < kTile; ++r) {
    if (r < block.count && p.q_scale[block.row(r)] > to.y_scale) {
      to.y_scale =
          p.q_scale[block.row(r)];  // one scale for the block; 0 or NaN where a query takes no part
    }
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      F x = int8_values(loadf(block.dout + r * s.Hp + h), splat(group.inverse));
      F y = r < block.count ? load_codes(p.q8 + block.row(r) * s.Hp + h) : F{};
      store_factors(to.x, r, h, x);
      store_factors(to.y, r, h, y);
    }
  }
}

// Zeros, or NaN where a poisoned row sees a key.
void fill_row(float* row, uint64_t nan_bits) {
  for (int64_t j = 0; j < kTile; j += kLanes) {
    store(row + j, lane_mask(nan_bits >> j) ? splat(__builtin_nanf("")) : F{});
  }
}

void Unit::write_dlogits(const Block& block, int64_t r) {
  if (!p.dlogits) return;
  int64_t at = block.row(r);
  float values[kTile];
  if (block.poisoned[r]) {
    fill_row(values, block.seen[r]);
  } else {
    tile.row(block, r, [&](int64_t j, F e, F d) {
      store(values + j, e * block.inverse_l[r] * (d - f.delta[at]));
    });
  }
  __builtin_memcpy(p.dlogits + at * s.S + tile.first, values, tile.count * sizeof(float));
}

// Replaces the products by e4m3 values p and g.
void Unit::train8_rows(const Block& block) {
  for (int64_t r = 0; r < kTile; ++r) {
    float *p_row = tile.scores + r * kTile, *g_row = tile.d_p + r * kTile;
    if (!block.seen[r] || block.poisoned[r]) {
      fill_row(p_row, block.seen[r]);
      fill_row(g_row, block.seen[r]);
      continue;
    }
    int64_t at = block.row(r);
    F delta = splat(f.delta[at]), unit = splat(256 * reciprocal(f.r[at]));
    tile.row(block, r, [&](int64_t j, F e, F d) {
      store(p_row + j, round_e4m3(e * 256.f));
      store(g_row + j, round_e4m3(e * (d - delta) * unit));
    });
  }
}

// Replaces the products by INT8 codes of P and dS, one scale each for the tile.
void Unit::sagebwd_rows(const Block& block, float* p_scale, float* s_scale) {
  F p_top{}, s_top{};
  for (int64_t r = 0; r < kTile; ++r) {
    float *p_row = tile.scores + r * kTile, *s_row = tile.d_p + r * kTile;
    if (!block.seen[r] || block.poisoned[r]) {
      fill_row(p_row, block.seen[r]);
      fill_row(s_row, block.seen[r]);
      continue;
    }
    F delta = splat(f.delta[block.row(r)]);
    tile.row(block, r, [&](int64_t j, F e, F d) {
      F probability = e * block.inverse_l[r];
      F gradient = probability * (d - delta);
      p_top = max(p_top, probability);
      s_top = max(s_top, absolute(gradient));
      store(p_row + j, probability);
      store(s_row + j, gradient);
    });
  }
  Group p_group(largest(p_top), 127), s_group(largest(s_top), 127);
  for (int64_t r = 0; r < kTile; ++r) {
    if (!block.seen[r] || block.poisoned[r]) continue;
    for (int64_t j = r * kTile; j < (r + 1) * kTile; j += kLanes) {
      store(tile.scores + j, int8_values(loadf(tile.scores + j), splat(p_group.inverse)));
      store(tile.d_p + j, int8_values(loadf(tile.d_p + j), splat(s_group.inverse)));
    }
  }
  *p_scale = p_group.scale;
  *s_scale = s_group.scale;
}

// Adds the current tile's part of the gradients. dk and dv point at the tile.
void Unit::add(Queries& to, float* dk, float* dv) {
  float p_weight = 1, y_weight = 1, z_weight = 1;
  tile.products(to.block);
  if (p.dlogits) {
    for (int64_t r = 0; r < to.block.count; ++r) write_dlogits(to.block, r);
  }
  if (train8()) {
    train8_rows(to.block);
  } else {
    float p_scale, s_scale;
    sagebwd_rows(to.block, &p_scale, &s_scale);
    p_weight = p_scale * to.x_scale;
    y_weight = s_scale * to.y_scale;
    z_weight = s_scale * tile.k_scale;
  }
  Right x(to.x, Exact::kDepth), y(to.y, Exact::kDepth), z(tile.z, Exact::kDepth);
  add_product(dv, s.Hp, tile.count, s.Hp, transposed(tile.scores, pairs), x, {&p_weight, 0});
  add_product(dk, s.Hp, tile.count, s.Hp, transposed(tile.d_p, pairs), y, {&y_weight, 0});
  add_product(to.dq, s.Hp, to.block.count, s.Hp, as_it_is(tile.d_p, pairs), z, {&z_weight, 0});
}

void Unit::store_dq(Queries& from) {
  Block& block = from.block;
  Channel z = f.of(f.z, block.head());
  const float* mean = p.k_mean + block.head() * s.Hp;
  for (int64_t r = 0; r < block.count; ++r) {
    int64_t at = block.row(r);
    float* row = from.dq + r * s.Hp;
    // A poisoned row that sees bad keys only got no NaN from the products.
    float factor = block.poisoned[r] ? __builtin_nanf("") : p.scale, mean_factor = 0;
    if (block.live(r) && !block.poisoned[r]) {
      if (train8()) factor *= f.r[at] * block.inverse_l[r] / 256;
      mean_factor = p.scale * p.dlse[at];
    }
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      F x = loadf(row + h) * factor;
      if (train8()) x *= loadf(z.scale + h);
      store(row + h, x + loadf(mean + h) * mean_factor);
    }
    store_row(p.dq, ((block.b * s.T + block.first + r) * s.N + block.n) * s.H, row, s.H);
  }
}

// Blocks begin ... end - 1 of a head; dk and dv [S, Hp] must be zero.
void Unit::run(int64_t head, int64_t begin, int64_t end, float* dk, float* dv) {
  for (int64_t index = begin; index < end; index += kTogether) {
    int64_t together = end - index < kTogether ? end - index : kTogether;
    Interval range = {s.S, 0};
    for (int64_t i = 0; i < together; ++i) {
      load(queries[i], head, index + i);
      Interval own = queries[i].block.range;
      range.begin = own.begin < range.begin ? own.begin : range.begin;
      range.end = own.end > range.end ? own.end : range.end;
    }
    Channel z = f.of(f.z, head);
    for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
      uint64_t bad = tile.move(head, first);
      bool packed = false;
      for (int64_t i = 0; i < together; ++i) {
        if (!queries[i].block.find_seen(first, bad)) continue;
        if (!packed) {
          tile.pack();
          tile.pack_z(train8() ? &z : nullptr);
          packed = true;
        }
        add(queries[i], dk + first * s.Hp, dv + first * s.Hp);
      }
    }
    for (int64_t i = 0; i < together; ++i) store_dq(queries[i]);
  }
}

// dk and dv of 64 keys from the units' sums, in the units' order.
void store_keys(const Prepared& f, int64_t head, int64_t first, const float* dk, const float* dv,
                int64_t parts, int64_t part_stride) {
  const AttendBackward& p = f.p;
  const Shape& s = f.s;
  bool train8 = p.backward == Backward::train8;
  Channel x = f.of(f.x, head), y = f.of(f.y, head);
  float row[256];
  auto store_one = [&](const float* sums, const float* scale, float factor, Result to, int64_t j) {
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      F sum{};
      for (int64_t part = 0; part < parts; ++part) {
        sum += loadf(sums + part * part_stride + j * s.Hp + h);
      }
      sum *= factor;
      store(row + h, train8 ? sum * loadf(scale + h) : sum);
    }
    store_row(to, ((head / s.K * s.S + j) * s.K + head % s.K) * s.H, row, s.H);
  };
  float unit = train8 ? 1.f / 256 : 1.f;
  for (int64_t j = first; j < s.S && j < first + kTile; ++j) {
    store_one(dk, y.scale, p.scale * unit, p.dk, j);
    store_one(dv, x.scale, unit, p.dv, j);
  }
}

}  // namespace

void attend_backward(const AttendBackward& p, Pool& pool) {
  const Shape& s = p.shape;
  Scratch memory;
  Prepared f = prepare_backward(p, memory, pool);
  if (p.dlogits) __builtin_memset(p.dlogits, 0, s.B * s.N * s.T * s.S * sizeof(float));

  int64_t heads = s.B * s.K, head_blocks = s.G() * f.blocks;
  int64_t most = (head_blocks + kTogether - 1) / kTogether;
  int64_t parts = heads ? (kUnits + heads - 1) / heads : 1;
  parts = parts < most ? parts : most > 1 ? most : 1;
  int64_t size = s.S * s.Hp;  // of the sums of dk, and of dv
  bool keep = parts > 1;      // else a unit stores its gradients as soon as it is done
  float* sums = memory.take<float>(keep ? heads * parts * 2 * size : 0);
  on_workers(pool, heads * parts, [&](Items& work) {
    Unit unit(f);
    float* own = keep ? nullptr : unit.memory.take<float>(2 * size);
    for (int64_t item; work.take(&item);) {
      int64_t head = item / parts, part = item % parts;
      float* dk = keep ? sums + item * 2 * size : own;
      __builtin_memset(dk, 0, 2 * size * sizeof(float));
      unit.run(head, head_blocks * part / parts, head_blocks * (part + 1) / parts, dk, dk + size);
      if (keep) continue;
      for (int64_t first = 0; first < s.S; first += kTile) {
        store_keys(f, head, first, dk, dk + size, 1, 0);
      }
    }
  });
  on_workers(pool, keep ? heads * s.S64() : 0, [&](Items& work) {
    for (int64_t item; work.take(&item);) {
      int64_t head = item / s.S64(), first = item % s.S64() * kTile;
      const float* dk = sums + head * parts * 2 * size;
      store_keys(f, head, first, dk, dk + size, parts, 2 * size);
    }
  });
}

}  // namespace sage::SAGE_ISA
