// The Python module sage_jax._native_cpu: FFI handlers as capsules, and facts about this build.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "dispatch.h"
#include "handlers.h"

namespace nb = nanobind;

NB_MODULE(_native_cpu, module) {
  module.doc() = "XLA FFI handlers of sage_jax for platform \"cpu\" (docs/abi.md).";
  module.def(
      "registrations",
      [] {
        nb::dict handlers;
        auto add = [&](const char* name, XLA_FFI_Handler* handler) {
          handlers[name] = nb::capsule(reinterpret_cast<void*>(handler));
        };
        add("sage_jax_quantize_kv", sage::quantize_kv_handler);
        add("sage_jax_quantize_q", sage::quantize_q_handler);
        add("sage_jax_attend", sage::attend_handler);
        add("sage_jax_attend_backward", sage::attend_backward_handler);
        add("sage_jax_quantize_kv_fp4", sage::quantize_kv_fp4_handler);
        add("sage_jax_quantize_q_fp4", sage::quantize_q_fp4_handler);
        add("sage_jax_attend_fp4", sage::attend_fp4_handler);
        return handlers;
      },
      "Target name -> capsule, for jax.ffi.register_ffi_target(..., platform=\"cpu\").");
  module.attr("api_minor") = XLA_FFI_API_MINOR;
  module.def(
      "isa", [] { return std::string(sage::kernels().isa); },
      "The instruction set of the kernels in use: \"generic\", \"avx2\" or \"avx512\".");
  module.def(
      "select_isa", &sage::select_isa, nb::arg("name"),
      "Uses the kernels of that instruction set from now on (for tests). False if there are none.");
}
