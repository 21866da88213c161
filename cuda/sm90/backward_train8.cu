// train8 gradients on sm_90a by warpgroup-level products, where they fit; else by warp-level ones.
#include <type_traits>

#include "sm90/backward_delta.cuh"
#include "sm90/backward_dkv.cuh"
#include "sm90/backward_dq.cuh"
#include "sm90/backward_finish.cuh"

#include "sm80/backward.h"

namespace sage {
namespace sm90 {

// A block a multiprocessor for dK and dV, which take longer, and then one each for dQ: one launch, so that no multiprocessor
// waits between them for the last of the first.
template <int kHeadDim_>
struct GradientsConfig {
  using Dkv = DkvConfig<kHeadDim_, false>;
  using Dq = DqConfig<kHeadDim_>;
  static_assert(Dkv::kThreads == Dq::kThreads, "they share a launch");
  static constexpr int kThreads = Dkv::kThreads;
  static constexpr size_t kSharedBytes =
      Dkv::kSharedBytes > Dq::kSharedBytes ? Dkv::kSharedBytes : Dq::kSharedBytes;
};

struct GradientsCall {
  DkvCall dkv;
  DqCall dq;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_gradients(const __grid_constant__ GradientsCall call) {
  extern __shared__ __align__(1024) unsigned char tiles_first[];
  const int block = static_cast<int>(blockIdx.x);
  if (block < call.dq.crew.first) {
    dkv_block<typename Config::Dkv>(call.dkv, tiles_first);
  } else {
    dq_block<typename Config::Dq>(call.dq, tiles_first);
  }
}

template <int kHeadDim>
struct AtOnceConfig : DkvConfig<kHeadDim, true> {};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) backward_at_once(const __grid_constant__ DkvCall call) {
  extern __shared__ __align__(1024) unsigned char tiles_first[];
  ptx::griddepcontrol_launch_dependents();  // finish_dq
  dkv_block<Config>(call, tiles_first);
}

// All three gradients in one walk over the scores: dQ is added up in memory.
template <class Config>
const char* launch_at_once(const BackwardCall& p, Stream stream) {
  DkvCall call = {p};
  const char* error = plan_dkv<Config>(call);
  if (error != nullptr) return error;
  error = launch(backward_at_once<Config>, dim3(call.crew.blocks), Config::kThreads, Config::kSharedBytes, stream, call);
  return error != nullptr ? error : launch_finish_dq<Config::kHeadDim>(p, Config::kWarps * call.key_blocks, stream);
}

template <class Config>
const char* launch_gradients(const BackwardCall& p, Stream stream) {
  GradientsCall call = {{p}, {p}};
  const char* error = plan_dkv<typename Config::Dkv>(call.dkv);
  if (error == nullptr) error = plan_dq<typename Config::Dq>(call.dq, call.dkv.crew.blocks);
  if (error != nullptr) return error;
  return launch(backward_gradients<Config>, dim3(call.dq.crew.first + call.dq.crew.blocks), Config::kThreads,
                Config::kSharedBytes, stream, call);
}

}  // namespace sm90

namespace {

// Whether the kernels above take it. Tensor maps have no empty axes; attend_backward.cu keeps counts of blocks in range.
bool takes_wgmma(const BackwardParams& p) {
  const AttentionShape& s = p.shape;
  const bool empty = s.batch == 0 || s.heads == 0 || s.queries == 0 || s.keys == 0;
  return p.backward == Backward::kTrain8 && p.dp == DpFormat::kInt8 && !p.portable && !empty && s.padded_dim <= 128;
}

// f(the padded head dimension, as a constant), which is 64 or 128.
template <class F>
auto with_head_dim(const AttentionShape& s, const F& f) {
  if (s.padded_dim == 64) return f(std::integral_constant<int, 64>());
  return f(std::integral_constant<int, 128>());
}

}  // namespace

void choose_way_sm90(BackwardCall& p) {
  const AttentionShape& s = p.shape;
  p.adds_dq = takes_wgmma(p) && !p.deterministic && s.head_dim == s.padded_dim && p.dq_dtype != Dtype::kF32 &&
              p.dk_dtype != Dtype::kF32 && p.dv_dtype != Dtype::kF32;
  if (!p.adds_dq) return;
  p.cleared_heads = with_head_dim(s, [&](auto dim) { return sm90::heads_cleared_before<sm90::AtOnceConfig<dim>>(s); });
}

const char* train8_gradients_sm90(const BackwardCall& p, Stream stream) {
  if (!takes_wgmma(p)) return train8_gradients_sm90_mma(p, stream);
  return with_head_dim(p.shape, [&](auto dim) {
    const char* const error = p.exact_delta ? sm90::launch_delta<sm90::DeltaConfig<dim>>(p, stream) : nullptr;
    if (error != nullptr) return error;
    if (p.adds_dq) return sm90::launch_at_once<sm90::AtOnceConfig<dim>>(p, stream);
    return sm90::launch_gradients<sm90::GradientsConfig<dim>>(p, stream);
  });
}

}  // namespace sage
