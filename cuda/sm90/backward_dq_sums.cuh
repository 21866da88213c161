// dQ beside dK and dV: the codes of G, which leave the accumulators keys by queries, become an operand in shared memory,
// queries by keys; the product with a block's keys is added to the queries' sums in memory, in 16 bits
// (docs/kernels/sm90_backward.md).
//
// The sums lie where dQ will lie, [B, T, N, H] of f16, times a power of two (`sum_factor`). They are cleared by the pre-pass
// for the first heads (`BackwardCall::cleared_heads`), then a few heads ahead (`clear_ahead`), so that zeros still lie in the
// L2 cache when something is added to them. finish_dq (backward_finish.cuh) makes dQ of them.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/tile.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/counters.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/backward_common.cuh"
#include "sm90/backward_dkv_config.cuh"

namespace sage::sm90 {

// What keeps sums finite in 16 bits: a code is at most 448, so a key adds 448² at most, and rounding to nearest never more
// than doubles a sum of magnitudes, whatever the order: 2 · 448² / 8 = 50176.
SAGE_HOST_DEVICE float sum_factor(int keys) {
  float factor = 0x1p-3f;
  for (int64_t most = 1; most < keys; most *= 2) factor *= 0.5f;
  return factor;
}

// The codes of a warp's 16 keys as they are written: keys g and g + 8 side by side, the order in which `z` has them then.
__device__ __forceinline__ void pair_keys(uint32_t (&pairs)[kGradientRegisters], const uint32_t (&g)[kGradientRegisters]) {
#pragma unroll
  for (int i = 0; i < kGradientRegisters; i += 2) {
    pairs[i] = ptx::prmt(g[i], g[i + 1], 0x5140);
    pairs[i + 1] = ptx::prmt(g[i], g[i + 1], 0x7362);
  }
  ptx::keep_in_registers(pairs);  // before products have g as their operand: then nobody else may read it
}

// Where a thread writes in its warpgroup's tile of G, [64 queries][64 keys].
__device__ __forceinline__ int code_offset() {
  const int thread = static_cast<int>(threadIdx.x);
  return SharedTile<kGradientTile, 64>::offset(thread % kWarpSize, thread / kWarpSize % 4);
}

// Writes them there; `first` is the tile's address and that offset.
__device__ __forceinline__ void store_codes(uint32_t first, const uint32_t (&pairs)[kGradientRegisters]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // the twist repeats every 8 rows
    const uint32_t* const x = pairs + 4 * half;
    ptx::stmatrix_x4_transposed(first + half * 32 * 64, x[0], x[1], x[2], x[3]);
  }
}

// sums = G·zᵀ: 64 queries by 64 channels over the keys of kGroups tiles, of rows of 64 bytes, at addresses in 16-byte units.
template <int kGroups, int kHeadDim>
__device__ __forceinline__ void multiply_queries(float (&sums)[32], uint32_t g, uint32_t z) {
#pragma unroll
  for (int step = 0; step < 2 * kGroups; ++step) {
    const int tile = step / 2, at = 2 * (step % 2);
    ptx::wgmma_m64k32_f32_e4m3(sums, ptx::shared_operand<64, 0, 512>(g + tile * (kGradientTile * 64 / 16) + at),
                               ptx::shared_operand<64, 0, 512>(z + tile * (kHeadDim * 64 / 16) + at), step > 0);
  }
}

// A tile of 64 queries of a head by the block's keys.
struct QueryTile {
  int query, head;  // its first; within the group
};

// The part that a consumer warpgroup has in dQ: of each tile 64 channels, one tile later than dK and dV, or of every third
// tile all 64, two tiles later (`kInTurn`). Tiles are numbered from the kernel's beginning; the places of their codes are used
// in turn.
//
// Who publishes the codes of tile n has read those of tile n − kLate, if they were its to read. So who has waited for the codes
// of tile n − kLate may write those of tile n over those of tile n − 2·kLate and of all before.
template <class Config>
struct DqPart {
  static constexpr int kPlaces = Config::kWithDq ? Config::kCodesPlaces : 1, kLate = Config::kInTurn ? 2 : 1;
  static_assert(!Config::kWithDq || kPlaces >= 2 * kLate, "codes are not written over before they have been read");
  static constexpr int kValues = kOutTileColumns / 2;  // of a thread
  // Where the codes of a tile lie, and the phase in which they are there.
  struct Place {
    int index = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ Place next() const {
      return index == kPlaces - 1 ? Place{0, phase ^ 1} : Place{index + 1, phase};
    }
    // Of the tile kLate before, whose product is due with this one's codes. Before the first kLate tiles a barrier says yes.
    __device__ __forceinline__ Place due() const {
      return index < kLate ? Place{index + kPlaces - kLate, phase ^ 1} : Place{index - kLate, phase};
    }
  };
  const CUtensorMap& map;
  float factor;
  int first_head;  // of queries, of the group
  uint32_t base;
  int group, warp;  // the latter of the former
  int code_at;      // of this thread's codes, in a place
  unsigned char* staged;

  __device__ __forceinline__ DqPart(const CUtensorMap& map, float factor, unsigned char* shared, int group, int first_head)
      : map(map),
        factor(factor),
        first_head(first_head),
        base(ptx::shared_address(shared)),
        group(group),
        warp(static_cast<int>(ptx::uniform(threadIdx.x / kWarpSize % 4))),
        code_at(group * Config::kCodesTile + code_offset()),
        staged(shared + Config::kStagedAt + (4 * group + warp) * Config::kStagedBytes) {}

  __device__ __forceinline__ uint32_t codes(Place place) const {
    return base + Config::kCodesAt + place.index * Config::kCodesBytes;
  }
  __device__ __forceinline__ uint32_t full(Place place) const { return base + Config::codes_full(place.index); }
  __device__ __forceinline__ uint32_t ask(Place place) const { return ptx::mbarrier_try_wait(full(place), place.phase); }
  __device__ __forceinline__ void wait(Place place) const { ptx::mbarrier_wait(full(place), place.phase); }
  // Whether the product that is due with the n-th tile is this warpgroup's.
  __device__ __forceinline__ bool takes(int n) const { return !Config::kInTurn || n % Config::kGroups == group; }

  __device__ __forceinline__ void store(Place place, const uint32_t (&pairs)[kGradientRegisters]) const {
    store_codes(codes(place) + code_at, pairs);
  }
  // Says that they are there.
  __device__ __forceinline__ void publish(Place place) const {
    ptx::fence_proxy_async_shared();
    ptx::mbarrier_arrive(full(place));
  }
  // The product of a tile, a group of its own.
  __device__ __forceinline__ void start(float (&sums)[kValues], Place place) const {
    const int channels = Config::kInTurn ? 0 : group * (kOutTileColumns * 64);
    multiply_queries<Config::kGroups, Config::kHeadDim>(sums, codes(place) / 16, (base + Config::kZAt + channels) / 16);
    ptx::wgmma_commit_group();
  }
  // Until the copy engine has read what was staged before.
  __device__ __forceinline__ void wait_for_staged() const {
    ptx::cp_async_bulk_wait_read();
    __syncwarp();
  }
  // A warp's 16 rows to shared memory, for the copy engine, once a fence has followed.
  __device__ __forceinline__ void stage(const float (&sums)[kValues]) const {
    write_tiles<kOutTileColumns, false>(staged, [&](int n) {
      return FourOutputs{{sums[4 * n] * factor, sums[4 * n + 1] * factor},
                         {sums[4 * n + 2] * factor, sums[4 * n + 3] * factor}};
    });
  }
  // Adds them to memory, if `some`.
  __device__ __forceinline__ void send(const QueryTile& tile, int batch, bool some) const {
    const int channel = (first_head + tile.head) * Config::kHeadDim + (Config::kInTurn ? 0 : group * kOutTileColumns);
    __syncwarp();
    ptx::cp_reduce_async_bulk_tensor_3d_if(&map, ptx::shared_address(staged), channel, tile.query + 16 * warp, batch, some);
    ptx::cp_async_bulk_commit();
  }
  // All of it at once.
  __device__ __forceinline__ void add(Place place, const QueryTile& tile, int batch) const {
    float sums[kValues];
    ptx::wgmma_fence();
    start(sums, place);
    wait_for_staged();
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_registers(sums);
    stage(sums);
    ptx::fence_proxy_async_shared();
    send(tile, batch, true);
  }
};

// ------------------------------------------------------------------------------------------------- clearing, reporting

inline constexpr int kMostZeros = 64;  // boxes of zeros that a block of keys may have to send

// Boxes of 16 queries by 64 channels that hold the dQ of one head of keys.
SAGE_HOST_DEVICE int64_t boxes_of_head(const AttentionShape& s) {
  return static_cast<int64_t>((s.queries + 15) / 16) * (s.padded_dim / kOutTileColumns) * (s.heads / s.kv_heads);
}

// How many heads of keys lie between the one that blocks work on and the one whose dQ they clear: those that two turns of
// all blocks take. All, where a block would have too much to clear.
template <class Config>
int heads_cleared_before(const AttentionShape& s) {
  const int64_t planes = static_cast<int64_t>(s.batch) * s.kv_heads, blocks = key_blocks<Config>(s);
  if (boxes_of_head(s) > kMostZeros * blocks) return static_cast<int>(planes);
  return static_cast<int>(std::min<int64_t>(planes, (2 * multiprocessors() + blocks - 1) / blocks));
}

// The part of warp 1: with each of its blocks of keys, a share of the dQ of a head to come.
template <class Config>
__device__ __forceinline__ void clear_ahead(const DkvCall& call, unsigned char* shared) {
  const BackwardCall& p = call.p;
  const AttentionShape& s = p.shape;
  const GradientBarriers barriers = Config::barriers(ptx::shared_address(shared));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  uint4* const zeros = reinterpret_cast<uint4*>(shared + Config::kZerosAt);
#pragma unroll
  for (int i = 0; i < Config::kStagedBytes / 16; i += kWarpSize) zeros[i + lane] = make_uint4(0, 0, 0, 0);
  ptx::fence_proxy_async_shared();
  __syncwarp();
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    ptx::mbarrier_wait(barriers.slot_full(turn % kGradientSlots), turn / kGradientSlots % 2);
    const typename Config::Slot& slot = Config::slot(shared, turn);
    const int row = slot.row, plane = slot.kv_plane + p.cleared_heads;
    ptx::mbarrier_arrive(barriers.slot_empty(turn % kGradientSlots));
    if (row == kNoRows) return;
    if (plane >= s.batch * s.kv_heads || lane != 0) continue;
    constexpr int kWidth = Config::kHeadDim / kOutTileColumns;
    const int64_t boxes = boxes_of_head(s);
    const int share = row / Config::kRows, columns = call.group_heads * kWidth;  // boxes beside each other
    const int first = static_cast<int>(boxes * share / call.key_blocks);
    const int end = static_cast<int>(boxes * (share + 1) / call.key_blocks);
    const int column = plane % s.kv_heads * columns;
#pragma unroll 1
    for (int box = first; box < end; ++box) {
      ptx::cp_async_bulk_tensor_3d_store(&call.dq, ptx::shared_address(zeros), (column + box % columns) * kOutTileColumns,
                                         box / columns * 16, plane / s.kv_heads);
    }
    ptx::cp_async_bulk_commit();
    ptx::cp_async_bulk_wait<0>();
    ptx::count_up(p.w.cleared + plane);
  }
}

// By each consumer warp, behind its two last copies of outputs: all that it had to add before is in memory.
__device__ __forceinline__ void report_added(uint32_t* added) {
  if (!ptx::elect_one()) return;
  ptx::cp_async_bulk_wait<2>();
  ptx::count_up(added);
}

}  // namespace sage::sm90
