// Stands for sm90/backward_train8_mma.cu in builds without sm_90.
#include "sm80/backward.h"

namespace sage {

const char* train8_gradients_sm90_mma(const BackwardCall& params, Stream stream) {
  return train8_gradients_sm80(params, stream);
}

}  // namespace sage
