// Host version of cuda/ptx/grid_dependency.cuh: one kernel ends before the next begins.
#pragma once

namespace sage::ptx {

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}
inline void prefetch_global_l2(const void*) {}

}  // namespace sage::ptx
