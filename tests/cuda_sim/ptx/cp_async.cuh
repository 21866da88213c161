// Host version of cuda/ptx/cp_async.cuh: copies happen when their group is waited for, no earlier.
#pragma once

#include "ptx/mbarrier.cuh"
#include "sim.h"

namespace sage::ptx {

template <int kBytes>
void cp_async(uint32_t shared, const void* global, bool valid) {
  if (valid && reinterpret_cast<uintptr_t>(global) % kBytes != 0) {
    sim::fail("cp_async of %d bytes from %p, not a multiple of them", kBytes, global);
  }
  sim::copy_later({sim::shared_at("cp_async", shared, kBytes, kBytes), global, valid, kBytes});
}

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  cp_async<16>(shared, global, valid);
}

inline void cp_async_commit() { sim::commit_copies(); }

template <int kPending>
void cp_async_wait_group() {
  sim::finish_copies(kPending);
}

// Copies land with the arrival.
inline void cp_async_mbarrier_arrive(uint32_t barrier) {
  cp_async_commit();
  cp_async_wait_group<0>();
  mbarrier_arrive(barrier);
}

}  // namespace sage::ptx
