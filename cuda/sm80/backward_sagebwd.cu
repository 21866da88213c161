// Gradients of the papers' INT8 recipe (SageAttention3, arXiv 2505.11594; 2603.02170).
#include "sm80/backward_launch.cuh"

namespace sage {

const char* sagebwd_gradients_sm80(const BackwardCall& params, Stream stream) {
  return sm80::launch_gradients<sm80::SageBwd>(params, stream);
}

}  // namespace sage
