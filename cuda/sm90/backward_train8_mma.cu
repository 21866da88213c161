// train8 gradients on sm_90 by warp-level products, whose mma.sync turns e4m3 into f16: done here, once
// for every operand. What wgmma does not do: dO·Vᵀ in bf16, head dimension 256.
#include "sm80/backward_launch.cuh"

namespace sage {

const char* train8_gradients_sm90_mma(const BackwardCall& params, Stream stream) {
  return sm80::launch_train8<sm80::E4m3Unpacked>(params, stream);
}

}  // namespace sage
