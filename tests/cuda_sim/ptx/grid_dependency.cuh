// Host version of cuda/ptx/grid_dependency.cuh: one kernel ends before the next begins.
#pragma once

namespace sage::ptx {

inline void after_previous_grid() {}

}  // namespace sage::ptx
