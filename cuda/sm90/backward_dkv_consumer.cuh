// The consumers of backward_dkv.cuh: scores, probabilities, gradients of scores, and the products of these.
#pragma once

#include "sm90/backward_dkv_config.cuh"
#include "sm90/backward_dq_sums.cuh"

namespace sage::sm90 {

// What a consumer warp remembers from one block of rows to the next.
template <class Config>
struct DkvProgress {
  uint32_t notes = 0;  // so far
  int tiles = 0;       // of G
  typename DqPart<Config>::Place place;  // of the next of these
};

// The lines of a tile's queries for a warpgroup's 64 keys: terms times the scales of these. Once a warpgroup, half a query a
// thread, not all of them by every thread.
__device__ __forceinline__ void write_lines(QueryTerms* lines, const QueryTerms* terms, float k_scale, float v_scale) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  float2 half = reinterpret_cast<const float2*>(terms)[thread];
  half.x *= thread % 2 == 0 ? k_scale : v_scale;
  reinterpret_cast<float2*>(lines)[thread] = half;
}

// Which of a thread's scores count, for hide_codes: of keys of the slot of `turn` and a tile of queries.
template <class Config>
__device__ __forceinline__ uint32_t seen_of_tile(const BackwardCall& p, unsigned char* shared, int turn,
                                                 const QueryTile& tile) {
  using Rows = SharedTile<8, Config::kHeadDim>;
  const unsigned char* const codes = shared;  // of the block's keys
  const auto& slot = Config::slot(shared, turn);
  const int thread = ptx::opaque_thread();
  const int upper = (thread / kWarpSize - 4) * 16 + thread % kWarpSize / 4;
  const bool sound[2] = {static_cast<int8_t>(codes[Rows::offset(upper, 0)]) != kBadCode,
                         static_cast<int8_t>(codes[Rows::offset(upper + 8, 0)]) != kBadCode};
  return seen_of_keys(slot.mask, slot.row + upper, tile.query, sound, static_cast<int>(threadIdx.x) % 4,
                      MaskOffsets(p, tile.head).dense);
}

// A warp's sums, those in its region included, become dK and dV of the rows of the slot of `turn`.
template <class Config>
__device__ __forceinline__ void store_dkv(const DkvCall& call, unsigned char* shared, int turn, unsigned char* region,
                                          bool exact, float (&dk)[Config::kHeadDim / 2],
                                          float (&dv)[Config::kHeadDim / 2]) {
  constexpr int kHeadDim = Config::kHeadDim;
  const BackwardCall& p = call.p;
  collect(region, dk, exact);
  collect(region + Config::kWarpBytes, dv, exact);
  const auto& slot = Config::slot(shared, ptx::opaque(turn));
  const int consumer = ptx::opaque_thread() - 128;
  const int b = slot.b, head = slot.head, first_row = slot.row + consumer / kWarpSize * 16;
  const auto store = [&](float (&x)[kHeadDim / 2], unsigned char* sums, const float* factor_of, const CUtensorMap& map,
                         bool tiled, void* out, Dtype dtype) {
    const auto* const pairs = reinterpret_cast<const float2*>(factor_of) + ptx::opaque_thread() % 4;
    const auto outputs = [&](int n) {
      const float2 factor = pairs[4 * n];
      const FourOutputs y = FromArray<kHeadDim>{x}(n);
      return FourOutputs{{y.upper.x * factor.x, y.upper.y * factor.y}, {y.lower.x * factor.x, y.lower.y * factor.y}};
    };
    store_gradients<kHeadDim>(map, tiled, sums, outputs, out, dtype, b, first_row, p.shape.keys, head, p.shape.kv_heads,
                              p.shape.head_dim);
  };
  store(dk, region, slot.factor, call.dk, call.tiled_dk, p.dk, p.dk_dtype);
  store(dv, region + Config::kWarpBytes, slot.factor + kHeadDim, call.dv, call.tiled_dv, p.dv, p.dv_dtype);
}

// dK and dV of the rows of the slot of `turn`, and their share of dQ.
template <class Config>
__device__ __forceinline__ void compute_dkv(const DkvCall& call, unsigned char* shared, int group, int turn,
                                            DkvProgress<Config>& progress) {
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr bool kWithDq = Config::kWithDq, kInTurn = Config::kInTurn;
  using Part = DqPart<Config>;
  const BackwardCall& p = call.p;
  const uint32_t base = ptx::shared_address(shared), units = base / 16;
  const GradientBarriers barriers = Config::barriers(base);
  const int t = static_cast<int>(threadIdx.x) % 4;
  const int warp_row = 64 * group + static_cast<int>(threadIdx.x) / kWarpSize % 4 * 16;
  unsigned char* const region = shared + Config::kWarpsAt + warp_row / 16 * 2 * Config::kWarpBytes;
  const float k_scale = Config::slot(shared, turn).k_scale[group], v_scale = Config::slot(shared, turn).v_scale[group];
  const int first_head = kWithDq ? from_lane_0(Config::slot(shared, turn).head) * call.group_heads : 0;
  const Part part(call.dq, call.dq_factor, shared, group, first_head);
  const int batch = kWithDq ? from_lane_0(Config::slot(shared, turn).b) : 0;

  int s[kGradientValues], d[kGradientValues];
  float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
  uint32_t p_operand[kGradientRegisters], g_operand[kGradientRegisters];
  QueryTile before[Part::kLate] = {};  // the tile before, and the one before that
  int tiles = 0, summed = 0;           // of these rows so far; those of which the warpgroup sees anything
  uint32_t& count = progress.notes;
  int& made = progress.tiles;
  typename Part::Place& place = progress.place;
  const uint32_t keys = units + group * 64 * kHeadDim / 16;
  ptx::mbarrier_wait(barriers.rows_full(), turn % 2);

  QueryTile tile, next;
  uint32_t flags, next_flags;
  // Barriers are asked ahead, because the answer takes a while: "there" is a yes.
  const auto ask = [&](int barrier, uint32_t n) { return ptx::mbarrier_try_wait(base + barrier, n / Config::kStages % 2); };
  const auto wait_for_gradients = [&] {
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_registers(dk);
    ptx::keep_in_registers(dv);
  };
  // The note of tile `count`, when that is there. It is read ahead as well: behind the gradient products of the tile before.
  const auto read_note = [&](QueryTile& tile, uint32_t& flags) {
    const int stage = static_cast<int>(count % Config::kStages);
    ptx::mbarrier_wait(base + Config::scores_full(stage), count / Config::kStages % 2);
    const TileNote& note = reinterpret_cast<const TileNote*>(shared + Config::kNotesAt)[stage];
    flags = from_lane_0(note.flags);
    tile.query = from_lane_0(note.key) * kGradientTile;
    tile.head = __float_as_int(from_lane_0(note.scale[0]));
  };
  // The codes of the tile at hand have been written.
  const auto move_on = [&] {
    if constexpr (kWithDq) {
      before[Part::kLate - 1] = before[0];
      before[0] = tile;
      ++made;
      place = place.next();
    }
    ++tiles;
  };
  read_note(tile, flags);
  while (true) {
    bool under_way = false;
    while (true) {
      const int stage = static_cast<int>(count % Config::kStages);
      const uint32_t phase = count / Config::kStages % 2;
      if (flags & (Config::kStop | Config::kNone << group)) break;
      const int scores_at = Config::kScoresAt + stage * Config::kScoresBytes;
      const uint32_t queries = units + scores_at / 16;
      // The gradient products of the tile before: the scores would have to wait for them anyway, and
      // their operands' registers are needed.
      wait_for_gradients();
      if (!kInTurn && under_way) release(base + Config::sums_empty(static_cast<int>((count - 1) % Config::kStages)));
      ptx::wgmma_fence();
      multiply_scores<kHeadDim>(s, keys, queries);
      multiply_scores<kHeadDim>(d, keys + Config::kRowsBytes / 16, queries + Config::kTileBytes / 16);
      ptx::wgmma_commit_group();
      if (summed > 0 && summed % kExactTiles == 0) {
        if (summed == kExactTiles) wait_for_sent_tiles();
        add_exactly(region, dk, summed == kExactTiles);
        add_exactly(region + Config::kWarpBytes, dv, summed == kExactTiles);
      }
      QueryTerms* const lines = Config::lines(shared, group, summed);
      write_lines(lines, reinterpret_cast<const QueryTerms*>(shared + scores_at + 2 * Config::kTileBytes), k_scale, v_scale);
      ptx::bar_sync(1 + group, 128);
      ptx::wgmma_wait_group<0>();
      ptx::keep_in_registers(s);
      ptx::keep_in_registers(d);
      release(base + Config::scores_empty(stage));

      uint32_t codes_there = 0, sums_there = 0;
      if constexpr (kWithDq) codes_there = part.ask(place.due());
#pragma unroll
      for (int c = 0; c < kGradientValues / 8; ++c) {
        if (c == kGradientValues / 8 - 1) sums_there = ask(Config::sums_full(stage), count);
        float e[8], x[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = i / 2, column = i % 2;
          const QueryTerms line = lines[(2 * c + n) * 8 + 2 * t + column];
          const Line score{line.score, line.shift}, gradient{line.gain, line.offset};
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int at = 4 * n + 2 * r + column;
            e[at] = ptx::ex2(score.at(s[8 * c + at]));
            x[at] = e[at] * gradient.at(d[8 * c + at]);
          }
        }
        E4m3Values::pack(p_operand + 2 * c, e);
        E4m3Values::pack(g_operand + 2 * c, x);
      }
      if (__builtin_expect(flags & (Config::kHide << group), 0)) {
        const uint32_t seen = seen_of_tile<Config>(p, shared, turn, tile);
        hide_codes(p_operand, seen);
        hide_codes(g_operand, seen);
      }
      if (kWithDq && !codes_there) part.wait(place.due());
      if (!sums_there) ptx::mbarrier_wait(base + Config::sums_full(stage), phase);
      const uint32_t sums = units + (Config::kSumsAt + stage * Config::kSumsBytes) / 16;
      uint32_t pairs[kGradientRegisters];
      if constexpr (kWithDq) pair_keys(pairs, g_operand);
      ptx::keep_in_registers(p_operand);
      ptx::keep_in_registers(g_operand);
      ++count;
      // dV and dK; before them the product for dQ that is due, whose sums are sent while they are multiplied.
      const auto multiply = [&](auto with_dq) {
        float dq[Part::kValues];  // of an earlier tile; of whatever lies there, if there is none
        if constexpr (kWithDq) part.store(place, pairs);
        ptx::wgmma_fence();
        if constexpr (decltype(with_dq)::value) part.start(dq, place.due());
        multiply_gradients<kHeadDim>(dv, p_operand, sums, summed > 0);
        multiply_gradients<kHeadDim>(dk, g_operand, sums + Config::kTileBytes / 16, summed > 0);
        ptx::wgmma_commit_group();
        read_note(next, next_flags);
        if constexpr (decltype(with_dq)::value) {
          part.wait_for_staged();
          ptx::wgmma_wait_group<1>();
          ptx::keep_in_registers(dq);
          part.stage(dq);
        }
        if constexpr (kWithDq) {
          part.publish(place);
          if constexpr (decltype(with_dq)::value) part.send(before[Part::kLate - 1], batch, tiles >= Part::kLate);
        }
      };
      if constexpr (!kInTurn) {
        multiply(std::bool_constant<kWithDq>());
      } else {  // nothing is under way where these branches meet: else ptxas serialises all products
        if (part.takes(made)) {
          multiply(std::true_type());
          wait_for_gradients();
        } else {
          multiply(std::false_type());
          wait_for_gradients();
        }
        release(base + Config::sums_empty(stage));
      }
      move_on();
      tile = next;
      flags = next_flags;
      ++summed;
      under_way = true;
    }
    wait_for_gradients();
    if (!kInTurn && under_way) release(base + Config::sums_empty(static_cast<int>((count - 1) % Config::kStages)));
    if (flags & Config::kStop) break;
    // A tile of which the warpgroup sees nothing adds nothing to dK and dV. Its codes of G are zeros, which the others' product
    // for dQ reads; and the warpgroup's part in an earlier tile's dQ is due here as well.
    const int stage = static_cast<int>(count % Config::kStages);
    release(base + Config::scores_empty(stage));
    if constexpr (kWithDq) {
      part.wait(place.due());
      if (tiles >= Part::kLate && part.takes(made)) part.add(place.due(), before[Part::kLate - 1], batch);
      const uint32_t nothing[kGradientRegisters] = {};
      part.store(place, nothing);
      part.publish(place);
    }
    move_on();
    ptx::mbarrier_wait(base + Config::sums_full(stage), count / Config::kStages % 2);
    release(base + Config::sums_empty(stage));
    ++count;
    read_note(tile, flags);
  }
  if constexpr (kWithDq) {
#pragma unroll
    for (int late = Part::kLate; late > 0; --late) {
      const typename Part::Place last = late == 1 && Part::kLate == 2 ? place.due().next() : place.due();
      if (late > tiles || !part.takes(made + Part::kLate - late)) continue;
      part.wait(last);
      part.add(last, before[late - 1], batch);
    }
  }
  release(barriers.rows_empty());
  // The note that ends the tiles.
  const int last = static_cast<int>(count % Config::kStages);
  release(base + Config::scores_empty(last));
  ptx::mbarrier_wait(base + Config::sums_full(last), count / Config::kStages % 2);
  release(base + Config::sums_empty(last));
  ++count;

  // What was sent before from where the exact sums lie has been read if sums of dQ have been staged since.
  if (!kWithDq || tiles < (kInTurn ? Config::kGroups : 1)) wait_for_sent_tiles();
  store_dkv<Config>(call, shared, turn, region, summed > kExactTiles, dk, dv);
  if constexpr (kWithDq) report_added(p.w.added + Config::slot(shared, ptx::opaque(turn)).kv_plane);
  ptx::mbarrier_arrive(barriers.slot_empty(ptx::opaque(turn) % kGradientSlots));
}

}  // namespace sage::sm90
