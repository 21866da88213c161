#include "common/row_blocks.cuh"

#include <algorithm>
#include <mutex>
#include <vector>

namespace sage {
namespace {

// Heads whose keys and values take about this much stay in the L2 cache for all blocks.
constexpr int64_t kGroupBytes = 16 << 20;
// So many heads at once are shared by enough blocks for the memory's bandwidth, whatever their size.
constexpr int kMostHeads = 32;
constexpr int kTile = 128;       // keys
constexpr float kOverhead = 1.5f;  // of a row block, in tiles
constexpr int kMostItems = 1 << 14;  // with more, each block gets so many that any order evens out

// Tiles of keys that the window leaves to each row block of a head, and its overhead. Lengths and alignment
// live on the device: full lengths, aligned at the first token, stand for them.
std::vector<float> costs(const AttentionShape& s, const MaskParams& masks, int rows, int per_head) {
  std::vector<float> cost(per_head);
  for (int i = 0; i < per_head; ++i) {
    const int64_t row = static_cast<int64_t>(i) * rows;
    const int64_t low = std::max<int64_t>(0, row - masks.window_left);
    const int64_t high = std::min<int64_t>(s.keys, row + rows + masks.window_right);
    cost[i] = kOverhead + static_cast<float>(std::max<int64_t>(0, high - low)) / kTile;
  }
  return cost;
}

// When the last block is done.
float makespan(const std::vector<float>& cost, int planes, int group, int blocks) {
  const int per_head = static_cast<int>(cost.size()), items = planes * per_head;
  std::vector<float> busy(blocks, 0.0f);
  for (int turn = 0; turn * blocks < items; ++turn) {
    for (int block = 0; block < blocks; ++block) {
      const int item = RowBlocks::item(turn, block, blocks);
      if (item >= items) continue;
      const int first = item / (group * per_head) * group, size = std::min(group, planes - first);
      busy[block] += cost[per_head - 1 - item % (group * per_head) / size];
    }
  }
  return *std::max_element(busy.begin(), busy.end());
}

int best_group(const std::vector<float>& cost, int planes, int sharing, int fitting, int blocks) {
  int best = std::min(fitting, planes);
  if (planes * static_cast<int64_t>(cost.size()) > kMostItems) return best;
  float shortest = makespan(cost, planes, best, blocks);
  for (int group = sharing; group <= std::min(planes, kMostHeads); group += sharing) {
    const float time = makespan(cost, planes, group, blocks) * (group > fitting ? 1.01f : 1.0f);
    if (time < shortest) {
      shortest = time;
      best = group;
    }
  }
  return best;
}

bool all_equal(const std::vector<float>& cost) {
  return *std::max_element(cost.begin(), cost.end()) == *std::min_element(cost.begin(), cost.end());
}

// Where all row blocks take as long: the last of a head, if it is cut short, come after all others, and what is left of the
// others after the last full turn is cut into as many parts as leave one turn enough for them all.
void cut(RowBlocks& plan, int planes, int queries, int rows, int most_parts, int blocks) {
  plan.per_head = queries / rows;
  const int full = planes * plan.per_head, rest = queries % rows > 0 ? planes : 0, left = full % blocks;
  for (int parts = most_parts; parts > 1; --parts) {
    if (left * parts + rest > blocks) continue;
    plan.parts = parts;
    plan.split = left;
    break;
  }
  plan.whole = full - plan.split;
  plan.items = plan.whole + plan.split * plan.parts + rest;
}

// What a plan depends on.
struct Key {
  int planes, queries, keys, sharing, fitting, rows, most_parts, blocks, left, right;
  bool operator==(const Key& o) const {
    return planes == o.planes && queries == o.queries && keys == o.keys && sharing == o.sharing &&
           fitting == o.fitting && rows == o.rows && most_parts == o.most_parts && blocks == o.blocks && left == o.left &&
           right == o.right;
  }
};

}  // namespace

const char* plan_row_blocks(RowBlocks& plan, const AttentionShape& s, const MaskParams& masks, int rows, int most_parts,
                            int64_t head_bytes, int blocks) {
  const int64_t planes = static_cast<int64_t>(s.batch) * s.heads;
  const int per_head = (s.queries + rows - 1) / rows;
  if (planes * per_head * most_parts > INT32_MAX) {
    return "batch · heads · query length needs more than 2^31 blocks; split the batch.";
  }
  const int items = static_cast<int>(planes * per_head);
  plan = {1, per_head, items, 0, 1, items};
  if (items == 0) return nullptr;
  const int sharing = s.heads / s.kv_heads;
  const int64_t fitting = (kGroupBytes / std::max<int64_t>(head_bytes, 1) + 1) * sharing;
  const Key key = {static_cast<int>(planes), s.queries, s.keys, sharing,
                   static_cast<int>(std::min(fitting, planes)), rows, most_parts, blocks, masks.window_left,
                   masks.window_right};
  // The layers of a model ask for the same plan again and again.
  struct Entry {
    Key key;
    RowBlocks plan;
  };
  static std::mutex mutex;
  static std::vector<Entry> known;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& entry : known) {
    if (entry.key == key) {
      plan = entry.plan;
      return nullptr;
    }
  }
  const std::vector<float> cost = costs(s, masks, rows, per_head);
  if (all_equal(cost)) {
    plan.group_heads = key.fitting;
    if (most_parts > 1) cut(plan, key.planes, s.queries, rows, most_parts, blocks);
  } else {
    plan.group_heads = best_group(cost, key.planes, sharing, key.fitting, blocks);
  }
  if (known.size() >= 64) known.clear();
  known.push_back({key, plan});
  return nullptr;
}

}  // namespace sage
