// train8 gradients by e4m3 matrix products (sm_89, sm_120).
#include "sm80/backward_launch.cuh"

namespace sage {

const char* train8_gradients_sm89(const BackwardCall& params, Stream stream) {
  return sm80::launch_train8<sm80::E4m3Native>(params, stream);
}

}  // namespace sage
