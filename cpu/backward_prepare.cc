// The first pass of sage_jax_attend_backward: everything that must be known before the products
// begin, so that the main pass rounds each number once and never looks back (docs/abi.md, section
// 4).
#include "backward.h"

namespace sage::SAGE_ISA {
namespace {

// train8: the scale of each channel of K̂.
void prepare_keys(const Prepared& f, int64_t head) {
  Channel z = f.of(f.z, head);
  for (int64_t h = 0; h < f.s.Hp; ++h) {
    Group group(f.p.k_max[head * f.s.Hp + h], 448);
    z.scale[h] = group.scale;
    z.inverse[h] = group.inverse;
  }
}

// Σ_j E dP of each row, over all tiles.
void exact_sums(float* sums, Block& block, KeyTile& tile) {
  block.encode_dout();
  for (int64_t r = 0; r < kTile; ++r) sums[r] = 0;
  Interval range = block.range;
  for (int64_t first = range.begin / kTile * kTile; first < range.end; first += kTile) {
    if (!block.find_seen(first, tile.move(block.head(), first))) continue;
    tile.pack();
    tile.products(block);
    for (int64_t r = 0; r < block.count; ++r) {
      if (!block.seen[r]) continue;
      F sum{};
      tile.row(block, r, [&](int64_t, F e, F d) { sum += e * d; });
      sums[r] += total(sum);
    }
  }
}

// D and r of a block's rows, and its part of the channel maxima of x and y.
void prepare_rows(const Prepared& f, Block& block, KeyTile& tile) {
  const AttendBackward& p = f.p;
  const Shape& s = f.s;
  int64_t place = (block.b * s.N + block.n) * f.blocks + block.first / kTile;
  float *x_amax = f.x_amax + place * s.Hp, *y_amax = f.y_amax + place * s.Hp;
  if (p.backward == Backward::train8) {
    __builtin_memset(x_amax, 0, s.Hp * sizeof(float));
    __builtin_memset(y_amax, 0, s.Hp * sizeof(float));
  }
  const float* v_mean = p.v_mean + block.head() * s.Hp;
  float out[256];
  for (int64_t r = 0; r < block.count; ++r) {
    int64_t at = block.row(r);
    f.delta[at] = f.r[at] = 0;
    if (!block.live(r) || block.poisoned[r]) continue;
    const float* dout = block.dout + r * s.Hp;
    load_row(out, p.out, ((block.b * s.T + block.first + r) * s.N + block.n) * s.H, s.H, s.Hp);
    F dot{};
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      dot += loadf(dout + h) * (loadf(out + h) - loadf(v_mean + h));
    }
    float dlse = p.dlse[at];
    f.delta[at] = total(dot) - dlse;
    if (p.backward != Backward::train8) continue;
    float length = norm(s.Hp, [&](int64_t h) { return loadf(dout + h); });
    f.r[at] = 8.0f / 7.0f * length * p.v_norm[block.head()] + __builtin_fabsf(dlse);
    F y_factor = splat(f.r[at] * block.inverse_l[r]);
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      F x = loadf(dout + h) * block.inverse_l[r];
      F y = load_codes(p.q8 + at * s.Hp + h) * p.q_scale[at] * y_factor;
      store(x_amax + h, max(loadf(x_amax + h), absolute(x)));
      store(y_amax + h, max(loadf(y_amax + h), absolute(y)));
    }
  }
  if (!p.exact_delta) return;
  float sums[kTile];
  exact_sums(sums, block, tile);
  for (int64_t r = 0; r < block.count; ++r) {
    if (!block.live(r)) continue;
    int64_t at = block.row(r);
    f.delta[at] = sums[r] * block.inverse_l[r] - p.dlse[at];
  }
}

void finish_channels(const Shape& s, Channel c, const float* amax, int64_t parts) {
  for (int64_t h = 0; h < s.Hp; ++h) {
    float top = 0;
    for (int64_t part = 0; part < parts; ++part) {
      if (amax[part * s.Hp + h] > top) top = amax[part * s.Hp + h];
    }
    Group group(top, 448);
    c.scale[h] = group.scale;
    c.inverse[h] = group.inverse;
  }
}

}  // namespace

Prepared prepare_backward(const AttendBackward& p, Scratch& memory, Pool& pool) {
  const Shape& s = p.shape;
  bool train8 = p.backward == Backward::train8;
  int64_t heads = s.B * s.K, rows = s.B * s.N * s.T, blocks = (s.T + kTile - 1) / kTile;
  int64_t parts = train8 ? s.B * s.N * blocks * s.Hp : 0, channels = train8 ? heads * s.Hp : 0;
  auto channel = [&] {
    return Channel{memory.take<float>(channels), memory.take<float>(channels)};
  };
  Prepared f = {p,
                s,
                blocks,
                memory.take<float>(rows),
                memory.take<float>(rows),
                memory.take<float>(parts),
                memory.take<float>(parts),
                channel(),
                channel(),
                channel()};
  if (train8) {
    on_workers(pool, heads, [&](Items& work) {
      for (int64_t head; work.take(&head);) prepare_keys(f, head);
    });
  }
  on_workers(pool, s.B * s.N * blocks, [&](Items& work) {
    Scratch own;
    Block block(p, own);
    KeyTile tile(p, own);
    for (int64_t item; work.take(&item);) {
      int64_t head = item / blocks;
      block.load(head / s.N, head % s.N, item % blocks);
      prepare_rows(f, block, tile);
    }
  });
  if (train8) {
    on_workers(pool, heads, [&](Items& work) {
      for (int64_t head; work.take(&head);) {
        int64_t count = s.G() * blocks,
                first = head * count * s.Hp;  // the group's heads are adjacent
        finish_channels(s, f.of(f.x, head), f.x_amax + first, count);
        finish_channels(s, f.of(f.y, head), f.y_amax + first, count);
      }
    });
  }
  return f;
}

}  // namespace sage::SAGE_ISA
