// train8 gradients on sm_90, whose mma.sync turns e4m3 into f16: done here, once for every operand.
#include "sm80/backward_launch.cuh"

namespace sage {

const char* train8_gradients_sm90(const BackwardCall& params, Stream stream) {
  return sm80::launch_train8<sm80::E4m3Unpacked>(params, stream);
}

}  // namespace sage
