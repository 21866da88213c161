// A few queries against many keys on sm_90, whose conversions of e4m3 take one instruction for two codes. A block has
// a multiprocessor to itself, and as many warps as its shared memory has room for: a single warp spends most of its
// time on latencies.
#include "sm80/attention_decode.cuh"
#include "sm90/values.cuh"

namespace sage {
namespace {

template <int kHeadDim>
using Config = sm80::DecodeConfig<sm90::E4m3, kHeadDim, 768 / kHeadDim, 192 * 1024>;

}  // namespace

bool has_sm90_decode() { return device_architecture() == 90; }

const char* attend_split_sm90(const AttendParams& p, const DecodePlan& most, Stream stream) {
  // A block a multiprocessor; the workspace has room for more.
  DecodePlan plan = most;
  const int64_t blocks = static_cast<int64_t>(p.shape.batch) * p.shape.kv_heads * plan.row_tiles;
  const int64_t wanted = multiprocessors() / blocks;
  plan.splits = static_cast<int>(wanted < 1 ? 1 : wanted < plan.splits ? wanted : plan.splits);
  return p.shape.padded_dim == 64 ? sm80::launch_split<Config<64>>(p, plan, stream)
                                  : sm80::launch_split<Config<128>>(p, plan, stream);
}

}  // namespace sage
