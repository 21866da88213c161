// Python module sage_jax._native_cuda: hands out the CUDA handlers. Importing it touches no GPU.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <sstream>
#include <string>
#include <vector>

#include "handlers.h"

namespace nb = nanobind;

namespace {

nb::capsule capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict registrations() {
  nb::dict handlers;
  handlers["sage_jax_quantize_kv"] = capsule(SageQuantizeKvCuda);
  handlers["sage_jax_quantize_q"] = capsule(SageQuantizeQCuda);
  handlers["sage_jax_attend"] = capsule(SageAttendCuda);
  handlers["sage_jax_attend_queries"] = capsule(SageAttendQueriesCuda);
  handlers["sage_jax_attend_backward"] = capsule(SageAttendBackwardCuda);
  handlers["sage_jax_quantize_kv_fp4"] = capsule(SageQuantizeKvFp4Cuda);
  handlers["sage_jax_quantize_q_fp4"] = capsule(SageQuantizeQFp4Cuda);
  handlers["sage_jax_attend_fp4"] = capsule(SageAttendFp4Cuda);
  return handlers;
}

std::vector<std::string> built_architectures() {
  std::vector<std::string> names;
  std::istringstream list(SAGE_JAX_BUILT_ARCHS);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

}  // namespace

NB_MODULE(_native_cuda, module) {
  module.doc() = "CUDA handlers of sage_jax for XLA's FFI (docs/abi.md).";
  module.def("registrations", &registrations, "Handlers by operation name, as capsules.");
  module.def("built_architectures", &built_architectures,
             "Architectures that the kernels were compiled for, such as '80' or '90a'.");
  module.attr("api_minor") = XLA_FFI_API_MINOR;
}
