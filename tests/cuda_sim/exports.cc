// C names for the entry points of the kernel library and the settings of the simulator.
#include "common/params.h"
#include "sim.h"

extern "C" {

const char* sim_quantize_kv(const sage::QuantizeKvParams* p) {
  return sage::quantize_kv(*p, nullptr);
}
size_t sim_quantize_kv_workspace_bytes(const sage::AttentionShape* s) {
  return sage::quantize_kv_workspace_bytes(*s);
}
const char* sim_quantize_q(const sage::QuantizeQParams* p) { return sage::quantize_q(*p, nullptr); }
const char* sim_attend(const sage::AttendParams* p) { return sage::attend(*p, nullptr); }
size_t sim_attend_workspace_bytes(const sage::AttendParams* p) {
  return sage::attend_workspace_bytes(*p);
}

void sim_set_schedule(int schedule) { sim::schedule = schedule; }
void sim_set_architecture(int architecture) { sim::architecture = architecture; }
int sim_launches() { return sim::launches; }

size_t sim_sizeof_attend_params() { return sizeof(sage::AttendParams); }
size_t sim_sizeof_quantize_kv_params() { return sizeof(sage::QuantizeKvParams); }
size_t sim_sizeof_quantize_q_params() { return sizeof(sage::QuantizeQParams); }

}  // extern "C"
