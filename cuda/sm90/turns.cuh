// Warpgroups that take turns: each waits for the one before it, and the first for the last. All of them take as many
// turns.
#pragma once

#include "ptx/warpgroup.cuh"

namespace sage::sm90 {

template <int kGroups>
struct Turns {
  static constexpr int kBarrier = 8;  // the first of kGroups; two warpgroups meet at each
  static_assert(kBarrier + kGroups <= 16, "a block has 16 barriers");

  // The last opens the first turn of the first.
  static __device__ __forceinline__ void begin(int group) {
    if (group == kGroups - 1) pass(group);
  }
  static __device__ __forceinline__ void wait(int group) { ptx::bar_sync(kBarrier + group, 256); }
  static __device__ __forceinline__ void pass(int group) {
    ptx::bar_arrive(kBarrier + (group + 1 == kGroups ? 0 : group + 1), 256);
  }
};

}  // namespace sage::sm90
