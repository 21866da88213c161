// A few queries against many keys on sm_90a: a block a multiprocessor (docs/kernels/sm90_decode.md).
#include "sm90/attention_decode.cuh"

#include "common/launch.h"

namespace sage {

bool has_sm90_decode() { return device_architecture() == 90; }

const char* attend_split_sm90(const AttendParams& p, const DecodePlan& most, Stream stream) {
  DecodePlan plan = most;  // the workspace has room for more
  const int64_t blocks = static_cast<int64_t>(p.shape.batch) * p.shape.kv_heads * plan.row_tiles;
  const int64_t wanted = multiprocessors() / blocks;
  plan.splits = static_cast<int>(wanted < 1 ? 1 : wanted < plan.splits ? wanted : plan.splits);
  return p.shape.padded_dim == 64 ? sm90::launch_decode<sm90::DecodeConfig<64>>(p, plan, stream)
                                  : sm90::launch_decode<sm90::DecodeConfig<128>>(p, plan, stream);
}

}  // namespace sage
