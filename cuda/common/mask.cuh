// Who sees whom (docs/abi.md, "Common operands"), as one value that forward and backward share:
// visibility of one (query, key) pair, and what can be said about a whole tile without looking at
// its pairs. Segment ids and dense masks are summarised once per call into tiles of 64 × 64.
#pragma once

#include <cuda_runtime.h>

#include "common/params.h"

namespace sage {

inline constexpr int kMaskTile = 64;

enum class TileView : int {
  kNothing = 0,  // no valid query of the tile sees any of its keys: skip it
  kSome = 1,     // look at every pair
  kAll = 2       // every valid query sees every key: no mask needed
};

struct IdRange {
  int low, high;
};

// Where the summaries lie in the workspace.
struct MaskSummary {
  IdRange* q_ids;     // [B, T64] smallest and largest segment id of 64 queries, or null
  IdRange* kv_ids;    // [B, S64]
  uint8_t* state;     // TileView of the dense mask, or the block mask, [B|1, N|1, T64|1, S64|1], or null
  int state_rows;     // T64|1
  int state_columns;  // S64|1
  size_t bytes;
};

__host__ __device__ inline int mask_tiles(int length) {
  return (length + kMaskTile - 1) / kMaskTile;
}

__host__ __device__ inline MaskSummary mask_summary(const AttentionShape& shape,
                                                    const MaskParams& masks, void* workspace) {
  MaskSummary s = {};
  unsigned char* base = static_cast<unsigned char*>(workspace);
  if (masks.q_seg != nullptr) {
    const size_t q_tiles = static_cast<size_t>(shape.batch) * mask_tiles(shape.queries);
    const size_t kv_tiles = static_cast<size_t>(shape.batch) * mask_tiles(shape.keys);
    s.q_ids = reinterpret_cast<IdRange*>(base);
    s.kv_ids = s.q_ids + q_tiles;
    s.bytes = (q_tiles + kv_tiles) * sizeof(IdRange);
  }
  if (masks.mask != nullptr) {
    s.state_rows = mask_tiles(masks.mask_sizes[2] * masks.mask_tile);
    s.state_columns = mask_tiles(masks.mask_sizes[3] * masks.mask_tile);
    if (masks.mask_tile == 1) {
      s.state = base + s.bytes;
      s.bytes += static_cast<size_t>(masks.mask_sizes[0]) * masks.mask_sizes[1] * s.state_rows * s.state_columns;
    } else {
      s.state = const_cast<uint8_t*>(masks.mask);  // a block mask is its own summary; it is not written to
    }
  }
  return s;
}

// Consecutive positions.
struct Span {
  int low;
  uint32_t count;
  __device__ Span(int low, int high) : low(low), count(max(0, high - low + 1)) {}
  __device__ bool contains(int x) const { return static_cast<uint32_t>(x - low) < count; }
};

// The mask of one batch row and query head.
struct Mask {
  int b, n;
  int queries, keys, offset, left, right;
  static constexpr int kBlockSeen = 1;  // entry of a block mask
  int state_all;                        // what `state` is where everything is seen
  const int32_t* q_seg;
  const int32_t* kv_seg;
  const uint8_t* dense;  // looked at where a mask has an entry for each pair
  int64_t stride_t, stride_s;
  const IdRange* q_ids;
  const IdRange* kv_ids;
  const uint8_t* state;  // TileView of tiles; a block mask itself, whose entries are 0 and 1
  int state_stride_t, state_stride_s;

  __device__ Mask(const AttentionShape& shape, const MaskParams& p, void* workspace, int b, int n)
      : b(b), n(n) {
    const int32_t* bounds = p.bounds + 3 * static_cast<int64_t>(b);
    queries = min(bounds[0], shape.queries);
    keys = min(bounds[1], shape.keys);
    offset = bounds[2];
    left = p.window_left;
    right = p.window_right;
    const MaskSummary summary = mask_summary(shape, p, workspace);
    q_seg = kv_seg = nullptr;
    q_ids = kv_ids = nullptr;
    if (p.q_seg != nullptr) {
      q_seg = p.q_seg + static_cast<int64_t>(b) * shape.queries;
      kv_seg = p.kv_seg + static_cast<int64_t>(b) * shape.keys;
      q_ids = summary.q_ids + static_cast<int64_t>(b) * mask_tiles(shape.queries);
      kv_ids = summary.kv_ids + static_cast<int64_t>(b) * mask_tiles(shape.keys);
    }
    dense = state = nullptr;
    stride_t = stride_s = state_stride_t = state_stride_s = 0;
    state_all = p.mask_tile > 1 ? kBlockSeen : static_cast<int>(TileView::kAll);
    if (p.mask != nullptr) {
      dense = p.mask + b * p.mask_strides[0] + n * p.mask_strides[1];
      stride_t = p.mask_strides[2];
      stride_s = p.mask_strides[3];
      const int64_t plane = (p.mask_sizes[0] > 1 ? static_cast<int64_t>(b) * p.mask_sizes[1] : 0) +
                            (p.mask_sizes[1] > 1 ? n : 0);
      state = summary.state + plane * summary.state_rows * summary.state_columns;
      state_stride_t = p.mask_sizes[2] > 1 ? summary.state_columns : 0;
      state_stride_s = p.mask_sizes[3] > 1 ? 1 : 0;
    }
  }

  // Of a tile of 64 queries and 64 keys that view() does not call kNothing. `dense_offset`: from the dense mask of this head
  // to that of another, in elements.
  __device__ bool visible(int i, int j, int64_t dense_offset = 0) const {
    const int diagonal = j - i - offset;
    if (i >= queries || j >= keys || diagonal < -left || diagonal > right) return false;
    if (q_seg != nullptr && q_seg[i] != kv_seg[j]) return false;
    return dense == nullptr || in_blocks() || dense[dense_offset + i * stride_t + j * stride_s] != 0;
  }

  // Whether the mask has an entry for each tile: such a tile is then seen whole, as far as it is concerned.
  __device__ bool in_blocks() const { return state_all == kBlockSeen; }

  // Whether bounds and window alone decide within such a tile.
  __device__ bool spans_only() const { return q_seg == nullptr && (dense == nullptr || in_blocks()); }

  // The keys that bounds and window leave to query i.
  __device__ Span keys_of(int i) const {
    return {max(0, i + offset - left), i < queries ? min(keys - 1, i + offset + right) : -1};
  }

  // The queries that they leave to key j.
  __device__ Span queries_of(int j) const {
    return {max(0, j - offset - right), j < keys ? min(queries - 1, j - offset + left) : -1};
  }

  // Tiles of `tile` keys, [first, end), that bounds and window leave to queries [begin, end).
  __device__ void key_tiles(int query_begin, int query_end, int tile, int& first, int& end) const {
    query_end = min(query_end, queries);
    const int low = max(0, query_begin + offset - left);
    const int high = min(keys, query_end + offset + right);
    first = end = 0;
    if (query_begin >= query_end || low >= high) return;
    first = low / tile;
    end = (high + tile - 1) / tile;
  }

  // Tiles of kMaskTile keys, [first, end), of which view(query, rows, .) is kAll for all that bounds and window
  // say; none where segments or a mask have a say.
  __device__ void whole_tiles(int query, int rows, int& first, int& end) const {
    const int last = min(query + rows, queries) - 1;
    first = end = 0;
    if (!spans_only() || state != nullptr || query > last) return;
    first = (max(0, last + offset - left) + kMaskTile - 1) / kMaskTile;
    end = max(0, min(keys, query + offset + right + 1)) / kMaskTile;
  }

  // Tiles of kMaskTile queries, [first, end), of which view(., kMaskTile, key) is kAll in the same way.
  __device__ void whole_query_tiles(int key, int& first, int& end) const {
    first = end = 0;
    if (!spans_only() || state != nullptr || key + kMaskTile > keys) return;
    first = (max(0, key + kMaskTile - 1 - offset - right) + kMaskTile - 1) / kMaskTile;
    end = max(0, min(queries, key - offset + left + 1)) / kMaskTile;
  }

  // Tiles of `tile` queries, [first, end), that bounds and window leave to keys [begin, end).
  __device__ void query_tiles(int key_begin, int key_end, int tile, int& first, int& end) const {
    key_end = min(key_end, keys);
    const int low = max(0, key_begin - offset - right);
    const int high = min(queries, key_end - offset + left);
    first = end = 0;
    if (key_begin >= key_end || low >= high) return;
    first = low / tile;
    end = (high + tile - 1) / tile;
  }

  // What queries [query, query + rows) see of keys [key, key + kMaskTile); `key` is a multiple of
  // 64. Queries past the valid ones are ignored: their results are overwritten. `state_offset`: from
  // the summary of this head's dense mask to that of another.
  __device__ TileView view(int query, int rows, int key, int64_t state_offset = 0) const {
    const int last = min(query + rows, queries) - 1;
    if (query > last || key >= keys) return TileView::kNothing;
    const int key_last = min(key + kMaskTile, keys) - 1;
    if (key_last < query + offset - left || key > last + offset + right) {
      return TileView::kNothing;
    }
    bool all = key + kMaskTile <= keys && key >= last + offset - left &&
               key + kMaskTile - 1 <= query + offset + right;
    const int column = key / kMaskTile;
    if (q_ids != nullptr) {
      const IdRange k = kv_ids[column];
      bool disjoint = true;
#pragma unroll 1
      for (int row = query / kMaskTile; row <= last / kMaskTile; ++row) {
        const IdRange q = q_ids[row];
        disjoint = disjoint && (q.high < k.low || k.high < q.low);
        all = all && q.low == q.high && k.low == k.high && q.low == k.low;
      }
      if (disjoint) return TileView::kNothing;
    }
    if (state != nullptr) {
      bool nothing = true;
#pragma unroll 1
      for (int row = query / kMaskTile; row <= last / kMaskTile; ++row) {
        const uint8_t s = state[state_offset + static_cast<int64_t>(row) * state_stride_t +
                                static_cast<int64_t>(column) * state_stride_s];
        nothing = nothing && s == static_cast<uint8_t>(TileView::kNothing);
        all = all && s == state_all;
      }
      if (nothing) return TileView::kNothing;
    }
    return all ? TileView::kAll : TileView::kSome;
  }
};

// Fills the summaries; nothing to launch where a call has neither segments nor a mask of pairs.
const char* summarize_masks(const AttentionShape& shape, const MaskParams& masks, void* workspace,
                            Stream stream);

}  // namespace sage
