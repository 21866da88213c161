// Picks the kernels of the newest instruction set that this CPU has.
#include "dispatch.h"

#include <atomic>

namespace sage {

#define SAGE_DECLARE_KERNELS(isa)                                                        \
  namespace isa {                                                                        \
  void quantize_kv(const QuantizeKv&, Pool&);                                            \
  void quantize_q(const QuantizeQ&, Pool&);                                              \
  void attend(const Attend&, Pool&);                                                     \
  void attend_backward(const AttendBackward&, Pool&);                                    \
  void quantize_kv_fp4(const QuantizeKvFp4&, Pool&);                                     \
  void quantize_q_fp4(const QuantizeQFp4&, Pool&);                                       \
  void attend_fp4(const AttendFp4&, Pool&);                                              \
  constexpr Kernels kKernels = {#isa,            quantize_kv,    quantize_q, attend,     \
                                attend_backward, quantize_kv_fp4, quantize_q_fp4,        \
                                attend_fp4};                                             \
  }

SAGE_DECLARE_KERNELS(generic)
#ifdef SAGE_HAS_avx2
SAGE_DECLARE_KERNELS(avx2)
#endif
#ifdef SAGE_HAS_avx512
SAGE_DECLARE_KERNELS(avx512)
#endif
#ifdef SAGE_HAS_avx512bf16
SAGE_DECLARE_KERNELS(avx512bf16)
#endif

namespace {

// The kernels that this CPU can run, the fastest first; the last entry is null.
const Kernels* const* runnable() {
  static const Kernels* list[5] = {};
  static bool filled = [] {
    int count = 0;
#ifdef SAGE_HAS_avx512
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
#ifdef SAGE_HAS_avx512bf16
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (bf16) list[count++] = &avx512bf16::kKernels;
#endif
    if (avx512) list[count++] = &avx512::kKernels;
#endif
#ifdef SAGE_HAS_avx2
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) list[count++] = &avx2::kKernels;
#endif
    list[count] = &generic::kKernels;
    return true;
  }();
  (void)filled;
  return list;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* kernels = chosen.load(std::memory_order_relaxed);
  return kernels ? *kernels : *runnable()[0];
}

bool select_isa(const std::string& name) {
  for (const Kernels* const* entry = runnable(); *entry; ++entry) {
    if (name == (*entry)->isa) {
      chosen.store(*entry, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace sage
