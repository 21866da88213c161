// Host version of cuda/ptx/bulk_tensor.cuh: there is no copy engine, as on sm_80.
#pragma once

#include "sim.h"

namespace sage::ptx {

inline constexpr bool kHasBulkCopies = false;

inline void mbarrier_arrive_expect_tx(uint32_t, uint32_t) { sim::fail("no bulk copies here"); }

inline void cp_async_bulk_tensor_3d(uint32_t, const void*, uint32_t, int, int, int) {
  sim::fail("no bulk copies here");
}

}  // namespace sage::ptx
