// Stands for sm89/backward_train8.cu in builds without an architecture that multiplies e4m3.
#include "sm80/backward.h"

namespace sage {

const char* train8_gradients_sm89(const BackwardCall& params, Stream stream) {
  return train8_gradients_sm80(params, stream);
}

}  // namespace sage
