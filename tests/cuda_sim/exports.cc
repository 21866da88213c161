// C names for the entry points of the kernel library and the settings of the simulator.
#include <algorithm>

#include "common/params.h"
#include "common/row_blocks.cuh"
#include "sim.h"
#include "sm90/forward_interpolation.cuh"

extern "C" {

const char* sim_quantize_kv(const sage::QuantizeKvParams* p) {
  return sage::quantize_kv(*p, nullptr);
}
size_t sim_quantize_kv_workspace_bytes(const sage::AttentionShape* s) {
  return sage::quantize_kv_workspace_bytes(*s);
}
const char* sim_quantize_q(const sage::QuantizeQParams* p) { return sage::quantize_q(*p, nullptr); }
const char* sim_attend(const sage::AttendParams* p) { return sage::attend(*p, nullptr); }
size_t sim_attend_workspace_bytes(const sage::AttendParams* p) {
  return sage::attend_workspace_bytes(*p);
}

void sim_set_schedule(int schedule) { sim::schedule = schedule; }
void sim_set_architecture(int architecture) { sim::architecture = architecture; }
int sim_launches() { return sim::launches; }

size_t sim_sizeof_attend_params() { return sizeof(sage::AttendParams); }
size_t sim_sizeof_quantize_kv_params() { return sizeof(sage::QuantizeKvParams); }
size_t sim_sizeof_quantize_q_params() { return sizeof(sage::QuantizeQParams); }

// 2^(score · multiplier + shift) of `count` pairs of scores, as pairs of f16.
void sim_interpolate(const int* scores, float multiplier, float shift, int count, uint32_t* pairs) {
  const sage::sm90::Interpolation interpolate(multiplier, shift);
  for (int i = 0; i < count; ++i) pairs[i] = interpolate(scores[2 * i], scores[2 * i + 1]);
}

// Writes batch row, head and first query of the items in the order in which blocks take them: turn by turn, -1
// where a block has nothing to do, and how many queries; one turn more than there are. Returns the error, or null.
const char* sim_row_blocks(const sage::AttentionShape* shape, int window_right, int rows, int most_parts, int64_t head_bytes,
                           int blocks, int lists, int most_turns, int* group_heads, int* turns, int* taken) {
  sage::RowBlockLists work = {};
  sage::MaskParams masks = {};
  masks.window_left = 1 << 30;
  masks.window_right = window_right;
  const char* error = lists ? sage::plan_row_blocks(work, *shape, masks, rows, most_parts, head_bytes, blocks)
                            : sage::plan_row_blocks(work.plan, *shape, masks, rows, most_parts, head_bytes, blocks);
  if (error != nullptr) return error;
  *group_heads = work.plan.group_heads;
  const int grid = std::min(blocks, work.plan.items);  // as it is launched
  *turns = 0;
  for (bool any = true; any; *turns += any) {
    if (*turns == most_turns) return "too many turns";
    any = false;
    for (int block = 0; block < blocks; ++block, taken += 4) {
      const int item = block < grid ? work.item(*turns, block, grid) : -1;
      const sage::RowBlock at = item >= 0 ? work.plan.at(*shape, item, rows) : sage::RowBlock{-1, -1, -1, 0};
      any = any || item >= 0;
      taken[0] = at.b, taken[1] = at.n, taken[2] = at.row, taken[3] = at.rows;
    }
  }
  return nullptr;
}

}  // extern "C"
