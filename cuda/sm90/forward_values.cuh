// The product P·V on wgmma, one struct a format of V: how a tile of V is copied, how exponentials
// become A operands in registers, and how they are multiplied.
#pragma once

#include "common/params.h"
#include "common/softmax.cuh"
#include "ptx/bulk_tensor.cuh"
#include "ptx/cvt.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/forward_sums.cuh"

namespace sage::sm90 {

// e4m3 P and V. V lies as [channels][keys], keys permuted inside groups of 16 so that accumulators of
// scores are A operands as they stand (`pi` in docs/abi.md).
struct E4m3Values {
  static constexpr PvFormat kFormat = PvFormat::kE4m3;
  static constexpr int kElementBytes = 1;
  template <int kHeadDim>
  using Sums = HalfSums<kHeadDim>;
  static constexpr int kRegisters = 2;  // of A, for 16 keys
  static constexpr float kExponentBias = 6.0f;  // E·64
  static constexpr float kUnit = 0x1p-6f;       // what undoes it
  // Products in the matrix unit are cut off about 13 bits below the sum that they are added to. After this many keys the
  // sums are added to longer ones in shared memory, and begin anew.
  static constexpr int kLongKeys = 2048;
  // Sums of 16 bits must not overflow. Where a row's probabilities, as one of its four threads sees them, add up to more
  // than kMostProbability, its reference, which is its maximum otherwise, rises by kRaise, and all of the row shrinks. So
  // they add up to at most four times that before a tile, to 128 more after it; with codes of P that may be rounded up by
  // 1/16, and values of at most kValueRange (`v_range` in docs/abi.md), that much is finite, with 7% for the sums' rounding.
  static constexpr bool kBounded = true;
  static constexpr float kMostProbability = 32.0f, kRaise = 2.0f, kValueRange = 3.5f;
  static_assert((4 * kMostProbability + 128) / kUnit * 1.0625f * kValueRange < 0.95f * 65504 &&
                    (4 * kMostProbability + 128) / 4 <= 4 * kMostProbability,
                "the sums fit 16 bits, now and after the next tile");

  template <class Config>
  static __device__ __forceinline__ void copy(uint32_t tile, const void* map, uint32_t barrier,
                                              int key, int plane) {
    static_assert(Config::kKeys == 64 || Config::kKeys == 128,
                  "a row of a tile is as wide as the swizzle");
    ptx::cp_async_bulk_tensor_3d(tile, map, barrier, key, 0, plane);
  }

  // The registers of 16 keys from their exponentials, e[4·n + c] of key group n.
  static __device__ __forceinline__ void pack(uint32_t* a, const float* e) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = ptx::cvt_e4m3x2_f32(e[2 * i], e[2 * i + 1]);
      const uint32_t high = ptx::cvt_e4m3x2_f32(e[4 + 2 * i], e[5 + 2 * i]);
      a[i] = low | high << 16;
    }
  }

  // `tile` in 16-byte units.
  template <class Config>
  static __device__ __forceinline__ void multiply(Sums<Config::kHeadDim>& o, const uint32_t* a, uint32_t tile,
                                                  int accumulate) {
#pragma unroll
    for (int step = 0; step < Config::kKeys / 32; ++step) {
      const uint64_t b = ptx::shared_operand<Config::kKeys, 0, 8 * Config::kKeys>(tile + 2 * step);
      ptx::wgmma_m64k32_f16_e4m3(o.d, a + 4 * step, b, step == 0 ? accumulate : 1);
    }
  }
};

// P and V in 16 bits, V as [keys][channels].
template <PvFormat kFormat_>
struct HalfValues {
  static constexpr PvFormat kFormat = kFormat_;
  static constexpr int kElementBytes = 2;
  template <int kHeadDim>
  using Sums = FloatSums<kHeadDim>;
  static constexpr bool kBounded = false;
  static constexpr int kLongKeys = 0;  // float32 sums in the matrix unit
  static constexpr int kRegisters = 4;  // of A, for 16 keys
  static constexpr float kExponentBias = 0.0f;
  static constexpr float kUnit = 1.0f;
  static constexpr int kBoxColumns = 64;  // channels: 128 bytes, the width of the swizzle

  template <class Config>
  static __device__ __forceinline__ void copy(uint32_t tile, const void* map, uint32_t barrier,
                                              int key, int plane) {
#pragma unroll
    for (int box = 0; box < Config::kHeadDim / kBoxColumns; ++box) {
      ptx::cp_async_bulk_tensor_3d(tile + box * Config::kKeys * 128, map, barrier,
                                   box * kBoxColumns, key, plane);
    }
  }

  // The registers of 16 keys from their exponentials.
  static __device__ __forceinline__ void pack(uint32_t* a, const float* e) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = kFormat == PvFormat::kF16 ? ptx::cvt_f16x2_f32(e[2 * i], e[2 * i + 1])
                                       : ptx::cvt_bf16x2_f32(e[2 * i], e[2 * i + 1]);
    }
  }

  template <class Config>
  static __device__ __forceinline__ void multiply(Sums<Config::kHeadDim>& o, const uint32_t* a, uint32_t tile,
                                                  int accumulate) {
#pragma unroll
    for (int step = 0; step < Config::kKeys / 16; ++step) {
      const uint64_t b = ptx::shared_operand<128, Config::kKeys * 128, 1024>(tile + 128 * step);
      const int sum = step == 0 ? accumulate : 1;
      if constexpr (kFormat == PvFormat::kF16) {
        ptx::wgmma_m64k16_f32_f16(o.d, a + 4 * step, b, sum);
      } else {
        ptx::wgmma_m64k16_f32_bf16(o.d, a + 4 * step, b, sum);
      }
    }
  }
};

}  // namespace sage::sm90
