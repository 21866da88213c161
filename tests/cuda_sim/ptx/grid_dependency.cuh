// Host version of cuda/ptx/grid_dependency.cuh: one kernel ends before the next begins.
#pragma once

namespace sage::ptx {

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}

}  // namespace sage::ptx
