// The order in which the persistent blocks of a forward kernel take the row blocks of all heads. Heads go in
// groups, whose keys and values stay in the L2 cache; in a group the last rows come first, because under a
// causal mask they see the most keys.
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
  int group_heads;  // query heads whose keys and values fit the L2 cache together
  int items;        // row blocks of all heads

  __device__ RowBlock at(const AttentionShape& shape, int item, int rows) const {
    const int planes = shape.batch * shape.heads, group_items = group_heads * per_head;
    const int first = item / group_items * group_heads, within = item % group_items;
    const int size = min(group_heads, planes - first);
    const int plane = first + within % size;
    return {plane / shape.heads, plane % shape.heads, (per_head - 1 - within / size) * rows};
  }

  // The item that `block` of `blocks` takes as its turn-th, or one past the last. There and back, so that a
  // block with a long row block in one turn has a short one in the next.
  static __device__ int item(int turn, int block, int blocks) {
    return turn * blocks + (turn % 2 == 0 ? block : blocks - 1 - block);
  }
};

// Query heads whose keys and values take about this much of the L2 cache.
inline constexpr int64_t kGroupBytes = 16 << 20;

// Row blocks of `rows` queries, for heads with `key_bytes` of keys and values. Null, or why it cannot be.
inline const char* plan_row_blocks(RowBlocks& plan, const AttentionShape& s, int rows, int64_t key_bytes) {
  const int64_t planes = static_cast<int64_t>(s.batch) * s.heads;
  plan.per_head = (s.queries + rows - 1) / rows;
  if (planes * plan.per_head > INT32_MAX) {
    return "batch · heads · query length needs more than 2^31 blocks; split the batch.";
  }
  plan.items = static_cast<int>(planes * plan.per_head);
  const int64_t fitting = (kGroupBytes / (key_bytes + 1) + 1) * (s.heads / s.kv_heads);
  plan.group_heads = static_cast<int>(fitting < planes ? fitting : planes);
  return nullptr;
}

}  // namespace sage
