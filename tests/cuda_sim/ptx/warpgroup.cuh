// Host version of the part of cuda/ptx/warpgroup.cuh that kernels without warpgroup-level products use.
#pragma once

namespace sage::ptx {

template <int kRegisters>
void setmaxnreg_inc() {}

template <int kRegisters>
void setmaxnreg_dec() {}

}  // namespace sage::ptx
