// C names for the FP4 entry points, and the emulated FP4 product on given fragments.
#include "common/launch.h"
#include "common/params_fp4.h"
#include "ptx/mma_fp4.cuh"
#include "sim.h"

namespace sage {
namespace {

struct Product {
  const uint32_t *a, *b, *scale_a, *scale_b;  // [32][4], [32][2], [32], [32]
  const float* c;                             // [32][4]
  float* d;                                   // [32][4]
};

template <int kScaleLane>
__global__ void multiply(const Product p) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[4], b[2];
  float c[4], d[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[4 * lane + i], c[i] = p.c[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[2 * lane + i];
  ptx::mma_m16n8k64_e2m1<kScaleLane>(d, a, b, c, p.scale_a[lane], p.scale_b[lane]);
  for (int i = 0; i < 4; ++i) p.d[4 * lane + i] = d[i];
}

}  // namespace
}  // namespace sage

extern "C" {

const char* sim_fp4_product(int scale_lane, const sage::Product* p) {
  constexpr void (*kKernels[])(sage::Product) = {sage::multiply<0>, sage::multiply<1>,
                                                 sage::multiply<2>, sage::multiply<3>};
  return sage::launch(kKernels[scale_lane], dim3(1), dim3(32), 0, nullptr, *p);
}

const char* sim_quantize_kv_fp4(const sage::QuantizeKvFp4Params* p) {
  return sage::quantize_kv_fp4(*p, nullptr);
}
const char* sim_quantize_q_fp4(const sage::QuantizeQFp4Params* p) {
  return sage::quantize_q_fp4(*p, nullptr);
}
const char* sim_attend_fp4(const sage::AttendFp4Params* p) { return sage::attend_fp4(*p, nullptr); }
size_t sim_quantize_kv_fp4_workspace_bytes(const sage::AttentionShape* s) {
  return sage::quantize_kv_fp4_workspace_bytes(*s);
}
size_t sim_quantize_q_fp4_workspace_bytes(const sage::AttentionShape* s) {
  return sage::quantize_q_fp4_workspace_bytes(*s);
}
size_t sim_mask_workspace_bytes(const sage::AttentionShape* s, const sage::MaskParams* m) {
  return sage::mask_workspace_bytes(*s, *m);
}
size_t sim_sizeof_quantize_kv_fp4_params() { return sizeof(sage::QuantizeKvFp4Params); }
size_t sim_sizeof_quantize_q_fp4_params() { return sizeof(sage::QuantizeQFp4Params); }
size_t sim_sizeof_attend_fp4_params() { return sizeof(sage::AttendFp4Params); }

}  // extern "C"
