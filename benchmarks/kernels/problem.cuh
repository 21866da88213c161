// A problem with its tensors on the device, and how two results compare. Needs the kernel library alone.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/params.h"

namespace sage::bench {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "bench_kernels: %s: %s\n", what, cudaGetErrorString(status));
  exit(1);
}

inline void check(const char* error) {
  if (error == nullptr) return;
  fprintf(stderr, "bench_kernels: %s\n", error);
  exit(1);
}

// Device memory, filled with NaN patterns until it is written.
template <class T>
struct Buffer {
  T* data = nullptr;
  size_t count = 0;

  explicit Buffer(size_t n = 0) : count(n) {
    if (n == 0) return;
    check(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data, 0xff, n * sizeof(T)), "cudaMemset");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(Buffer&& other) {
    std::swap(data, other.data);
    std::swap(count, other.count);
    return *this;
  }
  ~Buffer() { cudaFree(data); }

  void upload(const std::vector<T>& from) {
    check(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  std::vector<T> download() const {
    std::vector<T> to(count);
    check(cudaMemcpy(to.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return to;
  }
};

// Normal values by Box and Muller from a counter: fresh data at memory speed.
static __global__ void fill_normal(uint16_t* out, size_t count, unsigned seed, float sigma) {
  const size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const auto hash = [](unsigned x) {
    x ^= x >> 16, x *= 0x7feb352dU, x ^= x >> 15, x *= 0x846ca68bU;
    return x ^ x >> 16;
  };
  const unsigned a = hash(static_cast<unsigned>(i) * 2u + hash(seed)), b = hash(a + 0x9e3779b9u);
  const float u = (a + 1.0f) * 0x1p-32f, v = b * 0x1p-32f;
  const float x = sigma * sqrtf(-2.0f * logf(fminf(u, 1.0f))) * cospif(2.0f * v);
  out[i] = static_cast<uint16_t>((__float_as_uint(x) + 0x8000u) >> 16);  // bf16
}

// Σ(a − b)², Σb², and entries of which one alone is finite, or signs of infinities differ.
static __global__ void compare_floats(const float* a, const float* b, size_t count, double* sums) {
  double difference = 0, reference = 0, odd = 0;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    const float x = a[i], y = b[i];
    if (isfinite(x) && isfinite(y)) {
      difference += (static_cast<double>(x) - y) * (static_cast<double>(x) - y);
      reference += static_cast<double>(y) * y;
    } else if (isnan(x) != isnan(y) || (!isnan(x) && x != y)) {
      odd += 1;
    }
  }
  atomicAdd(sums, difference);
  atomicAdd(sums + 1, reference);
  atomicAdd(sums + 2, odd);
}

struct Difference {
  double relative;
  double odd;
};

// The difference counts relative to b, but to no less than `floor` an entry.
inline Difference compare(const Buffer<float>& a, const Buffer<float>& b, double floor = 0) {
  Buffer<double> sums(3);
  check(cudaMemset(sums.data, 0, 24), "cudaMemset");
  compare_floats<<<256, 256>>>(a.data, b.data, a.count, sums.data);
  const auto s = sums.download();
  const double least = std::max(floor * floor * static_cast<double>(a.count), 1e-300);
  return {std::sqrt(s[0] / std::max(s[1], least)), s[2]};
}

// A problem with all its tensors; quantized operands are made once.
struct Problem {
  AttentionShape shape;
  PvFormat pv = PvFormat::kE4m3;
  float scale;
  MaskParams masks = {};
  Buffer<uint16_t> q, k, v;
  Buffer<int32_t> bounds, q_seg{0}, kv_seg{0};
  Buffer<uint8_t> mask{0};
  Buffer<int8_t> q8, k8;
  Buffer<float> q_scale, lse_shift, k_scale, k_mean, v_scale, v_mean;
  Buffer<uint8_t> v_pv, quantize_workspace, workspace{0};
  Buffer<int8_t> v_dp;
  Buffer<float> v_dp_scale, k_max, v_norm;

  static size_t pv_bytes(const AttentionShape& s, PvFormat pv) {
    const size_t planes = static_cast<size_t>(s.batch) * s.kv_heads * s.padded_dim;
    return pv == PvFormat::kE4m3 ? planes * ((s.keys + 63) / 64 * 64) : 2 * planes * s.keys;
  }

  Problem(const AttentionShape& s, PvFormat format, unsigned seed, float sigma)
      : shape(s),
        pv(format),
        scale(1.0f / std::sqrt(static_cast<float>(s.head_dim))),
        q(static_cast<size_t>(s.batch) * s.queries * s.heads * s.head_dim),
        k(static_cast<size_t>(s.batch) * s.keys * s.kv_heads * s.head_dim),
        v(k.count),
        bounds(3 * s.batch),
        q8(static_cast<size_t>(s.batch) * s.heads * s.queries * s.padded_dim),
        k8(static_cast<size_t>(s.batch) * s.kv_heads * s.keys * s.padded_dim),
        q_scale(static_cast<size_t>(s.batch) * s.heads * s.queries),
        lse_shift(q_scale.count),
        k_scale(static_cast<size_t>(s.batch) * s.kv_heads * ((s.keys + 63) / 64)),
        k_mean(static_cast<size_t>(s.batch) * s.kv_heads * s.padded_dim),
        v_scale(k_mean.count),
        v_mean(k_mean.count),
        v_pv(pv_bytes(s, format)),
        quantize_workspace(quantize_kv_workspace_bytes(s)),
        v_dp(k8.count),
        v_dp_scale(k_scale.count),
        k_max(k_mean.count),
        v_norm(static_cast<size_t>(s.batch) * s.kv_heads) {
    float sigmas[3] = {sigma, sigma, 1.0f};
    Buffer<uint16_t>* const tensors[3] = {&q, &k, &v};
    for (int i = 0; i < 3; ++i) {
      const size_t n = tensors[i]->count;
      fill_normal<<<static_cast<unsigned>((n + 255) / 256), 256>>>(tensors[i]->data, n, seed + i,
                                                                   sigmas[i]);
    }
    std::vector<int32_t> b;
    for (int i = 0; i < s.batch; ++i) b.insert(b.end(), {s.queries, s.keys, 0});
    bounds.upload(b);
    masks.bounds = bounds.data;
    masks.window_left = masks.window_right = 1 << 30;
    masks.mask_tile = 1;
    workspace = Buffer<uint8_t>(workspace_bytes());
  }

  // Masks of `sizes` entries, whose axes of size 1 broadcast, each for `tile` queries and keys.
  void set_mask(const std::vector<uint8_t>& entries, const int (&sizes)[4], int tile) {
    int64_t stride = 1;
    for (int n = 3; n >= 0; --n) {
      masks.mask_sizes[n] = sizes[n];
      masks.mask_strides[n] = sizes[n] == 1 ? 0 : stride;
      stride *= sizes[n];
    }
    mask = Buffer<uint8_t>(entries.size());
    mask.upload(entries);
    masks.mask = mask.data;
    masks.mask_tile = tile;
    workspace = Buffer<uint8_t>(workspace_bytes());
  }

  // A block mask: of the blocks of so many queries and keys a share of `density` at random, and those on the diagonal.
  void set_density(double density, int block_q, int block_k) {
    const int sizes[4] = {shape.batch, shape.heads, (shape.queries + 63) / 64, (shape.keys + 63) / 64};
    const int rows = (shape.queries + block_q - 1) / block_q, columns = (shape.keys + block_k - 1) / block_k;
    std::mt19937 generator(11);
    std::bernoulli_distribution chosen(density);
    std::vector<uint8_t> entries;
    for (int plane = 0; plane < shape.batch * shape.heads; ++plane) {
      std::vector<uint8_t> blocks(static_cast<size_t>(rows) * columns);
      for (auto& x : blocks) x = chosen(generator);
      for (int i = 0; i < rows; ++i) blocks[static_cast<size_t>(i) * columns + std::min(i * block_q / block_k, columns - 1)] = 1;
      for (int i = 0; i < sizes[2]; ++i) {
        for (int j = 0; j < sizes[3]; ++j) {
          entries.push_back(blocks[static_cast<size_t>(i * 64 / block_q) * columns + j * 64 / block_k]);
        }
      }
    }
    set_mask(entries, sizes, 64);
  }

  size_t workspace_bytes() const {
    AttendParams p = {};
    p.shape = shape, p.masks = masks, p.pv = pv, p.q = q.data;
    return attend_workspace_bytes(p);
  }

  void quantize_keys(bool with_gradients = false) {
    QuantizeKvParams p = {};
    p.shape = shape;
    p.k_dtype = p.v_dtype = Dtype::kBf16;
    p.k = k.data, p.v = v.data, p.bounds = bounds.data;
    p.pv = pv, p.dp = with_gradients ? DpFormat::kInt8 : DpFormat::kNone, p.v_range = 3.5f;
    p.smooth_k = true, p.smooth_v = pv == PvFormat::kE4m3;
    p.k8 = k8.data, p.k_scale = k_scale.data, p.k_mean = k_mean.data;
    p.v_pv = v_pv.data, p.v_scale = v_scale.data, p.v_mean = v_mean.data;
    p.workspace = quantize_workspace.data;
    p.v_dp = v_dp.data, p.v_dp_scale = v_dp_scale.data, p.k_max = k_max.data, p.v_norm = v_norm.data;
    check(quantize_kv(p, nullptr));
  }

  void quantize_queries() {
    QuantizeQParams p = {};
    p.shape = shape;
    p.q_dtype = Dtype::kBf16;
    p.q = q.data, p.k_mean = k_mean.data, p.bounds = bounds.data;
    p.q_block = 1, p.scale = scale;
    p.q8 = q8.data, p.q_scale = q_scale.data, p.lse_shift = lse_shift.data;
    check(quantize_q(p, nullptr));
  }

  // One unit of the scores' INT8 products, where it is largest: what it changes a logit by.
  double largest_unit() const {
    const auto largest = [](const Buffer<float>& scales) {
      float most = 0.0f;
      for (const float x : scales.download()) most = std::isfinite(x) ? std::max(most, std::fabs(x)) : most;
      return most;
    };
    return static_cast<double>(scale) * largest(q_scale) * largest(k_scale);
  }

  struct Result {
    Buffer<float> out, lse, m, l;
    explicit Result(const AttentionShape& s)
        : out(static_cast<size_t>(s.batch) * s.queries * s.heads * s.head_dim),
          lse(static_cast<size_t>(s.batch) * s.heads * s.queries),
          m(lse.count),
          l(lse.count) {}
  };

  // With queries as they are, of which attention makes codes, if `raw`.
  AttendParams params(Result& r, Dtype dtype, bool portable, bool raw = false) const {
    AttendParams p = {};
    p.shape = shape, p.masks = masks, p.pv = pv, p.scale = scale, p.portable = portable;
    p.q8 = q8.data, p.q_scale = q_scale.data, p.lse_shift = lse_shift.data;
    p.q = raw ? q.data : nullptr, p.q_dtype = Dtype::kBf16;
    p.k8 = k8.data, p.k_scale = k_scale.data;
    p.v_pv = v_pv.data, p.v_scale = v_scale.data, p.v_mean = v_mean.data;
    p.out_dtype = dtype;
    p.out = r.out.data, p.lse = r.lse.data, p.m = r.m.data, p.l = r.l.data;
    p.workspace = workspace.data;
    return p;
  }
};

// The gradients of a problem whose forward pass is in `forward`, with outputs in bf16.
struct Gradients {
  Buffer<uint16_t> out, dout;
  Buffer<float> dlse, dq, dk, dv;
  Buffer<uint8_t> workspace{0};

  Gradients(const Problem& problem, unsigned seed)
      : out(problem.q.count),
        dout(problem.q.count),
        dlse(problem.q_scale.count),
        dq(problem.q.count),
        dk(problem.k.count),
        dv(problem.k.count) {
    fill_normal<<<static_cast<unsigned>((dout.count + 255) / 256), 256>>>(dout.data, dout.count,
                                                                          seed, 1.0f);
    check(cudaMemset(dlse.data, 0, dlse.count * sizeof(float)), "cudaMemset");
  }

  BackwardParams params(const Problem& x, const Problem::Result& forward, bool portable, bool exact,
                        Dtype dtype, bool deterministic) {
    BackwardParams p = {};
    p.shape = x.shape, p.masks = x.masks, p.backward = Backward::kTrain8, p.dp = DpFormat::kInt8;
    p.exact_delta = exact, p.scale = x.scale, p.portable = portable, p.deterministic = deterministic;
    p.q8 = x.q8.data, p.q_scale = x.q_scale.data, p.k8 = x.k8.data, p.k_scale = x.k_scale.data;
    p.k_mean = x.k_mean.data, p.v_dp = x.v_dp.data, p.v_dp_scale = x.v_dp_scale.data;
    p.k_max = x.k_max.data, p.v_norm = x.v_norm.data, p.v_mean = x.v_mean.data;
    p.m = forward.m.data, p.l = forward.l.data, p.out_dtype = Dtype::kBf16, p.out = out.data;
    p.dout = dout.data, p.dlse = dlse.data, p.dq_dtype = p.dk_dtype = p.dv_dtype = dtype;
    p.dq = dq.data, p.dk = dk.data, p.dv = dv.data;
    if (workspace.count == 0) workspace = Buffer<uint8_t>(backward_workspace_bytes(p));
    p.workspace = workspace.data;
    return p;
  }
};

// Median milliseconds of `work` on the default stream.
template <class Work>
inline double milliseconds(Work work, int repeats = 7) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  work();
  work();
  const auto sample = [&](int calls) {
    cudaEventRecord(begin);
    for (int i = 0; i < calls; ++i) work();
    cudaEventRecord(end);
    check(cudaEventSynchronize(end), "timed work");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    return static_cast<double>(ms) / calls;
  };
  const int calls = std::max(1, static_cast<int>(10.0 / std::max(sample(1), 1e-3)));
  std::vector<double> samples;
  for (int i = 0; i < repeats; ++i) samples.push_back(sample(calls));
  std::sort(samples.begin(), samples.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return samples[samples.size() / 2];
}

inline std::vector<int> numbers(const char* text) {
  std::vector<int> list;
  for (std::string rest = text; !rest.empty();) {
    const size_t comma = rest.find(',');
    list.push_back(std::atoi(rest.substr(0, comma).c_str()));
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
  }
  return list;
}

struct Options {
  std::vector<int> seq = {16384, 4096, 1024}, dim = {128, 64};
  PvFormat pv = PvFormat::kE4m3;
  int tokens = 16384, channels = 2048, problems = 200, first = 0, heads = 32, kv_heads = 8;
  bool portable = false, backward = false, deterministic = false, exact_delta = false;
  double density = 0;  // of a block mask; 0: none
  int block_q = 128, block_k = 128;
  unsigned seed = 1;
};

}  // namespace sage::bench
