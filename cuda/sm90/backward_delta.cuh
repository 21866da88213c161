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
  const BackwardCall& p = call.p;
  const QueryTurn<Config> at(call, shared, group, turn);
  const uint32_t base = at.base;
  int s[kGradientValues], d[kGradientValues];
  float sum[2] = {};

  while (true) {
    ptx::mbarrier_wait(base + Config::full(stage), phase);
    const TileNote note = reinterpret_cast<const TileNote*>(shared + Config::kNotesAt)[stage];
    const uint32_t flags = ptx::uniform(note.flags);
    if (!(flags & (Config::kStop | Config::kNone << group))) {
      const int stage_at = Config::kStagesAt + stage * Config::kStageBytes;
      ptx::wgmma_fence();
      at.multiply(s, d, base / 16 + stage_at / 16);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      ptx::keep_in_registers(s);
      ptx::keep_in_registers(d);
      const Line score[2] = {at.score_line(0, note), at.score_line(1, note)};
      float products[2] = {};
      if (__builtin_expect(note.flags & (Config::kHide << group), 0)) {
        add_products<true>(products, s, d, score, at.seen(note, shared + stage_at));
      } else {
        add_products<false>(products, s, d, score, 0);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[r] = fmaf(products[r], at.terms[r].gain * note.scale[1], sum[r]);
    }
    release(base + Config::empty(stage));
    Config::move_on(stage, phase);
    if (flags & Config::kStop) break;
  }
  release(at.barriers.rows_empty());

  const int padded = tiles_of(p.shape.queries) * kTileQueries;
  const int64_t plane = static_cast<int64_t>(at.slot.b) * p.shape.heads + at.slot.head;
  const int row = at.slot.row + at.row;
  ptx::mbarrier_arrive(at.barriers.slot_empty(turn % kGradientSlots));
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = row + 8 * r;
    const float total = quad_sum(sum[r]);
    if (threadIdx.x % 4 != 0 || query >= p.shape.queries) continue;
    const float l = p.l[plane * p.shape.queries + query];
    // dO's scale and 1/r, the row's gain, are in the sum already, so that it stays finite; e carries train8's factor 256.
    if (l != 0.0f) p.w.terms[plane * padded + query].offset = at.terms[r].offset - total / (256.0f * l);
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
