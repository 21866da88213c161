// Host version of cuda/ptx/shared.cuh.
#pragma once

#include "sim.h"

namespace sage::ptx {

inline unsigned char* dynamic_shared() { return sim::shared_memory(); }

inline uint32_t shared_address(const void* pointer) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  return static_cast<uint32_t>(p - sim::shared_memory());
}

}  // namespace sage::ptx
