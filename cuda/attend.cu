// The forward operation: mask summaries, then the newest kernel that the device can run.
#include <cstdio>
#include <cstring>

#include "common/decode.h"
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/mask.cuh"

namespace sage {
namespace {

const char* const kPvNames[] = {"e4m3", "f16", "bf16", "int8"};

// The fitting kernel made for the newest architecture below `limit`; of two, that of the later table.
const ForwardKernel* find(const AttendParams& p, int limit) {
  const ForwardKernel* best = nullptr;
  for (const ForwardTable& table :
       {sm80_forward_kernels(), sm80_e4m3_forward_kernels(), sm89_forward_kernels(),
        sm90_mma_forward_kernels(), p.portable ? ForwardTable{nullptr, 0} : sm90_forward_kernels()}) {
    for (int i = 0; i < table.count; ++i) {
      const ForwardKernel& k = table.kernels[i];
      const bool fits = k.pv == p.pv && k.f16_accumulate == p.f16_accumulate &&
                        k.padded_dim == p.shape.padded_dim && k.architecture < limit;
      if (fits && (best == nullptr || k.architecture >= best->architecture)) best = &k;
    }
  }
  return best;
}

// Room for what other operations make of queries, and for results that nobody wants.
struct QueryRoom {
  size_t lse_shift, q_scale, lse, m, l, q8, end;  // where each begins in the workspace

  explicit QueryRoom(const AttendParams& p) {
    const size_t rows = static_cast<size_t>(p.shape.batch) * p.shape.heads * p.shape.queries;
    end = mask_workspace_bytes(p.shape, p.masks) + decode_plan(p.shape, p.masks, p.pv, p.f16_accumulate).bytes;
    for (size_t* row : {&lse_shift, &q_scale, &lse, &m, &l}) *row = take(rows * sizeof(float));
    q8 = take(rows * static_cast<size_t>(p.shape.padded_dim));
  }

  void give(AttendParams& p) const {
    auto* const base = static_cast<unsigned char*>(p.workspace);
    const auto row = [&](size_t at) { return reinterpret_cast<float*>(base + at); };
    p.q8 = reinterpret_cast<const int8_t*>(base + q8);
    p.q_scale = row(q_scale), p.lse_shift = row(lse_shift);
    p.lse = row(lse), p.m = row(m), p.l = row(l);
  }

 private:
  size_t take(size_t bytes) {
    const size_t begin = (end + 255) / 256 * 256;
    end = begin + bytes;
    return begin;
  }
};

// Whether the kernel takes these queries as they are.
bool quantizes(const ForwardKernel& kernel, const AttendParams& p) {
  // A thread of it has sixteen channels. Row blocks are counted in eights of elements, and are not larger than 2^31 bytes.
  const int64_t stride = static_cast<int64_t>(p.shape.heads) * p.shape.head_dim;
  const int64_t elements = stride * p.shape.batch * p.shape.queries;
  return kernel.quantizes_queries && p.q_dtype != Dtype::kF32 && p.shape.head_dim % 16 == 0 && stride <= 1 << 22 &&
         elements / 8 <= UINT32_MAX;
}

// Codes of queries, with a scale for each token, for kernels that take those.
const char* quantize_queries(AttendParams& p, Stream stream) {
  const QuantizeQParams call = {p.shape, p.q_dtype, p.q, nullptr, p.masks.bounds, 1, p.scale,
                                const_cast<int8_t*>(p.q8), const_cast<float*>(p.q_scale), const_cast<float*>(p.lse_shift)};
  p.q = nullptr;
  return quantize_q(call, stream);
}

// Launches the kernel, with codes of queries beforehand if it needs them.
const char* run(const ForwardKernel& kernel, AttendParams& p, Stream stream) {
  const char* error = nullptr;
  if (p.q != nullptr && !quantizes(kernel, p)) error = quantize_queries(p, stream);
  return error != nullptr ? error : kernel.launch(p, stream);
}

}  // namespace

const char* attend(const AttendParams& given, Stream stream) {
  AttendParams params = given;
  const char* const missing = cudaGetErrorString(cudaErrorNoKernelImageForDevice);
  const ForwardKernel* kernel = find(params, INT32_MAX);
  if (kernel == nullptr) {
    static thread_local char message[256];
    snprintf(message, sizeof message,
             "no forward kernel for pv=%s%s and padded head dimension %d: head dimensions pad to "
             "64, 128 or 256, and f16 accumulators go with e4m3 only",
             kPvNames[static_cast<int>(params.pv)], params.f16_accumulate ? " (f16 sums)" : "",
             params.shape.padded_dim);
    return message;
  }
  const DecodePlan plan =
      decode_plan(params.shape, params.masks, params.pv, params.f16_accumulate);
  if (params.q != nullptr) QueryRoom(params).give(params);
  const char* error = nullptr;
  if (plan.splits > 1 && !params.portable) {
    if (params.q != nullptr) error = quantize_queries(params, stream);
    return error != nullptr ? error : attend_split(params, plan, stream);
  }
  kernel = find(params, device_architecture() + 1);
  if (kernel == nullptr) return missing;  // the caller explains which architectures there are
  error = summarize_masks(params.shape, params.masks, params.workspace, stream);
  if (error != nullptr) return error;
  error = run(*kernel, params, stream);
  // A build without this architecture's own kernels may still hold older ones that run here.
  while (error != nullptr && strcmp(error, missing) == 0) {
    kernel = find(params, kernel->architecture);
    if (kernel == nullptr) break;
    error = run(*kernel, params, stream);
  }
  return error;
}

size_t attend_workspace_bytes(const AttendParams& p) {
  if (p.q != nullptr) return QueryRoom(p).end;
  return mask_workspace_bytes(p.shape, p.masks) +
         decode_plan(p.shape, p.masks, p.pv, p.f16_accumulate).bytes;
}

}  // namespace sage
