// The order in which the persistent blocks of a forward kernel take the row blocks of all heads. Heads go in
// groups, whose keys and values are read by many blocks at the same time; in a group the last rows come
// first, because under a causal mask they see the most keys.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"

namespace sage {

struct RowBlock {
  int b, n, row;  // its first query
};

struct RowBlocks {
  int per_head;
  int group_heads;
  int items;  // row blocks of all heads

  __device__ RowBlock at(const AttentionShape& shape, int item, int rows) const {
    const int planes = shape.batch * shape.heads, group_items = group_heads * per_head;
    const int first = item / group_items * group_heads, within = item % group_items;
    const int size = min(group_heads, planes - first);
    const int plane = first + within % size;
    return {plane / shape.heads, plane % shape.heads, (per_head - 1 - within / size) * rows};
  }

  // The item that `block` of `blocks` takes as its turn-th, or one past the last. There and back, so that a
  // block with a long row block in one turn has a short one in the next.
  static __host__ __device__ int item(int turn, int block, int blocks) {
    return turn * blocks + (turn % 2 == 0 ? block : blocks - 1 - block);
  }
};

// Plans row blocks of `rows` queries for `blocks` persistent blocks, for heads with `head_bytes` of keys and
// values: the number of heads in a group is the one that keeps the blocks equally busy under the window. Null, or
// why there is no plan.
const char* plan_row_blocks(RowBlocks& plan, const AttentionShape& shape, const MaskParams& masks, int rows,
                            int64_t head_bytes, int blocks);

}  // namespace sage
