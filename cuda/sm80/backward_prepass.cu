// What the gradient kernels need before their loops (docs/abi.md, section 4), in three launches:
//   clear_maxima       zeroes the maxima, and what the gradient kernels count               (train8)
//   query_terms        per query D = dO·(O − v_mean), r, 1/l, dO as INT8 codes or bf16; maxima of x and y; clears dQ of the
//                      first heads where it is added up in memory                           (prepass_terms.cuh)
//   gradient_operands  x, y, z: 8-bit and transposed, tokens permuted by `pi`               (prepass_operands.cuh)
// Maxima are taken over the bits of non-negative floats, so their order cannot matter. Those of the keys come with them.
//
// Requirements: sm_80. Memory bound: a block of 2·Hp threads takes tiles of 64 tokens, eight channels of four tokens a
// thread (quantize/rows.cuh), and stays: as many blocks as fit share the tiles of each head (prepass_share.cuh). Nothing here
// depends on the values of other tokens but the maxima.
#include <algorithm>
#include <cmath>

#include "common/launch.h"
#include "common/scale.cuh"
#include "sm80/prepass_operands.cuh"
#include "sm80/prepass_terms.cuh"

namespace sage {
namespace {

using namespace prepass;

constexpr int kClearThreads = 256;

// ------------------------------------------------------------------------------------------- maxima

__global__ void __launch_bounds__(kClearThreads) clear_maxima(const BackwardCall p) {
  const BackwardWorkspace& w = p.w;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kClearThreads + threadIdx.x;
  if (i < w.counters) reinterpret_cast<uint32_t*>(w.x_max)[i] = 0;
}

// -------------------------------------------------------------------------------------------- launches

// Blocks stay: as many as there is room for share the tiles of all planes.
int shares_of(int64_t room, int tiles, int64_t planes) {
  if (tiles == 0 || planes == 0) return 0;
  return static_cast<int>(std::clamp<int64_t>(room / planes, 1, tiles));
}

template <int kHeadDim, class Piece>
const char* start(const BackwardCall& p, Stream stream) {
  const AttentionShape& s = p.shape;
  const int q_tiles = tiles_of(s.queries), kv_tiles = tiles_of(s.keys);
  const int64_t q_planes = static_cast<int64_t>(s.batch) * s.heads, kv_planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  const int64_t places = multiprocessors();
  const char* error = nullptr;
  const auto run = [&](void (*kernel)(PrepassCall), int query_shares, int key_shares) {
    const int64_t blocks = std::max(q_planes * query_shares, kv_planes * key_shares);
    const PrepassCall call = {p, query_shares, key_shares};
    if (error == nullptr) error = launch(kernel, dim3(static_cast<unsigned>(blocks)), 2 * kHeadDim, 0, stream, call);
  };
  const bool train8 = p.backward == Backward::kTrain8;
  if (train8) {  // sagebwd's scales are found tile by tile
    error = launch(clear_maxima, dim3(blocks_for(p.w.counters, kClearThreads)), kClearThreads, 0, stream, p);
  }
  run(train8 ? query_terms<kHeadDim, Piece, true> : query_terms<kHeadDim, Piece, false>,
      shares_of(places * kTermsBlocks<kHeadDim>, q_tiles, q_planes), 0);
  const int64_t room = places * operands_blocks(kHeadDim, train8, device_architecture());
  run(train8 ? gradient_operands<kHeadDim, Piece, true> : gradient_operands<kHeadDim, Piece, false>,
      shares_of(room, q_tiles, q_planes), shares_of(room, kv_tiles, kv_planes));
  return error;
}

}  // namespace

const char* prepare_backward(const BackwardCall& p, Stream stream) {
  return with_pieces(p.out_dtype, p.out_dtype, p.shape.head_dim, [&](auto piece) {
    using P = decltype(piece);
    switch (p.shape.padded_dim) {
      case 64:
        return start<64, P>(p, stream);
      case 128:
        return start<128, P>(p, stream);
      default:
        return start<256, P>(p, stream);
    }
  });
}

}  // namespace sage
