// sage_jax_quantize_q (docs/abi.md, section 2).
#include "numerics.h"

namespace sage::SAGE_ISA {
namespace {

struct Row {  // one query
  int64_t b, n, t;
};

void quantize_group(const QuantizeQ& p, Row first, int64_t tokens, float* x) {
  const Shape& s = p.shape;
  const float* mean = p.k_mean + (first.b * s.K + first.n / s.G()) * s.Hp;
  auto load_query = [&](int64_t t) {
    load_row(x, p.q, ((first.b * s.T + t) * s.N + first.n) * s.H, s.H, s.Hp);
  };
  int64_t head = (first.b * s.N + first.n) * s.T, valid = p.bounds[3 * first.b];
  F top{};
  for (int64_t t = first.t; t < first.t + tokens; ++t) {
    p.q_scale[head + t] = p.lse_shift[head + t] = 0;
    if (t >= valid) continue;
    load_query(t);
    if (!all_finite(x, s.Hp)) {
      p.q_scale[head + t] = p.lse_shift[head + t] = __builtin_nanf("");
      continue;
    }
    F sum{};
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      F value = loadf(x + h);
      top = max(top, absolute(value));
      sum += value * loadf(mean + h);
    }
    p.lse_shift[head + t] = total(sum) * p.scale;
  }
  Group group(largest(top), 127);
  for (int64_t t = first.t; t < first.t + tokens; ++t) {
    int8_t* codes = p.q8 + (head + t) * s.Hp;
    if (t >= valid || is_nan(p.q_scale[head + t])) {
      __builtin_memset(codes, 0, s.Hp);
      continue;
    }
    if (tokens > 1) load_query(t);  // else it still lies in x
    for (int64_t h = 0; h < s.Hp; h += kLanes) {
      store_codes(codes + h, int8_values(loadf(x + h), splat(group.inverse)));
    }
    p.q_scale[head + t] = group.scale;
  }
}

}  // namespace

void quantize_q(const QuantizeQ& p, Pool& pool) {
  const Shape& s = p.shape;
  // An item is a whole number of groups, and at least 64 tokens of work.
  int64_t span = p.q_block * ((kTile + p.q_block - 1) / p.q_block);
  int64_t spans = (s.T + span - 1) / span;
  on_workers(pool, s.B * s.N * spans, [&](Items& work) {
    Scratch scratch;
    float* x = scratch.take<float>(s.Hp);
    for (int64_t item; work.take(&item);) {
      int64_t head = item / spans, begin = item % spans * span;
      int64_t end = begin + span < s.T ? begin + span : s.T;
      for (int64_t t = begin; t < end; t += p.q_block) {
        int64_t tokens = t + p.q_block < s.T ? p.q_block : s.T - t;
        quantize_group(p, {head / s.N, head % s.N, t}, tokens, x);
      }
    }
  });
}

}  // namespace sage::SAGE_ISA
