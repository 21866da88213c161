// C names for the backward pass and the settings of the simulator.
#include "common/params.h"
#include "sim.h"
#include "sm80/backward_workspace.h"

extern "C" {

const char* sim_attend_backward(const sage::BackwardParams* p) {
  return sage::attend_backward(*p, nullptr);
}
size_t sim_backward_workspace_bytes(const sage::BackwardParams* p) {
  return sage::backward_workspace_bytes(*p);
}
size_t sim_sizeof_backward_params() { return sizeof(sage::BackwardParams); }
void sim_set_schedule(int schedule) { sim::schedule = schedule; }
void sim_set_architecture(int architecture) { sim::architecture = architecture; }

}  // extern "C"
