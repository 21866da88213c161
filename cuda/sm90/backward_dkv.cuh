// dK and dV on Hopper: a block takes 128 keys (192 at head dimension 64) of one head at a time and walks over the queries
// of all heads of their group (docs/abi.md, section 4; docs/kernels/sm90_backward.md). Scores are computed transposed,
// keys by queries: probabilities and score gradients leave the accumulators as A operands of Pᵀ·x, Gᵀ·y. With dQ
// (`DkvConfig::kWithDq`) a block also adds its keys' share of that to memory (backward_dq_sums.cuh).
//
// Requirements
//   sm_90a; train8 with INT8 dO·Vᵀ; head dimension padded to 64 or 128; at least one query and one key;
//   the workspace filled by sm80/backward_prepass.cu. With dQ: outputs of 16 bits, head dimension 64 or 128.
// Roles: warp 0 copies, with dQ warp 1 clears sums to come; warpgroups of 64 keys compute. While one multiplies the other
// evaluates.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "sm90/backward_dkv_consumer.cuh"
#include "sm90/backward_dkv_loader.cuh"

namespace sage::sm90 {

// A block of those that compute dK and dV; where dQ is computed apart, they come first in the launch.
template <class Config>
__device__ __forceinline__ void dkv_block(const DkvCall& call, unsigned char* shared) {
  const uint32_t base = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    Config::barriers(base).init(Config::kWarps, Config::kWithDq ? 1 : 0);
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(base + Config::scores_full(i), 1);
      ptx::mbarrier_init(base + Config::sums_full(i), 1);
      ptx::mbarrier_init(base + Config::scores_empty(i), Config::kWarps);
      ptx::mbarrier_init(base + Config::sums_empty(i), Config::kWarps);
    }
    for (int i = 0; i < Config::kCodesPlaces; ++i) {
      ptx::mbarrier_init(base + Config::codes_full(i), 128 * Config::kGroups);
    }
    ptx::fence_mbarrier_init();
    ptx::fence_proxy_async_shared();
  }
  __syncthreads();
  const int group = static_cast<int>(ptx::uniform(threadIdx.x / 128));
  if (group == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    const int warp = static_cast<int>(ptx::uniform(threadIdx.x / kWarpSize));
    if (warp == 0) {
      copy_queries<Config>(call, shared);
    } else if (Config::kWithDq && warp == 1) {
      clear_ahead<Config>(call, shared);
    }
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    DkvProgress<Config> progress;
    take_turns<Config>(shared, [&](int turn) { compute_dkv<Config>(call, shared, group - 1, turn, progress); });
  }
}

// Completes a call, whose blocks are the first of the launch.
template <class Config>
const char* plan_dkv(DkvCall& call) {
  const BackwardCall& p = call.p;
  constexpr int kHeadDim = Config::kHeadDim;
  const AttentionShape& s = p.shape;
  const int64_t planes = static_cast<int64_t>(s.batch) * s.heads;
  const int64_t kv_planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  const int64_t padded = static_cast<int64_t>(tiles_of(s.queries)) * 64;
  call.key_blocks = key_blocks<Config>(s);
  call.group_heads = s.heads / s.kv_heads;
  const char* error = nullptr;
  const auto map = [&](CUtensorMap& to, const TensorMapSpec& spec) {
    if (error == nullptr) error = encode_tensor_map(to, spec);
  };
  map(call.k, {p.k8, 1, kHeadDim, s.keys, kv_planes, kHeadDim, Config::kRows});
  map(call.v, {p.v_dp, 1, kHeadDim, s.keys, kv_planes, kHeadDim, Config::kRows});
  map(call.q, {p.q8, 1, kHeadDim, s.queries, planes, kHeadDim, kGradientTile});
  map(call.d_out, {p.w.d_out, 1, kHeadDim, padded, planes, kHeadDim, kGradientTile});
  map(call.x, {p.w.x, 1, padded, kHeadDim, planes, kGradientTile, kHeadDim});
  map(call.y, {p.w.y, 1, padded, kHeadDim, planes, kGradientTile, kHeadDim});
  if (Config::kWithDq) {
    map(call.z, {p.w.z, 1, static_cast<int64_t>(tiles_of(s.keys)) * 64, kHeadDim, kv_planes, 64, kHeadDim});
    map(call.dq, {p.dq, 2, static_cast<int64_t>(s.heads) * s.head_dim, s.queries, s.batch, kOutTileColumns, 16, true});
    call.dq_factor = sum_factor(s.keys);
  }
  call.tiled_dk = leaves_in_tiles(p.dk_dtype, s);
  call.tiled_dv = leaves_in_tiles(p.dv_dtype, s);
  if (error == nullptr && call.tiled_dk) error = encode_output_map(call.dk, p.dk, s, s.keys, s.kv_heads);
  if (error == nullptr && call.tiled_dv) error = encode_output_map(call.dv, p.dv, s, s.keys, s.kv_heads);
  call.items = static_cast<int>(kv_planes * call.key_blocks);
  call.crew = {0, std::min(call.items, multiprocessors())};
  return error;
}

}  // namespace sage::sm90
