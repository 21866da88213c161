#include "common/row_blocks.cuh"

#include <algorithm>
#include <functional>
#include <mutex>
#include <queue>
#include <utility>
#include <vector>

namespace sage {
namespace {

// Heads whose keys and values take about this much stay in the L2 cache for all blocks.
constexpr int64_t kGroupBytes = 16 << 20;
// So many heads at once are shared by enough blocks for the memory's bandwidth, whatever their size.
constexpr int kMostHeads = 32;
constexpr int kTile = 128;       // keys
constexpr float kOverhead = 3.0f;  // of a row block, in tiles
constexpr float kUnitOverhead = 2.0f;  // of a tile, in units of queries: fewer of them hide less of each other's waiting
constexpr int kMostItems = 1 << 14;  // with more, each block gets so many that any order evens out

// What a plan depends on.
struct Key {
  int planes, queries, keys, sharing, fitting, rows, most_parts, blocks, left, right;
  bool lists;
  bool operator==(const Key& o) const {
    return planes == o.planes && queries == o.queries && keys == o.keys && sharing == o.sharing &&
           fitting == o.fitting && rows == o.rows && most_parts == o.most_parts && blocks == o.blocks && left == o.left &&
           right == o.right && lists == o.lists;
  }
};

// Tiles of keys that the window leaves to each row block of a head, and its overhead. Lengths and alignment
// live on the device: full lengths, aligned at the first token, stand for them.
std::vector<float> costs(const AttentionShape& s, const MaskParams& masks, int rows, int most_parts, int per_head) {
  std::vector<float> cost(per_head);
  for (int i = 0; i < per_head; ++i) {
    const int64_t row = static_cast<int64_t>(i) * rows;
    const int64_t low = std::max<int64_t>(0, row - masks.window_left);
    const int64_t high = std::min<int64_t>(s.keys, row + rows + masks.window_right);
    cost[i] = kOverhead + static_cast<float>(std::max<int64_t>(0, high - low)) / kTile;
  }
  const int last = s.queries % rows;
  if (last > 0 && most_parts > 1) {  // a kernel that can leave rows out
    const auto units = [](int queries) { return (queries + RowBlocks::kUnit - 1) / RowBlocks::kUnit + kUnitOverhead; };
    cost.back() *= units(last) / units(rows);
  }
  return cost;
}

// The cost of an item of a plan that cuts none.
float item_cost(const std::vector<float>& cost, int planes, int group, int item) {
  const int per_head = static_cast<int>(cost.size());
  const int first = item / (group * per_head) * group, size = std::min(group, planes - first);
  return cost[per_head - 1 - item % (group * per_head) / size];
}

// When the last block is done.
float makespan(const std::vector<float>& cost, int planes, int group, int blocks) {
  const int items = planes * static_cast<int>(cost.size());
  std::vector<float> busy(blocks, 0.0f);
  for (int turn = 0; turn * blocks < items; ++turn) {
    for (int block = 0; block < blocks; ++block) {
      const int item = RowBlocks::item(turn, block, blocks);
      if (item < items) busy[block] += item_cost(cost, planes, group, item);
    }
  }
  return *std::max_element(busy.begin(), busy.end());
}

// The same where the block that is free first takes the next item: take(item, block) is called for each.
template <class Take>
float listed_makespan(const std::vector<float>& cost, int planes, int group, int blocks, Take take) {
  using Free = std::pair<float, int>;  // from when on, which block
  std::priority_queue<Free, std::vector<Free>, std::greater<Free>> free;
  for (int block = 0; block < blocks; ++block) free.push({0.0f, block});
  float last = 0.0f;
  for (int item = 0; item < planes * static_cast<int>(cost.size()); ++item) {
    const auto [time, block] = free.top();
    free.pop();
    const float done = time + item_cost(cost, planes, group, item);
    free.push({done, block});
    last = std::max(last, done);
    take(item, block);
  }
  return last;
}

// The number of heads in a group for which time(heads) is shortest. A hundredth more counts where they don't fit the cache, and
// where blocks take lists and not all heads are shared by equally many of them, which keeps those in step that share one.
template <class Time>
int best_group(const Key& key, bool listed, Time time) {
  const auto penalized = [&](int group) {
    return time(group) * (group > key.fitting ? 1.01f : 1.0f) * (listed && key.blocks % group != 0 ? 1.01f : 1.0f);
  };
  int best = key.fitting;
  float shortest = penalized(best);
  const int most = std::min(key.planes, listed ? std::max(kMostHeads, key.fitting) : kMostHeads);
  // Of large groups few are tried: each takes as long as the plan itself.
  for (int group = key.sharing; group <= most; group = group < kMostHeads ? group + key.sharing : 2 * group) {
    const float with_penalties = penalized(group);
    if (with_penalties < shortest) {
      shortest = with_penalties;
      best = group;
    }
  }
  return best;
}

void make_lists(RowBlockLists& lists, const std::vector<float>& cost, int planes, int blocks) {
  std::vector<std::vector<uint16_t>> of(blocks);
  listed_makespan(cost, planes, lists.plan.group_heads, blocks,
                  [&](int item, int block) { of[block].push_back(static_cast<uint16_t>(item)); });
  uint16_t* to = lists.items;
  for (int block = 0; block < blocks; ++block) {
    lists.first[block] = static_cast<uint16_t>(to - lists.items);
    to = std::copy(of[block].begin(), of[block].end(), to);
  }
  lists.first[blocks] = static_cast<uint16_t>(to - lists.items);
  lists.listed = true;
}

// Whether the first `count` row blocks of a head take as long as each other.
bool all_equal(const std::vector<float>& cost, int count) {
  return std::all_of(cost.begin(), cost.begin() + count, [&](float x) { return x == cost[0]; });
}

// Where all row blocks take as long: the last of a head, if it is cut short, come after all others, and what is left of the
// others after the last full turn is cut into as many parts as leave one turn enough for them all. (If one turn is not enough
// for the short ones alone, they had better come with their heads: keys and values would have to come from memory once more,
// faster than they can.)
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

// Of `items` row blocks.
void make_plan(RowBlockLists& to, const Key& key, int items, const AttentionShape& s, const MaskParams& masks) {
  RowBlocks& plan = to.plan;
  const std::vector<float> cost = costs(s, masks, key.rows, key.most_parts, plan.per_head);
  const bool short_ones = s.queries % key.rows > 0 && key.most_parts > 1;
  plan.group_heads = key.fitting;
  if (all_equal(cost, short_ones ? plan.per_head - 1 : plan.per_head) && !(short_ones && key.planes > key.blocks)) {
    if (key.most_parts > 1) cut(plan, key.planes, s.queries, key.rows, key.most_parts, key.blocks);
    return;
  }
  const int blocks = std::min(key.blocks, items);
  const bool listed = key.lists && items <= RowBlockLists::kMostItems && blocks <= RowBlockLists::kMostBlocks;
  if (items <= kMostItems) {
    plan.group_heads = best_group(key, listed, [&](int group) {
      return listed ? listed_makespan(cost, key.planes, group, blocks, [](int, int) {})
                    : makespan(cost, key.planes, group, key.blocks);
    });
  }
  if (listed) make_lists(to, cost, key.planes, blocks);
}

const char* plan_lists(RowBlockLists& to, const AttentionShape& s, const MaskParams& masks, int rows, int most_parts,
                       int64_t head_bytes, int blocks, bool lists) {
  const int64_t planes = static_cast<int64_t>(s.batch) * s.heads;
  const int per_head = (s.queries + rows - 1) / rows;
  if (planes * per_head * most_parts > INT32_MAX) {
    return "batch · heads · query length needs more than 2^31 blocks; split the batch.";
  }
  const int items = static_cast<int>(planes * per_head);
  to.plan = {1, per_head, items, 0, 1, items};
  to.listed = false;
  if (items == 0) return nullptr;
  const int sharing = s.heads / s.kv_heads;
  const int64_t fitting = (kGroupBytes / std::max<int64_t>(head_bytes, 1) + 1) * sharing;
  const Key key = {static_cast<int>(planes), s.queries, s.keys, sharing,
                   static_cast<int>(std::min(fitting, planes)), rows, most_parts, blocks, masks.window_left,
                   masks.window_right, lists};
  // The layers of a model ask for the same plan again and again.
  struct Entry {
    Key key;
    RowBlockLists lists;
  };
  static std::mutex mutex;
  static std::vector<Entry> known;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& entry : known) {
    if (entry.key == key) {
      to = entry.lists;
      return nullptr;
    }
  }
  make_plan(to, key, items, s, masks);
  if (known.size() >= 64) known.clear();
  known.push_back({key, to});
  return nullptr;
}

}  // namespace

const char* plan_row_blocks(RowBlocks& plan, const AttentionShape& s, const MaskParams& masks, int rows, int most_parts,
                            int64_t head_bytes, int blocks) {
  RowBlockLists lists = {};
  const char* const error = plan_lists(lists, s, masks, rows, most_parts, head_bytes, blocks, false);
  plan = lists.plan;
  return error;
}

const char* plan_row_blocks(RowBlockLists& lists, const AttentionShape& s, const MaskParams& masks, int rows, int most_parts,
                            int64_t head_bytes, int blocks) {
  return plan_lists(lists, s, masks, rows, most_parts, head_bytes, blocks, true);
}

}  // namespace sage
