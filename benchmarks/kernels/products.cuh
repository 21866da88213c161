// What the matrix units of a whole sm_90 sustain, under its power limit, on codes as attention has them: the products of the
// forward kernel at head dimension 128, tile after tile, and nothing else. Operands never leave shared memory and registers.
//
// A block a multiprocessor, two warpgroups of 64 queries, four tiles of 128 keys in turn.
#pragma once
#include "common/launch.h"
#include "numerics/e4m3.h"
#include "problem.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/shared.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"

namespace sage::bench {

enum class Steady { kScores, kScoresFromStart, kValues, kValuesFloat, kForward };

inline constexpr int kSteadyThreads = 2 * 128, kSteadyStages = 4, kSteadyTiles = 8000;
inline constexpr int kSteadyKeysAt = 2 * 64 * 128, kSteadyTileBytes = 128 * 128;
inline constexpr int kSteadyStartAt = kSteadyKeysAt + 2 * kSteadyStages * kSteadyTileBytes;
inline constexpr int kSteadyShared = kSteadyStartAt + 128;
inline constexpr int kSteadyOperands = 16;  // registers of P for 128 keys

struct SteadyClocks {
  unsigned long long clocks, nanoseconds;
};

// `data` fills shared memory, then the registers of P; `out` keeps results alive.
template <Steady kKind>
__global__ void __launch_bounds__(kSteadyThreads, 1)
    multiply_steadily(const uint32_t* data, SteadyClocks* measured, uint32_t* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr bool kScores = kKind != Steady::kValues && kKind != Steady::kValuesFloat;
  constexpr bool kStarts = kKind == Steady::kScoresFromStart || kKind == Steady::kForward;
  constexpr bool kHalf = kKind == Steady::kValues || kKind == Steady::kForward, kFloat = kKind == Steady::kValuesFloat;
  for (int i = static_cast<int>(threadIdx.x); i < kSteadyShared / 4; i += kSteadyThreads) {
    reinterpret_cast<uint32_t*>(shared)[i] = data[i];
  }
  ptx::fence_proxy_async_shared();
  uint32_t p[kSteadyOperands], half[32] = {}, sum = 0;
  float full[64] = {};
  int s[64] = {};
#pragma unroll
  for (int i = 0; i < kSteadyOperands; ++i) p[i] = data[kSteadyShared / 4 + i * kSteadyThreads + threadIdx.x];
  __syncthreads();
  const uint32_t units = ptx::shared_address(shared) / 16;
  const uint32_t queries = units + ptx::uniform(threadIdx.x / 128) * 64 * 128 / 16;
  unsigned long long begin_ns, end_ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin_ns));
  const long long begin = clock64();
#pragma unroll 1
  for (int tile = 0; tile < kSteadyTiles; ++tile) {
    const uint32_t keys = units + (kSteadyKeysAt + tile % kSteadyStages * kSteadyTileBytes) / 16;
    const uint32_t values = keys + kSteadyStages * kSteadyTileBytes / 16;
    ptx::keep_in_registers(p);
    ptx::wgmma_fence();
    if constexpr (kScores) {
      const uint64_t start = ptx::shared_operand<0, 0, 0>(units + kSteadyStartAt / 16);
      if constexpr (kStarts) ptx::wgmma_m64k32_f32_e4m3(s, start, start);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::wgmma_m64k32_s32_s8(s, ptx::shared_operand<128, 0, 1024>(queries + 2 * step),
                                 ptx::shared_operand<128, 0, 1024>(keys + 2 * step), kStarts || step > 0);
      }
    }
    if constexpr (kHalf || kFloat) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint64_t b = ptx::shared_operand<128, 0, 1024>(values + 2 * step);
        const int accumulate = step > 0 || tile % 16 > 0;
        if constexpr (kHalf) {
          ptx::wgmma_m64k32_f16_e4m3(half, p + 4 * step, b, accumulate);
        } else {
          ptx::wgmma_m64k32_f32_e4m3(full, p + 4 * step, b, accumulate);
        }
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();  // meanwhile the other warpgroup's are under way
    ptx::keep_in_registers(s);
    ptx::keep_in_registers(half);
    ptx::keep_in_registers(full);
    sum ^= static_cast<uint32_t>(s[0]) ^ half[0] ^ __float_as_uint(full[0]);  // or ptxas leaves products out
  }
  const long long end = clock64();
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(end_ns));
  if (blockIdx.x == 0 && threadIdx.x == 0) *measured = {static_cast<unsigned long long>(end - begin), end_ns - begin_ns};
  out[blockIdx.x * kSteadyThreads + threadIdx.x] = sum;
#endif
}

struct SteadyRate {
  double tops, megahertz, clocks_per_tile;
  bool ran;
};

// The median of about half a second, after as long for the clock to settle.
template <Steady kKind>
inline SteadyRate sustain(const std::vector<uint8_t>& bytes) {
  constexpr int kSamples = 50;  // of about 10 ms
  const int blocks = multiprocessors();
  check(cudaFuncSetAttribute(multiply_steadily<kKind>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSteadyShared),
        "shared memory");
  Buffer<uint8_t> data(bytes.size());
  data.upload(bytes);
  Buffer<SteadyClocks> clocks(1);
  Buffer<uint32_t> out(static_cast<size_t>(blocks) * kSteadyThreads);
  const auto once = [&] {
    multiply_steadily<kKind><<<blocks, kSteadyThreads, kSteadyShared>>>(
        reinterpret_cast<const uint32_t*>(data.data), clocks.data, out.data);
    check(cudaGetLastError(), "products");
  };
  milliseconds(once, kSamples);
  const double each = milliseconds(once, kSamples);
  const SteadyClocks c = clocks.download()[0];
  const double products = kKind == Steady::kForward ? 2 : 1;
  const double operations = products * 2.0 * 128 * 128 * 128 * kSteadyTiles * blocks;
  return {operations / each / 1e9, 1e3 * static_cast<double>(c.clocks) / static_cast<double>(c.nanoseconds),
          static_cast<double>(c.clocks) / kSteadyTiles, c.nanoseconds != ~0ull};
}

// Codes as normal q, k and v have them, or zeros: of K INT8 whose 127 is 4 standard deviations (the largest of a tile), of Q 2.7
// (of a token), of V e4m3 whose 3.5 is 4, and of P 64 times the probabilities of normal logits relative to their largest, e^3.8.
inline std::vector<uint8_t> steady_codes(bool zeros) {
  std::vector<uint8_t> bytes(kSteadyShared + 4 * kSteadyOperands * kSteadyThreads, 0);
  if (zeros) return bytes;
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  const auto int8 = [&](float sigma) {
    return static_cast<uint8_t>(static_cast<int8_t>(std::lrint(std::clamp(sigma * normal(generator), -127.0f, 127.0f))));
  };
  for (int i = 0; i < kSteadyKeysAt; ++i) bytes[i] = int8(127 / 2.7f);
  for (int i = 0; i < kSteadyStages * kSteadyTileBytes; ++i) bytes[kSteadyKeysAt + i] = int8(127 / 4.0f);
  for (int i = 0; i < kSteadyStages * kSteadyTileBytes; ++i) {
    bytes[kSteadyKeysAt + kSteadyStages * kSteadyTileBytes + i] =
        e4m3_code(std::clamp(3.5f / 4.0f * normal(generator), -3.5f, 3.5f));
  }
  for (int i = 0; i < 128; ++i) bytes[kSteadyStartAt + i] = e4m3_code(224.0f);
  for (size_t i = kSteadyShared; i < bytes.size(); ++i) {
    bytes[i] = e4m3_code(std::min(64.0f, 64.0f * std::exp(normal(generator) - 3.8f)));
  }
  return bytes;
}

}  // namespace sage::bench
