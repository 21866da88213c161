// Host version of cuda/ptx/cp_async.cuh: copies happen when their group is waited for, no earlier.
#pragma once

#include "sim.h"

namespace sage::ptx {

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    sim::fail("cp_async_16 from %p, not a multiple of 16", global);
  }
  sim::copy_later({sim::shared_at("cp_async_16", shared, 16, 16), global, valid});
}

inline void cp_async_commit() { sim::commit_copies(); }

template <int kPending>
void cp_async_wait_group() {
  sim::finish_copies(kPending);
}

}  // namespace sage::ptx
