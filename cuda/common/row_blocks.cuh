// The order in which the persistent blocks of a forward kernel take the row blocks of all heads. Heads go in
// groups, whose keys and values are read by many blocks at the same time; in a group the last rows come
// first, because under a causal mask they see the most keys. Where, as far as the window says, all row blocks see as many keys,
// and a kernel can leave rows out: the row blocks that don't fill a turn of all blocks come after the others, cut into parts
// where one turn is enough for those, and then the last, shorter ones of all heads, if one turn is enough for them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"

namespace sage {

struct RowBlock {
  int b, n, row;  // its first query
  int rows;       // of them, from there on
};

struct RowBlocks {
  static constexpr int kUnit = 64;  // queries: parts of a row block are multiples of it

  int group_heads;
  int per_head;  // row blocks of a head, without a shorter last one where such come last
  int whole;     // of all of them, that are taken whole
  int split;     // of all of them, that come after those, in parts
  int parts;
  int items;  // whole ones, parts, and the shorter ones that come last

  // The item-th row block of a plan that cuts none.
  __device__ RowBlock whole_block(const AttentionShape& shape, int item, int rows) const {
    const int planes = shape.batch * shape.heads, group_items = group_heads * per_head;
    const int first = item / group_items * group_heads, within = item % group_items;
    const int size = min(group_heads, planes - first);
    const int plane = first + within % size, row = (per_head - 1 - within / size) * rows;
    return {plane / shape.heads, plane % shape.heads, row, min(rows, shape.queries - row)};
  }

  // That of any plan.
  __device__ RowBlock at(const AttentionShape& shape, int item, int rows) const {
    if (item < whole) return whole_block(shape, item, rows);
    item -= whole;
    if (item < split * parts) {
      const int units = rows / kUnit, part = item % parts;
      const int first = part * units / parts * kUnit, end = (part + 1) * units / parts * kUnit;
      RowBlock block = whole_block(shape, whole + item / parts, rows);
      block.row += first;
      block.rows = end - first;
      return block;
    }
    const int plane = item - split * parts;
    return {plane / shape.heads, plane % shape.heads, per_head * rows, shape.queries - per_head * rows};
  }

  // The item that `block` of `blocks` takes as its turn-th, or one past the last. There and back, so that a
  // block with a long row block in one turn has a short one in the next.
  static __host__ __device__ int item(int turn, int block, int blocks) {
    return turn * blocks + (turn % 2 == 0 ? block : blocks - 1 - block);
  }
};

// Which of them each block takes. Where they cost differently, and are not too many, each block has a list of its own, as if the
// block that is free first always took the next. It is a part of the kernel's parameters.
struct RowBlockLists {
  static constexpr int kMostItems = 4096, kMostBlocks = 256;

  RowBlocks plan;
  bool listed;
  uint16_t first[kMostBlocks + 1];  // of a block, in `items`
  uint16_t items[kMostItems];

  // The item that `block` of `blocks` takes as its turn-th; -1 past its last.
  __host__ __device__ int item(int turn, int block, int blocks) const {
    if (listed) {
      const int i = first[block] + turn;
      return i < first[block + 1] ? items[i] : -1;
    }
    const int i = RowBlocks::item(turn, block, blocks);
    return i < plan.items ? i : -1;
  }
};

// Plans row blocks of `rows` queries, which can be cut into `most_parts`, for `blocks` persistent blocks, for heads with
// `head_bytes` of keys and values: the number of heads in a group is the one that keeps the blocks equally busy under the
// window. Null, or why there is no plan.
const char* plan_row_blocks(RowBlocks& plan, const AttentionShape& shape, const MaskParams& masks, int rows, int most_parts,
                            int64_t head_bytes, int blocks);
const char* plan_row_blocks(RowBlockLists& lists, const AttentionShape& shape, const MaskParams& masks, int rows,
                            int most_parts, int64_t head_bytes, int blocks);

}  // namespace sage
