// D by the backward pass's own probabilities on Hopper (delta="exact"; docs/abi.md, section 4): the walk over keys of
// backward_dq.cuh with its two score products alone. What is left of a tile is two sums a thread.
//
// Requirements
//   as backward_dq.cuh; runs before the kernels that read D.
// Four warpgroups of 64 queries: without sums of channels a thread needs few registers, and while one multiplies three evaluate.
#pragma once

#include "sm90/backward_dq.cuh"

namespace sage::sm90 {

template <int kHeadDim>
struct DeltaConfig : DqConfig<kHeadDim, GradientBlock<4, 64, 104>, true> {};

// sums += e·d of a row's columns of one tile; with kHidden only of those that `seen` has.
template <bool kHidden>
__device__ __forceinline__ void add_products(float (&sums)[2], const int (&s)[kGradientValues], const int (&d)[kGradientValues],
                                             const Line (&score)[2], uint32_t seen) {
#pragma unroll
  for (int i = 0; i < kGradientValues; ++i) {
    const int r = i >> 1 & 1;
    float e = ptx::ex2(score[r].at(s[i]));
    if (kHidden && !(seen >> i & 1u)) e = 0.0f;
    sums[r] = fmaf(e, static_cast<float>(d[i]), sums[r]);
  }
}

// Adds (Σ_j e·dP)/l to the terms of the rows of the slot of `turn`; `stage` and `phase` are of the next note.
template <class Config>
__device__ __forceinline__ void compute_delta(const DqCall& call, unsigned char* shared, int group, int turn, int& stage,
                                              uint32_t& phase) {
  constexpr int kHeadDim = Config::kHeadDim;
  const BackwardCall& p = call.p;
  const uint32_t base = ptx::shared_address(shared), units = base / 16;
  const GradientBarriers barriers = Config::barriers(base);
  const auto& slot = Config::slot(shared, turn);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp_row = 64 * group + static_cast<int>(threadIdx.x) / kWarpSize % 4 * 16;

  ptx::mbarrier_wait(barriers.rows_full(), turn % 2);
  QueryTerms terms[2];  // of rows g and g + 8
  read_terms<Config>(terms, shared, warp_row + lane / 4, p.shape.queries - slot.row);
  int s[kGradientValues], d[kGradientValues];
  float sum[2] = {};
  const uint32_t queries = units + group * 64 * kHeadDim / 16;

  while (true) {
    ptx::mbarrier_wait(base + Config::full(stage), phase);
    const TileNote note = reinterpret_cast<const TileNote*>(shared + Config::kNotesAt)[stage];
    const bool stops = ptx::uniform(note.flags) & Config::kStop;
    if (!stops) {
      const int stage_at = Config::kStagesAt + stage * Config::kStageBytes;
      const uint32_t tile = units + stage_at / 16;
      ptx::wgmma_fence();
      multiply_scores<kHeadDim>(s, queries, tile);
      multiply_scores<kHeadDim>(d, queries + Config::kRowsBytes / 16, tile + Config::kTileBytes / 16);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      ptx::keep_in_registers(s);
      ptx::keep_in_registers(d);
      const Line score[2] = {{terms[0].score * note.scale[0], terms[0].shift},
                             {terms[1].score * note.scale[0], terms[1].shift}};
      float products[2] = {};
      if (__builtin_expect(note.flags & (Config::kHide << group), 0)) {
        const uint32_t seen =
            seen_by_queries<Config>(slot.mask, slot.row + warp_row + lane / 4, note.key * kGradientTile,
                                    note.flags & Config::kBadKeys, shared + stage_at);
        add_products<true>(products, s, d, score, seen);
      } else {
        add_products<false>(products, s, d, score, 0);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[r] = fmaf(products[r], note.scale[1], sum[r]);
    }
    release(base + Config::empty(stage));
    if (++stage == Config::kStages) {
      stage = 0;
      phase ^= 1;
    }
    if (stops) break;
  }
  release(barriers.rows_empty());

  const int padded = tiles_of(p.shape.queries) * kTileQueries;
  const int64_t plane = static_cast<int64_t>(slot.b) * p.shape.heads + slot.head;
  const int row = slot.row + warp_row + lane / 4;
  ptx::mbarrier_arrive(barriers.slot_empty(turn % kGradientSlots));
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = row + 8 * r;
    const float total = quad_sum(sum[r]);
    if (lane % 4 != 0 || query >= p.shape.queries) continue;
    const float l = p.l[plane * p.shape.queries + query];
    // e carries train8's factor 256; dO's scale and 1/r are in the row's gain.
    if (l != 0.0f) p.w.terms[plane * padded + query].offset = terms[r].offset - total * terms[r].gain / (256.0f * l);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_delta(const __grid_constant__ DqCall call) {
  extern __shared__ __align__(1024) unsigned char tiles_first[];
  query_block<Config>(call, tiles_first, [&](int group, int turn, int& stage, uint32_t& phase) {
    compute_delta<Config>(call, tiles_first, group, turn, stage, phase);
  });
}

template <class Config>
const char* launch_delta(const BackwardCall& p, Stream stream) {
  DqCall call = {p};
  const char* error = plan_dq<Config>(call, 0);
  if (error != nullptr) return error;
  return launch(backward_delta<Config>, dim3(call.crew.blocks), Config::kThreads, Config::kSharedBytes, stream, call);
}

}  // namespace sage::sm90
