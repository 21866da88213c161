// Summaries of segment ids and dense masks per tile of 64, so that attention kernels skip tiles in
// which nothing is visible and drop the mask where everything is.
//
// Requirements: none beyond sm_80. One warp a tile; grids walk tiles in memory order.
#include "common/launch.h"
#include "common/mask.cuh"

namespace sage {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;

struct SummaryParams {
  AttentionShape shape;
  MaskParams masks;
  void* workspace;
};

__device__ IdRange id_range(const int32_t* ids, int length, int tile, int lane) {
  IdRange r = {INT32_MAX, INT32_MIN};
  for (int i = tile * kMaskTile + lane; i < min(length, (tile + 1) * kMaskTile); i += 32) {
    r.low = min(r.low, ids[i]);
    r.high = max(r.high, ids[i]);
  }
  for (int step = 16; step > 0; step /= 2) {
    r.low = min(r.low, __shfl_xor_sync(kFullWarp, r.low, step));
    r.high = max(r.high, __shfl_xor_sync(kFullWarp, r.high, step));
  }
  return r;
}

__global__ void __launch_bounds__(kThreads) segment_ranges(const SummaryParams p) {
  const MaskSummary summary = mask_summary(p.shape, p.masks, p.workspace);
  const int lane = threadIdx.x % 32;
  const int q_tiles = mask_tiles(p.shape.queries), kv_tiles = mask_tiles(p.shape.keys);
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t b = tile / (q_tiles + kv_tiles);
  const int within = static_cast<int>(tile % (q_tiles + kv_tiles));
  if (b >= p.shape.batch) return;  // whole warps leave together
  if (within < q_tiles) {
    const IdRange r = id_range(p.masks.q_seg + b * p.shape.queries, p.shape.queries, within, lane);
    if (lane == 0) summary.q_ids[b * q_tiles + within] = r;
  } else {
    const int t = within - q_tiles;
    const IdRange r = id_range(p.masks.kv_seg + b * p.shape.keys, p.shape.keys, t, lane);
    if (lane == 0) summary.kv_ids[b * kv_tiles + t] = r;
  }
}

__global__ void __launch_bounds__(kThreads) dense_states(const SummaryParams p) {
  const MaskSummary summary = mask_summary(p.shape, p.masks, p.workspace);
  const int lane = threadIdx.x % 32;
  const int rows = p.masks.mask_sizes[2], columns = p.masks.mask_sizes[3];
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t tiles_a_plane = static_cast<int64_t>(summary.state_rows) * summary.state_columns;
  const int64_t plane = tile / tiles_a_plane;
  if (plane >= static_cast<int64_t>(p.masks.mask_sizes[0]) * p.masks.mask_sizes[1]) return;
  const int row = static_cast<int>(tile % tiles_a_plane / summary.state_columns) * kMaskTile;
  const int column = static_cast<int>(tile % summary.state_columns) * kMaskTile;
  const uint8_t* entries = p.masks.mask + plane * rows * columns;
  bool any = false, all = true;
  for (int i = row; i < min(rows, row + kMaskTile); ++i) {
    for (int j = column + lane; j < min(columns, column + kMaskTile); j += 32) {
      const bool set = entries[static_cast<int64_t>(i) * columns + j] != 0;
      any = any || set;
      all = all && set;
    }
  }
  any = __any_sync(kFullWarp, any);
  all = __all_sync(kFullWarp, all);
  const TileView view = all ? TileView::kAll : any ? TileView::kSome : TileView::kNothing;
  if (lane == 0) summary.state[tile] = static_cast<uint8_t>(view);
}

}  // namespace

size_t mask_workspace_bytes(const AttentionShape& shape, const MaskParams& masks) {
  return mask_summary(shape, masks, nullptr).bytes;
}

const char* summarize_masks(const AttentionShape& shape, const MaskParams& masks, void* workspace,
                            Stream stream) {
  const SummaryParams params = {shape, masks, workspace};
  const char* error = nullptr;
  if (masks.q_seg != nullptr) {
    const int64_t tiles =
        static_cast<int64_t>(shape.batch) * (mask_tiles(shape.queries) + mask_tiles(shape.keys));
    error = launch(segment_ranges, blocks_for(tiles, kWarps), kThreads, 0, stream, params);
  }
  if (masks.mask != nullptr && masks.mask_tile == 1 && error == nullptr) {
    const int64_t tiles = static_cast<int64_t>(masks.mask_sizes[0]) * masks.mask_sizes[1] *
                          mask_tiles(masks.mask_sizes[2]) * mask_tiles(masks.mask_sizes[3]);
    error = launch(dense_states, blocks_for(tiles, kWarps), kThreads, 0, stream, params);
  }
  return error;
}

}  // namespace sage
