// train8 gradients where the matrix unit knows no e4m3 and no instruction unpacks it.
#include "sm80/backward_launch.cuh"

namespace sage {

const char* train8_gradients_sm80(const BackwardCall& params, Stream stream) {
  return sm80::launch_train8<sm80::E4m3ByBits>(params, stream);
}

}  // namespace sage
