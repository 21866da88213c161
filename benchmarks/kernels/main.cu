// The kernel library without JAX: times single operations and compares kernels with each other, in
// seconds. Built by `cmake --build ... --target sage_kernels`.
//
//   sage_kernels time [--seq N,..] [--dim N,..] [--pv e4m3|f16|bf16] [--tokens N] [--channels N]
//                     [--portable 1]
//   sage_kernels soak [--problems N] [--seed N] [--first N]
//
// `time` prints milliseconds of each operation and the rate of the attention kernel. `soak` runs
// random problems, masks and ragged shapes included, through the kernel that the device would get and
// through the portable one, and fails where results differ by more than rounding.
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

#ifdef SAGE_TRACE
extern "C" void sage_print_trace();
#endif
using namespace sage;

namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "sage_kernels: %s: %s\n", what, cudaGetErrorString(status));
  exit(1);
}

void check(const char* error) {
  if (error == nullptr) return;
  fprintf(stderr, "sage_kernels: %s\n", error);
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
__global__ void fill_normal(uint16_t* out, size_t count, unsigned seed, float sigma) {
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
__global__ void compare_floats(const float* a, const float* b, size_t count, double* sums) {
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

Difference compare(const Buffer<float>& a, const Buffer<float>& b) {
  Buffer<double> sums(3);
  check(cudaMemset(sums.data, 0, 24), "cudaMemset");
  compare_floats<<<256, 256>>>(a.data, b.data, a.count, sums.data);
  const auto s = sums.download();
  return {std::sqrt(s[0] / std::max(s[1], 1e-300)), s[2]};
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
  Buffer<float> q_scale, lse_shift, k_scale, k_mean, v_scale;
  Buffer<uint8_t> v_pv, quantize_workspace, workspace{0};

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
        v_pv(pv_bytes(s, format)),
        quantize_workspace(quantize_kv_workspace_bytes(s)) {
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
  }

  void quantize_keys() {
    QuantizeKvParams p = {};
    p.shape = shape;
    p.k_dtype = p.v_dtype = Dtype::kBf16;
    p.k = k.data, p.v = v.data, p.bounds = bounds.data;
    p.pv = pv, p.dp = DpFormat::kNone, p.v_range = 448.0f, p.smooth_k = true;
    p.k8 = k8.data, p.k_scale = k_scale.data, p.k_mean = k_mean.data;
    p.v_pv = v_pv.data, p.v_scale = v_scale.data, p.workspace = quantize_workspace.data;
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

  struct Result {
    Buffer<float> out, lse, m, l;
    explicit Result(const AttentionShape& s)
        : out(static_cast<size_t>(s.batch) * s.queries * s.heads * s.head_dim),
          lse(static_cast<size_t>(s.batch) * s.heads * s.queries),
          m(lse.count),
          l(lse.count) {}
  };

  AttendParams params(Result& r, Dtype dtype, bool portable) const {
    AttendParams p = {};
    p.shape = shape, p.masks = masks, p.pv = pv, p.scale = scale, p.portable = portable;
    p.q8 = q8.data, p.q_scale = q_scale.data, p.lse_shift = lse_shift.data;
    p.k8 = k8.data, p.k_scale = k_scale.data, p.v_pv = v_pv.data, p.v_scale = v_scale.data;
    p.out_dtype = dtype;
    p.out = r.out.data, p.lse = r.lse.data, p.m = r.m.data, p.l = r.l.data;
    p.workspace = workspace.data;
    return p;
  }
};

// Median milliseconds of `work` on the default stream.
template <class Work>
double milliseconds(Work work, int repeats = 7) {
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

std::vector<int> numbers(const char* text) {
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
  int tokens = 16384, channels = 2048, problems = 200, first = 0;
  bool portable = false;
  unsigned seed = 1;
};

int time_kernels(const Options& o) {
  printf("%4s %6s %6s %9s %9s %9s %8s\n", "dim", "seq", "causal", "kv ms", "q ms", "attend ms",
         "TOPS");
  for (int dim : o.dim) {
    for (int seq : o.seq) {
      const int heads = o.channels / dim, batch = std::max(1, o.tokens / seq);
      Problem p({batch, seq, seq, heads, heads, dim, dim}, o.pv, 7, 1.0f);
      p.quantize_keys();
      const double kv = milliseconds([&] { p.quantize_keys(); });
      const double q = milliseconds([&] { p.quantize_queries(); });
      Problem::Result result(p.shape);
      for (int causal = 0; causal < 2; ++causal) {
        p.masks.window_right = causal ? 0 : 1 << 30;
        const AttendParams call = p.params(result, Dtype::kBf16, o.portable);
        const double ms = milliseconds([&] { check(attend(call, nullptr)); });
        const double operations = 4.0 * batch * heads * seq * seq * dim * (causal ? 0.5 : 1.0);
        printf("%4d %6d %6s %9.4f %9.4f %9.4f %8.1f\n", dim, seq, causal ? "yes" : "no", kv, q, ms,
               operations / ms / 1e9);
        fflush(stdout);
      }
    }
  }
  return 0;
}

// A random problem; every kind of mask comes up.
struct Random {
  std::mt19937 engine;
  explicit Random(unsigned seed) : engine(seed) {}
  int below(int n) { return static_cast<int>(engine() % static_cast<unsigned>(n)); }
  bool coin(int odds = 2) { return below(odds) == 0; }
};

int soak(const Options& o) {
  int failures = 0;
  double worst = 0;
  for (int number = o.first; number < o.first + o.problems; ++number) {
    Random random(o.seed * 1000003u + static_cast<unsigned>(number));
    AttentionShape s;
    s.batch = 1 + random.below(3);
    s.kv_heads = 1 + random.below(3);
    s.heads = s.kv_heads * (1 + random.below(3));
    const int longest = random.coin(4) ? 3000 : 600;
    s.queries = 1 + random.below(longest);
    s.keys = 1 + random.below(longest);
    s.head_dim = random.coin() ? 64 << random.below(2) : 1 + random.below(128);
    s.padded_dim = s.head_dim <= 64 ? 64 : 128;
    const PvFormat formats[] = {PvFormat::kE4m3, PvFormat::kE4m3, PvFormat::kF16, PvFormat::kBf16};
    const float sigmas[] = {1.0f, 1.0f, 3.0f, 10.0f};
    const PvFormat pv = formats[random.below(4)];
    Problem p(s, pv, o.seed + 31u * static_cast<unsigned>(number), sigmas[random.below(4)]);
    const bool lengths = random.coin(), segments = random.coin(3), dense = random.coin(3);
    std::vector<int32_t> bounds;
    const bool bottom_right = random.coin();
    for (int b = 0; b < s.batch; ++b) {
      const int queries = lengths ? random.below(s.queries + 1) : s.queries;
      const int keys = lengths ? random.below(s.keys + 1) : s.keys;
      bounds.insert(bounds.end(), {queries, keys, bottom_right ? keys - queries : 0});
    }
    p.bounds.upload(bounds);
    if (random.coin()) p.masks.window_right = random.coin() ? 0 : random.below(300);
    if (random.coin(3)) p.masks.window_left = random.below(300);
    if (segments) {
      const auto ids = [&](int tokens) {
        std::vector<int32_t> x;
        for (int b = 0; b < s.batch; ++b) {
          int id = random.below(2);
          for (int i = 0; i < tokens; ++i) x.push_back(id += random.below(120) == 0);
        }
        return x;
      };
      const auto q_ids = ids(s.queries), kv_ids = ids(s.keys);
      p.q_seg = Buffer<int32_t>(q_ids.size());
      p.kv_seg = Buffer<int32_t>(kv_ids.size());
      p.q_seg.upload(q_ids);
      p.kv_seg.upload(kv_ids);
      p.masks.q_seg = p.q_seg.data;
      p.masks.kv_seg = p.kv_seg.data;
    }
    if (dense) {
      const int full[4] = {s.batch, s.heads, s.queries, s.keys};
      int64_t stride = 1;
      for (int n = 3; n >= 0; --n) {
        const int size = n < 2 && random.coin() ? 1 : full[n];
        p.masks.mask_sizes[n] = size;
        p.masks.mask_strides[n] = size == 1 ? 0 : stride;
        stride *= size;
      }
      std::vector<uint8_t> entries(static_cast<size_t>(stride));
      const int odds = 1 + random.below(8);
      for (auto& x : entries) x = random.below(odds) == 0 || odds == 8;
      p.mask = Buffer<uint8_t>(entries.size());
      p.mask.upload(entries);
      p.masks.mask = p.mask.data;
    }
    p.workspace = Buffer<uint8_t>(mask_workspace_bytes(s, p.masks));
    const bool poison = random.coin(5);
    if (poison) {
      const uint16_t nan = 0x7fc0;
      for (auto* x : {&p.q, &p.k, &p.v}) {
        cudaMemcpy(x->data + random.below(static_cast<int>(x->count)), &nan, 2,
                   cudaMemcpyHostToDevice);
      }
    }
    p.quantize_keys();
    p.quantize_queries();
    Problem::Result ours(s), portable(s), again(s);
    check(attend(p.params(ours, Dtype::kF32, false), nullptr));
    check(attend(p.params(again, Dtype::kF32, false), nullptr));
    check(attend(p.params(portable, Dtype::kF32, true), nullptr));
    check(cudaDeviceSynchronize(), "attend");
    const Difference out = compare(ours.out, portable.out), lse = compare(ours.lse, portable.lse);
    const Difference m = compare(ours.m, portable.m), l = compare(ours.l, portable.l);
    const auto first = ours.out.download(), second = again.out.download();
    const bool repeats = memcmp(first.data(), second.data(), first.size() * sizeof(float)) == 0;
    // e4m3 sums keep about 14 bits, and tiles of 128 keys round early probabilities otherwise.
    const double bound = pv == PvFormat::kE4m3 ? 2.5e-2 : 5e-3;
    const bool good = out.relative < bound && lse.relative < 1e-4 && m.relative < 1e-6 &&
                      l.relative < 5e-3 && out.odd + lse.odd + m.odd + l.odd == 0 && repeats;
    worst = std::max(worst, out.relative);
    if (!good) {
      ++failures;
      printf("problem %d: B %d T %d S %d N %d K %d H %d pv %d lengths %d segments %d dense %d "
             "window %d %d poison %d: out %.2e lse %.2e m %.2e l %.2e, %g %g %g %g odd entries%s\n",
             number, s.batch, s.queries, s.keys, s.heads, s.kv_heads, s.head_dim,
             static_cast<int>(pv), lengths, segments, dense, p.masks.window_left,
             p.masks.window_right, poison, out.relative, lse.relative, m.relative, l.relative,
             out.odd, lse.odd, m.odd, l.odd, repeats ? "" : ", results move between runs");
      fflush(stdout);
    }
  }
  printf("%d problems, %d failures, largest relative difference %.2e\n", o.problems, failures,
         worst);
  return failures > 0;
}

}  // namespace

int main(int count, char** words) {
  Options o;
  const std::string command = count > 1 ? words[1] : "";
  for (int i = 2; i + 1 < count; i += 2) {
    const std::string name = words[i];
    const char* value = words[i + 1];
    if (name == "--seq") o.seq = numbers(value);
    else if (name == "--dim") o.dim = numbers(value);
    else if (name == "--tokens") o.tokens = std::atoi(value);
    else if (name == "--channels") o.channels = std::atoi(value);
    else if (name == "--problems") o.problems = std::atoi(value);
    else if (name == "--first") o.first = std::atoi(value);
    else if (name == "--portable") o.portable = std::atoi(value) != 0;
    else if (name == "--seed") o.seed = static_cast<unsigned>(std::atoi(value));
    else if (name == "--pv") {
      const std::string pv = value;
      o.pv = pv == "f16" ? PvFormat::kF16 : pv == "bf16" ? PvFormat::kBf16 : PvFormat::kE4m3;
    } else {
      fprintf(stderr, "sage_kernels: unknown option %s\n", words[i]);
      return 2;
    }
  }
  if (command == "time") {
    const int r = time_kernels(o);
#ifdef SAGE_TRACE
    sage_print_trace();
#endif
    return r;
  }
  if (command == "soak") return soak(o);
  fprintf(stderr, "sage_kernels: say `time` or `soak`\n");
  return 2;
}
