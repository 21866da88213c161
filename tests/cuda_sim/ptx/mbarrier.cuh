// Host version of cuda/ptx/mbarrier.cuh. A barrier's eight bytes hold arrivals per phase, those still
// missing, and the number of complete phases.
#pragma once

#include "sim.h"

namespace sage::ptx {

struct SimBarrier {
  uint16_t arrivals, missing;
  uint32_t phases;
};

inline SimBarrier& sim_barrier(const char* name, uint32_t barrier) {
  return *reinterpret_cast<SimBarrier*>(sim::shared_at(name, barrier, 8, 8));
}

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  const auto n = static_cast<uint16_t>(arrivals);
  sim_barrier("mbarrier_init", barrier) = {n, n, 0};
}

inline void fence_mbarrier_init() {}

inline void mbarrier_arrive(uint32_t barrier) {
  SimBarrier& b = sim_barrier("mbarrier_arrive", barrier);
  if (b.missing == 0) sim::fail("mbarrier_arrive at a barrier that was not initialised");
  if (--b.missing > 0) return;
  b.missing = b.arrivals;
  ++b.phases;
}

inline bool mbarrier_test_wait(uint32_t barrier, uint32_t phase) {
  return (sim_barrier("mbarrier_wait", barrier).phases & 1) != (phase & 1);
}

inline void mbarrier_wait(uint32_t barrier, uint32_t phase) {
  sim::wait_until("mbarrier_wait", [=] { return mbarrier_test_wait(barrier, phase); });
}

}  // namespace sage::ptx
