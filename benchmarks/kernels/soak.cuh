// Random problems, every kind of mask and ragged shapes included, through the kernels that the device
// would get and through the portable ones.
#pragma once
#include "common/decode.h"
#include "problem.cuh"
#include "sm90/forward_values.cuh"

namespace sage::bench {

// A random problem; every kind of mask comes up.
struct Random {
  std::mt19937 engine;
  explicit Random(unsigned seed) : engine(seed) {}
  int below(int n) { return static_cast<int>(engine() % static_cast<unsigned>(n)); }
  bool coin(int odds = 2) { return below(odds) == 0; }
};

// bf16 values at the start of a buffer to floats.
inline void widen(Buffer<float>& x) {
  std::vector<float> values = x.download();
  const auto* const from = reinterpret_cast<const uint16_t*>(values.data());
  std::vector<float> wide(values.size());
  for (size_t i = 0; i < wide.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    memcpy(&wide[i], &bits, 4);
  }
  x.upload(wide);
}

// Whether two buffers hold the same bits.
inline bool equal(const Buffer<float>& a, const Buffer<float>& b) {
  const auto x = a.download(), y = b.download();
  return memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

inline int soak(const Options& o) {
  int failures = 0;
  double worst = 0, worst_gradient = 0, worst_l = 0;
  for (int number = o.first; number < o.first + o.problems; ++number) {
    Random random(o.seed * 1000003u + static_cast<unsigned>(number));
    AttentionShape s;
    s.batch = 1 + random.below(3);
    s.kv_heads = 1 + random.below(3);
    s.heads = s.kv_heads * (1 + random.below(3));
    const int longest = random.coin(4) ? 3000 : 600;
    s.queries = 1 + random.below(longest);
    s.keys = 1 + random.below(longest);
    if (random.coin(8)) {  // the keys of few queries are split among blocks
      s.queries = 1 + random.below(16);
      s.keys = 1024 + random.below(3000);
    }
    if (number % 16 == 15) {  // more blocks of keys than a GPU takes in two turns
      s.heads = 100 * (s.heads / s.kv_heads);
      s.kv_heads = 100;
      s.queries = 1 + s.queries % 200;
      s.keys = 1 + s.keys % 400;
    }
    s.head_dim = random.coin() ? 64 << random.below(2) : 1 + random.below(128);
    s.padded_dim = s.head_dim <= 64 ? 64 : 128;
    const PvFormat formats[] = {PvFormat::kE4m3, PvFormat::kE4m3, PvFormat::kF16, PvFormat::kBf16};
    const float sigmas[] = {1.0f, 1.0f, 3.0f, 10.0f};
    const PvFormat pv = formats[random.below(4)];
    const float sigma = sigmas[random.below(4)];
    Problem p(s, pv, o.seed + 31u * static_cast<unsigned>(number), sigma);
    const bool lengths = random.coin(), segments = random.coin(3), dense = random.coin(3);
    std::vector<int32_t> bounds;
    const bool bottom_right = random.coin();
    for (int b = 0; b < s.batch; ++b) {
      const int queries = lengths ? random.below(s.queries + 1) : s.queries;
      const int keys = lengths ? random.below(s.keys + 1) : s.keys;
      bounds.insert(bounds.end(), {queries, keys, bottom_right ? keys - queries : 0});
    }
    p.bounds.upload(bounds);
    if (random.coin()) p.masks.window_right = random.coin() ? 0 : random.below(300);
    if (random.coin(3)) p.masks.window_left = random.below(300);
    if (segments) {
      const auto ids = [&](int tokens) {
        std::vector<int32_t> x;
        for (int b = 0; b < s.batch; ++b) {
          int id = random.below(2);
          for (int i = 0; i < tokens; ++i) x.push_back(id += random.below(120) == 0);
        }
        return x;
      };
      const auto q_ids = ids(s.queries), kv_ids = ids(s.keys);
      p.q_seg = Buffer<int32_t>(q_ids.size());
      p.kv_seg = Buffer<int32_t>(kv_ids.size());
      p.q_seg.upload(q_ids);
      p.kv_seg.upload(kv_ids);
      p.masks.q_seg = p.q_seg.data;
      p.masks.kv_seg = p.kv_seg.data;
    }
    if (dense) {
      const int tile = random.coin() ? 64 : 1;
      int sizes[4] = {s.batch, s.heads, (s.queries + tile - 1) / tile, (s.keys + tile - 1) / tile};
      size_t count = 1;
      for (int n = 0; n < 4; ++n) {
        if (n < 2 && random.coin()) sizes[n] = 1;
        count *= static_cast<size_t>(sizes[n]);
      }
      std::vector<uint8_t> entries(count);
      const int odds = 1 + random.below(8);
      for (auto& x : entries) x = random.below(odds) == 0 || odds == 8;
      p.set_mask(entries, sizes, tile);
    }
    p.workspace = Buffer<uint8_t>(p.workspace_bytes());
    const bool poison = random.coin(5);
    if (poison) {
      const uint16_t nan = 0x7fc0;
      for (auto* x : {&p.q, &p.k, &p.v}) {
        cudaMemcpy(x->data + random.below(static_cast<int>(x->count)), &nan, 2,
                   cudaMemcpyHostToDevice);
      }
    }
    const bool gradients = pv == PvFormat::kE4m3;
    p.quantize_keys(gradients);
    p.quantize_queries();
    Problem::Result ours(s), portable(s), again(s), raw(s), raw_again(s);
    check(attend(p.params(ours, Dtype::kF32, false), nullptr));
    check(attend(p.params(again, Dtype::kF32, false), nullptr));
    check(attend(p.params(portable, Dtype::kF32, true), nullptr));
    for (Problem::Result* r : {&raw, &raw_again}) check(attend(p.params(*r, Dtype::kF32, false, true), nullptr));
    check(cudaDeviceSynchronize(), "attend");
    const Difference out = compare(ours.out, portable.out), lse = compare(ours.lse, portable.lse);
    const Difference m = compare(ours.m, portable.m), l = compare(ours.l, portable.l);
    const bool repeats = equal(ours.out, again.out) && equal(raw.out, raw_again.out);
    // e4m3 sums keep about 14 bits, and tiles of 128 keys round early probabilities otherwise; where keys are split
    // among blocks, or are so many that a reference may rise above the maximum, all probabilities: two draws of e4m3's
    // rounding error, .026, are sqrt(2) times that apart.
    const bool split = decode_plan(s, p.masks, pv, false).splits > 1;
    const bool rises = s.keys > 4 * sm90::E4m3Values::kMostProbability;
    // The root mean square of n such errors scatters by 1/sqrt(2n): three times that on top, where outputs are few.
    const double scatter = 1.0 + 3.0 / std::sqrt(2.0 * static_cast<double>(ours.out.count));
    const double bound = scatter * (pv != PvFormat::kE4m3 ? 5e-3 : split || rises ? 4e-2 : 2.5e-2);
    // The kernel of sm_90 for e4m3 that quantizes queries itself interpolates half of its exponentials, of which one in fifteen
    // comes out as another code: .022 rms of these, .016 of all. Other kernels give the bits that given codes give.
    const bool interpolates = pv == PvFormat::kE4m3 && !split && s.head_dim % 16 == 0;
    const Difference queries = compare(raw.out, ours.out);
    const bool same = interpolates ? queries.relative < scatter * 2.5e-2 && queries.odd == 0 : equal(raw.out, ours.out);
    // The offset of a score is rounded to a unit of its INT8 product, in another way where tiles are longer, so a
    // logit differs by about a unit at most. Over a problem's rows that scatters: half of it, besides what float32 sums lose.
    const double l_bound = 1e-3 + 0.5 * p.largest_unit();
    bool good_gradients = true;
    if (gradients) {
      Gradients mine(p, o.seed + 7u), theirs(p, o.seed + 7u);
      const bool exact = random.coin(4), deterministic = random.coin(3);
      const Dtype dtype = random.coin(4) ? Dtype::kF32 : Dtype::kBf16;
      for (Gradients* g : {&mine, &theirs}) {
        AttendParams forward = p.params(portable, Dtype::kBf16, true);
        forward.out = g->out.data;
        check(attend(forward, nullptr));
        check(attend_backward(g->params(p, portable, g == &theirs, exact, dtype, deterministic), nullptr));
      }
      check(cudaDeviceSynchronize(), "attend_backward");
      if (dtype == Dtype::kBf16) {
        for (Gradients* g : {&mine, &theirs}) {
          for (auto* x : {&g->dq, &g->dk, &g->dv}) widen(*x);
        }
      }
      // A gradient that is zero, as of a row that sees one key, is zero to rounding only.
      const double floor = 1e-3;
      const Difference dq = compare(mine.dq, theirs.dq, floor);
      const Difference dk = compare(mine.dk, theirs.dk, floor);
      const Difference dv = compare(mine.dv, theirs.dv, floor);
      // The order of sums differs, the matrix unit's keep about 14 bits, and outputs in bf16 round by 2^-9 on either side
      // (docs/kernels/sm90_backward.md has the largest differences seen).
      const double limit = 1e-2;
      good_gradients = std::max({dq.relative, dk.relative, dv.relative}) < limit &&
                       dq.odd + dk.odd + dv.odd == 0;
      worst_gradient = std::max({worst_gradient, dq.relative, dk.relative, dv.relative});
      if (!good_gradients) {
        printf("gradients of problem %d: dq %.2e dk %.2e dv %.2e, %g %g %g odd entries\n", number,
               dq.relative, dk.relative, dv.relative, dq.odd, dk.odd, dv.odd);
      }
    }
    const bool good = good_gradients && out.relative < bound && lse.relative < 2e-4 && m.relative < 1e-6 &&
                      l.relative < l_bound && out.odd + lse.odd + m.odd + l.odd == 0 && repeats && same;
    worst = std::max(worst, out.relative);
    worst_l = std::max(worst_l, l.relative / l_bound);
    if (!good) {
      ++failures;
      printf("problem %d: B %d T %d S %d N %d K %d H %d pv %d lengths %d segments %d dense %d "
             "window %d %d poison %d: out %.2e lse %.2e m %.2e l %.2e, %g %g %g %g odd entries%s%s\n",
             number, s.batch, s.queries, s.keys, s.heads, s.kv_heads, s.head_dim,
             static_cast<int>(pv), lengths, segments, dense, p.masks.window_left,
             p.masks.window_right, poison, out.relative, lse.relative, m.relative, l.relative,
             out.odd, lse.odd, m.odd, l.odd, repeats ? "" : ", results move between runs", same ? "" : ", other results of queries as they are");
      fflush(stdout);
    }
  }
  printf("%d problems, %d failures; largest relative differences: out %.2e, gradients %.2e; of l %.2f of its bound\n",
         o.problems, failures, worst, worst_gradient, worst_l);
  return failures > 0;
}

}  // namespace sage::bench
