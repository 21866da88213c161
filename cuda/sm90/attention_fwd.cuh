// Forward attention for Hopper (docs/abi.md, section 3): wgmma, bulk tensor copies, warp roles.
// Sources of the algorithm: SageAttention2 (arXiv 2411.10958), FlashAttention-3 (arXiv 2407.08608).
// docs/kernels/sm90_forward.md has the picture.
//
// Requirements
//   sm_90a; head dimension padded to 64 or 128; at least one query and one key;
//   mask summaries computed beforehand on the same stream (common/mask.cuh).
#pragma once

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "ptx/bulk_tensor.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/forward_config.cuh"
#include "sm90/forward_consumer.cuh"
#include "sm90/forward_finish.cuh"
#include "sm90/forward_queries.cuh"
#include "sm90/forward_stream.cuh"
#include "sm90/forward_values.cuh"
#include "sm90/store_tiles.cuh"

namespace sage::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_fwd(const __grid_constant__ ForwardCall call) {
  extern __shared__ __align__(1024) unsigned char tiles_first[];
  unsigned char* const shared = tiles_first;
  const uint32_t base = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&call.q, &call.k, &call.v}) ptx::prefetch_tensor_map(map);
    const int writers = call.p.q == nullptr ? 0 : QueryWriter<Config>::kArrivals;
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(base + Config::full(i), 1);
      ptx::mbarrier_init(base + Config::k_empty(i), 4 * Config::kGroups);
      ptx::mbarrier_init(base + Config::v_empty(i), 4 * Config::kGroups);
    }
    for (int i = 0; i < Config::kSlots; ++i) {
      ptx::mbarrier_init(base + Config::slot_full(i), kWarpSize + writers);
      // All lanes arrive, for compute-sanitizer's racecheck: see sm90/backward_work.cuh.
      ptx::mbarrier_init(base + Config::rows_done(i), 128 * Config::kGroups);
      ptx::mbarrier_init(base + Config::slot_empty(i), kWarpSize);
    }
    ptx::fence_mbarrier_init();
  }
  Config::write_start(shared);
  ptx::fence_proxy_async_shared();
  __syncthreads();
  const int group = static_cast<int>(ptx::uniform(threadIdx.x / 128));
  if (call.p.q != nullptr && group > 0) QueryWriter<Config>(call, shared).first(static_cast<int>(threadIdx.x) / kWarpSize - 4);
  if (group == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    const int warp = static_cast<int>(ptx::uniform(threadIdx.x / kWarpSize));
    if (warp == 0) Producer<Config>(call, shared).run();
    if (warp == 1 && call.p.q == nullptr) Finisher<Config>(call, shared).run();
    if (warp > 0 && call.p.q != nullptr) QueryWriter<Config>(call, shared).run();
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    Consumer<Config>(call, shared, group - 1).run();
  }
}

template <class Config>
const char* launch_attention_fwd(const AttendParams& params, Stream stream) {
  using Values = typename Config::Values;
  const AttentionShape& s = params.shape;
  const int64_t planes = static_cast<int64_t>(s.batch) * s.heads;
  const int64_t kv_planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  if (planes == 0 || s.queries == 0) return nullptr;
  ForwardCall call = {};
  call.p = params;
  call.zero = 0.0f;
  const int64_t head_bytes =
      static_cast<int64_t>(s.keys) * Config::kHeadDim * (1 + Values::kElementBytes);
  const char* error =
      plan_row_blocks(call.work, s, params.masks, Config::kRows, Config::kGroups, head_bytes, multiprocessors());
  if (error != nullptr) return error;
  constexpr int kHeadDim = Config::kHeadDim;
  if (params.q == nullptr) {
    error = encode_tensor_map(
        call.q, {params.q8, 1, kHeadDim, s.queries, planes, kHeadDim, Config::kRows});
  }
  if (error == nullptr) {
    error = encode_tensor_map(call.k,
                              {params.k8, 1, kHeadDim, s.keys, kv_planes, kHeadDim, Config::kKeys});
  }
  if (error == nullptr) {
    const int64_t padded_keys = static_cast<int64_t>(mask_tiles(s.keys)) * kTileKeys;
    error = encode_tensor_map(
        call.v, Values::kElementBytes == 1
                    ? TensorMapSpec{params.v_pv, 1, padded_keys, kHeadDim, kv_planes, Config::kKeys,
                                    kHeadDim}
                    : TensorMapSpec{params.v_pv, 2, kHeadDim, s.keys, kv_planes, 64, Config::kKeys});
  }
  call.tiled_out = leaves_in_tiles(params.out_dtype, s);
  if (error == nullptr && call.tiled_out) error = encode_output_map(call.out, params.out, s, s.queries, s.heads);
  if (error != nullptr) return error;
  const int blocks = multiprocessors() < call.work.plan.items ? multiprocessors() : call.work.plan.items;
  return launch(attention_fwd<Config>, dim3(blocks), Config::kThreads, Config::kSharedBytes, stream,
                call);
}

}  // namespace sage::sm90
