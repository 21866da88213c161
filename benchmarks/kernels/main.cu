// The kernel library without JAX: times single operations and compares kernels with each other, in
// seconds. Built by `cmake --build ... --target bench_kernels`.
//
//   bench_kernels time [--seq N,..] [--dim N,..] [--pv e4m3|f16|bf16] [--tokens N] [--channels N]
//                     [--portable 1] [--backward 1] [--deterministic 1] [--exact-delta 1]
//                     [--density D [--block-q N] [--block-k N]]
//   bench_kernels decode [--seq N,..] [--dim N,..] [--pv e4m3|f16|bf16] [--portable 1] [--heads N] [--kv-heads N]
//   bench_kernels soak [--problems N] [--seed N] [--first N]
//   bench_kernels contention
//   bench_kernels products
//
// `time` prints milliseconds of each operation and of the forward ones together, and the rates of the
// attention kernels (of train8's backward pass: its pre-pass included); with a density, under a block mask of so many of the
// blocks of queries and keys, whose operations all count, those not done too. `decode` does so for one to 16
// queries of 32 heads, which share eight key heads of the given lengths (or of as many heads as are asked for), with the
// rate at which codes of K and V are read. `soak` runs random problems, masks and ragged shapes included, through the
// kernel that the device would get and through the portable one, and fails where results differ by more
// than rounding. `contention` prints the rates of single instructions on sm_90, alone and beside the
// matrix unit's products, and what those keep of theirs. `products` prints what the matrix units of the whole card sustain on the
// forward kernel's products alone, on codes as attention has them and on zeros, and its clock meanwhile.
#include "contention.cuh"
#include "products.cuh"
#include "soak.cuh"

using namespace sage;
using namespace sage::bench;

namespace {

int time_kernels(const Options& o) {
  printf("%4s %6s %6s %9s %9s %9s %8s %9s %8s\n", "dim", "seq", "causal", "kv ms", "q ms", "attend ms", "TOPS",
         "all ms", "TOPS");
  for (int dim : o.dim) {
    for (int seq : o.seq) {
      const int heads = o.channels / dim, batch = std::max(1, o.tokens / seq);
      Problem p({batch, seq, seq, heads, heads, dim, dim}, o.pv, 7, 1.0f);
      if (o.density > 0) p.set_density(o.density, o.block_q, o.block_k);
      p.quantize_keys(o.backward);
      const double kv = milliseconds([&] { p.quantize_keys(o.backward); });
      const double q = milliseconds([&] { p.quantize_queries(); });
      Problem::Result result(p.shape);
      for (int causal = 0; causal < 2; ++causal) {
        p.masks.window_right = causal ? 0 : 1 << 30;
        const AttendParams call = p.params(result, Dtype::kBf16, o.portable);
        const double ms = milliseconds([&] { check(attend(call, nullptr)); });
        const double operations = 4.0 * batch * heads * seq * seq * dim * (causal ? 0.5 : 1.0);
        const AttendParams with_queries = p.params(result, Dtype::kBf16, o.portable, true);
        const double raw = milliseconds([&] { check(attend(with_queries, nullptr)); });
        const double all = milliseconds([&] {
          p.quantize_keys(o.backward);
          p.quantize_queries();
          check(attend(call, nullptr));
        });
        const double all_raw = milliseconds([&] {
          p.quantize_keys(o.backward);
          check(attend(with_queries, nullptr));
        });
        printf("%4d %6d %6s %9.4f %9.4f %9.4f %8.1f %9.4f %8.1f %9.4f %9.4f %8.1f", dim, seq, causal ? "yes" : "no", kv, q,
               ms, operations / ms / 1e9, all, operations / all / 1e9, raw, all_raw, operations / all_raw / 1e9);
        if (o.backward) {
          Gradients gradients(p, 9);
          AttendParams forward = call;
          forward.out = gradients.out.data;
          check(attend(forward, nullptr));
          const BackwardParams back = gradients.params(p, result, o.portable, o.exact_delta, Dtype::kBf16, o.deterministic);
          const double back_ms = milliseconds([&] { check(attend_backward(back, nullptr)); });
          printf(" | backward %9.4f %8.1f", back_ms, 2.5 * operations / back_ms / 1e9);
        }
        printf("\n");
        fflush(stdout);
      }
    }
  }
  return 0;
}

int time_decoding(const Options& o) {
  printf("%4s %6s %7s %10s %10s\n", "dim", "keys", "queries", "attend us", "GB/s");
  for (int dim : o.dim) {
    for (int keys : o.seq) {
      for (int queries : {1, 4, 16}) {
        Problem p({1, queries, keys, o.heads, o.kv_heads, dim, dim}, o.pv, 7, 1.0f);
        p.quantize_keys();
        p.quantize_queries();
        Problem::Result result(p.shape);
        const AttendParams call = p.params(result, Dtype::kBf16, o.portable);
        const double us = 1e3 * milliseconds([&] { check(attend(call, nullptr)); });
        const double bytes = static_cast<double>(p.k8.count) + static_cast<double>(p.v_pv.count);
        printf("%4d %6d %7d %10.1f %10.0f\n", dim, keys, queries, us, bytes / us / 1e3);
        fflush(stdout);
      }
    }
  }
  return 0;
}

template <class Instruction>
void print_rates(const Contention& full) {
  using Work = Repeat<Instruction>;
  const Contention x = measure<Work>();
  printf("%-10s", Instruction::kName);
  for (double clocks : x.round) printf(" %9.3f", 2.0 * Work::kPasses * Instruction::kPerPass / clocks);
  for (int i = 1; i < kProductKinds; ++i) printf(" %8.0f%%", 100 * full.product[i] / x.product[i]);
  printf("\n");
  fflush(stdout);
}

template <class... Instructions>
void print_all_rates(const Contention& full) {
  (print_rates<Instructions>(full), ...);
}

int print_contention() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  Contention full;
  if (device.major == 9 && device.minor == 0) full = measure<Rest>();
  if (!full.ran) {  // compiled for sm_90, not sm_90a, the kernel is empty
    fprintf(stderr, "bench_kernels: contention needs an sm_90 device and kernels built for 90a\n");
    return 2;
  }
  printf("a product of 64 x 128 x 32 alone: INT8 %.1f clocks, e4m3 %.1f, with sums of 16 bits %.1f\n\n", full.product[1],
         full.product[2], full.product[3]);
  printf("%-10s %39s %29s\n", "", "rate per clock and scheduler", "products' share");
  printf("%-10s %9s %9s %9s %9s %9s %9s %9s\n", "", "alone", "with INT8", "with e4m3", "16 bits", "INT8", "e4m3", "16 bits");
  print_all_rates<Ffma, Fadd, Iadd, Vimnmx3, Fmnmx, Mufu, F2fpE4m3, F2fpF16, Lop3, Hfma2, Imad, I2f>(full);
  const Contention x = measure<Softmax>();
  printf("\nsoftmax of two tiles of 64 x 128: %.0f clocks alone, %.0f with INT8 (products' share %.0f%%), %.0f with "
         "e4m3 (%.0f%%), %.0f with sums of 16 bits (%.0f%%)\n",
         x.round[0], x.round[1], 100 * full.product[1] / x.product[1], x.round[2], 100 * full.product[2] / x.product[2],
         x.round[3], 100 * full.product[3] / x.product[3]);
  return 0;
}

template <Steady kKind>
bool print_steady(const char* name) {
  for (bool zeros : {false, true}) {
    const SteadyRate x = sustain<kKind>(steady_codes(zeros));
    if (!x.ran) return false;
    printf("%-34s %-6s %7.0f TOPS %6.0f MHz %7.1f clocks a tile\n", name, zeros ? "zeros" : "codes", x.tops, x.megahertz,
           x.clocks_per_tile);
    fflush(stdout);
  }
  return true;
}

int print_products() {
  const bool ran = print_steady<Steady::kScores>("Q.K, INT8") &&
                   print_steady<Steady::kScoresFromStart>("Q.K, INT8, from the start's product") &&
                   print_steady<Steady::kValues>("P.V, e4m3, sums of 16 bits") &&
                   print_steady<Steady::kValuesFloat>("P.V, e4m3, sums of 32 bits") &&
                   print_steady<Steady::kForward>("both, as the forward kernel");
  if (!ran) fprintf(stderr, "bench_kernels: products needs an sm_90 device and kernels built for 90a\n");
  return ran ? 0 : 2;
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
    else if (name == "--heads") o.heads = std::atoi(value);
    else if (name == "--kv-heads") o.kv_heads = std::atoi(value);
    else if (name == "--problems") o.problems = std::atoi(value);
    else if (name == "--first") o.first = std::atoi(value);
    else if (name == "--portable") o.portable = std::atoi(value) != 0;
    else if (name == "--backward") o.backward = std::atoi(value) != 0;
    else if (name == "--exact-delta") o.exact_delta = std::atoi(value) != 0;
    else if (name == "--deterministic") o.deterministic = std::atoi(value) != 0;
    else if (name == "--density") o.density = std::atof(value);
    else if (name == "--block-q") o.block_q = std::atoi(value);
    else if (name == "--block-k") o.block_k = std::atoi(value);
    else if (name == "--seed") o.seed = static_cast<unsigned>(std::atoi(value));
    else if (name == "--pv") {
      const std::string pv = value;
      o.pv = pv == "f16" ? PvFormat::kF16 : pv == "bf16" ? PvFormat::kBf16 : PvFormat::kE4m3;
    } else {
      fprintf(stderr, "bench_kernels: unknown option %s\n", words[i]);
      return 2;
    }
  }
  if (command == "time") {
    return time_kernels(o);
  }
  if (command == "decode") return time_decoding(o);
  if (command == "soak") return soak(o);
  if (command == "contention") return print_contention();
  if (command == "products") return print_products();
  fprintf(stderr, "bench_kernels: say `time`, `decode`, `soak`, `contention` or `products`\n");
  return 2;
}
