// What the matrix unit and ordinary instructions cost each other inside one multiprocessor of sm_90.
//
// One block: two warpgroups, so two warps a scheduler, repeat one instruction or the softmax of a tile, while a third keeps the
// matrix unit busy with products 64 × 128 × 32 or rests. All times are in clocks, and nothing waits for memory.
#pragma once
#include <type_traits>

#include "common/tile.cuh"
#include "problem.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/forward_config.cuh"
#include "sm90/forward_softmax.cuh"

namespace sage::bench {

// INT8 with both operands in shared memory, as Q·Kᵀ; e4m3 with A in registers, as P·V, and sums of 32 or 16 bits.
enum class Products { kNone, kInt8, kE4m3, kE4m3Half };
inline constexpr int kProductKinds = 4;

inline constexpr int kContenders = 3 * 128;  // threads: the first warpgroup multiplies
inline constexpr int kBatch = 32;            // products between two waits for them, which take 3% of the time
inline constexpr int kRounds = 4000;  // so many that beginnings and ends do not count
inline constexpr unsigned kNotRun = ~0u;

struct Clocks {
  unsigned work, products, batches;  // of all rounds; of all batches; their number
};

// What the two warpgroups do, a round at a time. An empty asm hides a value from the compiler's front end but not
// from ptxas: so results go to memory in the end, and what a round reads comes from memory or from rounds before.

// `pass` is one instruction, or kPerPass of them, on 32-bit registers d, a, b, c, whatever their type.
#define SAGE_INSTRUCTION(type, name, per_pass, text)                                               \
  struct type {                                                                                    \
    static constexpr const char* kName = name;                                                     \
    static constexpr int kPerPass = per_pass;                                                      \
    static __device__ __forceinline__ void pass(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) { \
      asm volatile(text : "=r"(d) : "r"(a), "r"(b), "r"(c));                                       \
    }                                                                                              \
  };
SAGE_INSTRUCTION(Ffma, "FFMA", 1, "fma.rn.f32 %0, %1, %2, %3;")
SAGE_INSTRUCTION(Fadd, "FADD", 1, "add.f32 %0, %1, %2;")
SAGE_INSTRUCTION(Iadd, "IADD", 1, "{ .reg .s32 t; add.s32 t, %1, %2; add.s32 %0, t, %3; }")
SAGE_INSTRUCTION(Vimnmx3, "VIMNMX3", 1, "{ .reg .s32 t; max.s32 t, %1, %2; max.s32 %0, t, %3; }")
SAGE_INSTRUCTION(Fmnmx, "FMNMX", 1, "max.f32 %0, %1, %2;")
SAGE_INSTRUCTION(Mufu, "MUFU.EX2", 1, "ex2.approx.ftz.f32 %0, %1;")
// Four codes, as the softmax packs them: two alone would take another instruction.
SAGE_INSTRUCTION(F2fpE4m3, "F2FP.E4M3", 2,
                 "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %1, %2;"
                 " cvt.rn.satfinite.e4m3x2.f32 h, %3, %2; mov.b32 %0, {l, h}; }")
SAGE_INSTRUCTION(F2fpF16, "F2FP.F16", 1, "cvt.rn.f16x2.f32 %0, %1, %2;")
SAGE_INSTRUCTION(Lop3, "LOP3", 1, "lop3.b32 %0, %1, %2, %3, 0x96;")
SAGE_INSTRUCTION(Hfma2, "HFMA2", 1, "fma.rn.f16x2 %0, %1, %2, %3;")
SAGE_INSTRUCTION(Imad, "IMAD", 1, "mad.lo.s32 %0, %1, %2, %3;")
SAGE_INSTRUCTION(I2f, "I2F", 1, "cvt.rn.f32.s32 %0, %1;")
#undef SAGE_INSTRUCTION

// One instruction, on results of seven and eight passes before: far enough for all latencies, and only eight carry over
// into the next round. Where codes of e4m3 do so, ptxas puts their halves together by an instruction more.
template <class Instruction>
struct Repeat {
  static constexpr int kPasses = 64, kRing = 16;
  uint32_t x[kRing], y[kRing];

  __device__ __forceinline__ Repeat(const volatile uint32_t* memory, float) {
#pragma unroll
    for (int i = 0; i < kRing; ++i) x[i] = memory[i] + threadIdx.x, y[i] = memory[i] ^ threadIdx.x;
  }
  __device__ __forceinline__ void round() {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      Instruction::pass(x[i % kRing], x[(i + 8) % kRing], y[i % kRing], x[(i + 9) % kRing]);
    }
  }
  __device__ __forceinline__ uint32_t result() const {
    uint32_t all = 0;
#pragma unroll
    for (int i = kRing - 8; i < kRing; ++i) all ^= x[i];
    return all;
  }
};

// Nothing, for as long as the products are to be measured alone.
struct Rest {
  __device__ __forceinline__ Rest(const volatile uint32_t*, float) {}
  __device__ __forceinline__ void round() { asm volatile("nanosleep.u32 200;" ::: "memory"); }
  __device__ __forceinline__ uint32_t result() const { return 0; }
};

// Maxima, exponentials, sums and codes of a tile of the forward kernel at head dimension 128: 64 rows of a
// warpgroup, 128 keys. The multipliers and the shrinking output are left out.
struct Softmax {
  using Config = sm90::ForwardConfig<sm90::E4m3Values, 128>;
  const volatile uint32_t* const memory;
  const float zero;
  int s[Config::kScores];
  uint32_t p[Config::kProbabilities], codes = 0;
  float multiplier[2][2], m[2] = {}, l[2] = {};

  __device__ __forceinline__ Softmax(const volatile uint32_t* from, float zero_) : memory(from), zero(zero_) {
    load_scores();
#pragma unroll
    for (int i = 0; i < 4; ++i) multiplier[i / 2][i % 2] = __uint_as_float(memory[i]);
  }
  __device__ __forceinline__ void load_scores() {
#pragma unroll
    for (int i = 0; i < Config::kScores; ++i) s[i] = static_cast<int>(memory[i] + threadIdx.x);
  }
  __device__ __forceinline__ void round() {
    // Never. But ptxas cannot know it, and has to look for the maxima again.
    if (zero != 0.0f) load_scores();
    float shift[2][2], top[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, h = i % 2;
      int best = max(s[32 * h + 2 * r], s[32 * h + 2 * r + 1]);
#pragma unroll
      for (int n = 1; n < 8; ++n) best = max(max(best, s[32 * h + 4 * n + 2 * r]), s[32 * h + 4 * n + 2 * r + 1]);
      const float x = (__int_as_float(best) - Config::kStart) * multiplier[h][r];
      top[r] = h == 0 ? x : fmaxf(top[r], x);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, h = i % 2;
      if (h == 0) m[r] = fmaxf(m[r], quad_max(top[r]));
      shift[h][r] = fmaf(-Config::kStart, multiplier[h][r], Config::Values::kExponentBias - m[r]);
    }
    sm90::exponentials<Config>(s, multiplier, shift, zero, l, p);
#pragma unroll
    for (int i = 0; i < Config::kProbabilities; i += 2) codes ^= p[i] ^ p[i + 1];  // or else they go unused
  }
  __device__ __forceinline__ uint32_t result() const {
    return codes ^ __float_as_uint(l[0] + l[1]) ^ __float_as_uint(m[0] + m[1]);
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Whether x holds for a thread of the warpgroup: its warps have to agree on whether there is another product.
__device__ __forceinline__ bool any_of_warpgroup(int barrier, bool x) {
  int any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.b32 p, %2, 0; barrier.cta.red.or.pred q, %1, 128, p; selp.b32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(barrier), "r"(static_cast<int>(x))
      : "memory");
  return ptx::uniform(static_cast<uint32_t>(any)) != 0;
}

// Products until the work is done. A is at `units` (in 16 bytes), B behind its 64 rows of 128 bytes.
template <class Sum>
__device__ __forceinline__ void multiply(uint32_t units, const volatile int& done, Clocks* clocks,
                                         volatile uint32_t* memory) {
  constexpr int kSums = std::is_same_v<Sum, uint32_t> ? 32 : 64;  // pairs of 16 bits
  Sum d[kSums] = {};
  uint32_t a[16], batches = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i] = memory[kContenders + i];
  const unsigned begin = static_cast<unsigned>(clock());
  do {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint64_t b = ptx::shared_operand<128, 0, 1024>(units + 512 + 2 * (i % 4));
      if constexpr (std::is_same_v<Sum, int>) {
        ptx::wgmma_m64k32_s32_s8(d, ptx::shared_operand<128, 0, 1024>(units + 2 * (i % 4)), b, 1);
      } else if constexpr (std::is_same_v<Sum, uint32_t>) {
        ptx::wgmma_m64k32_f16_e4m3(d, a + 4 * (i % 4), b, 1);
      } else {
        ptx::wgmma_m64k32_f32_e4m3(d, a + 4 * (i % 4), b, 1);
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_registers(d);
    ++batches;
  } while (!any_of_warpgroup(2, done != 0));
  if (threadIdx.x == 0) {
    clocks->products = static_cast<unsigned>(clock()) - begin;
    clocks->batches = batches;
  }
  Sum all = 0;
#pragma unroll
  for (int i = 0; i < kSums; ++i) all += d[i];
  memory[threadIdx.x] = static_cast<uint32_t>(static_cast<int>(all));
}
#endif

// Which products is no template's parameter: all must run beside the same machine code.
template <class Work>
__global__ void __launch_bounds__(kContenders, 1)
    contend(Products products, Clocks* clocks, volatile uint32_t* memory, float zero) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kWords = (64 + 128) * 128 / 4;
  __shared__ __align__(1024) uint32_t operands[kWords];
  __shared__ volatile int done;
  for (int i = static_cast<int>(threadIdx.x); i < kWords; i += kContenders) operands[i] = 0;
  if (threadIdx.x == 0) done = 0;
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (ptx::uniform(threadIdx.x / 128) == 0) {
    const uint32_t units = ptx::shared_address(operands) / 16;
    if (products == Products::kInt8) multiply<int>(units, done, clocks, memory);
    if (products == Products::kE4m3) multiply<float>(units, done, clocks, memory);
    if (products == Products::kE4m3Half) multiply<uint32_t>(units, done, clocks, memory);
  } else {
    Work work(memory + kContenders, zero);
    ptx::bar_sync(1, kContenders - 128);
    const unsigned begin = static_cast<unsigned>(clock());
#pragma unroll 1
    for (int i = 0; i < kRounds; ++i) work.round();
    ptx::bar_sync(1, kContenders - 128);
    if (threadIdx.x == 128) {
      clocks->work = static_cast<unsigned>(clock()) - begin;
      done = 1;
    }
    memory[threadIdx.x] = work.result();
  }
#endif
}

// Alone and beside each kind of products: clocks of a round, and of a product meanwhile.
struct Contention {
  double round[kProductKinds], product[kProductKinds];
  bool ran = false;
};

template <class Work>
inline Contention measure() {
  Contention x;
  Buffer<Clocks> clocks(1);
  Buffer<uint32_t> memory(kContenders + 64);
  check(cudaMemset(memory.data, 0, memory.count * sizeof(uint32_t)), "cudaMemset");
  for (int kind = 0; kind < kProductKinds; ++kind) {
    clocks.upload({{kNotRun, 0, 1}});
    for (int i = 0; i < 2; ++i) {  // the first brings the code into the caches
      contend<Work><<<1, kContenders>>>(static_cast<Products>(kind), clocks.data, memory.data, 0.0f);
      check(cudaGetLastError(), "contention");
    }
    const Clocks c = clocks.download()[0];
    x.ran = c.work != kNotRun;
    x.round[kind] = static_cast<double>(c.work) / kRounds;
    x.product[kind] = static_cast<double>(c.products) / kBatch / c.batches;
  }
  return x;
}

}  // namespace sage::bench
