// Stands for sm90/backward_train8.cu in builds without sm_90a.
#include "sm80/backward.h"

namespace sage {

void choose_way_sm90(BackwardCall&) {}

const char* train8_gradients_sm90(const BackwardCall& params, Stream stream) {
  return train8_gradients_sm90_mma(params, stream);
}

}  // namespace sage
