// What the quantisers share: a block of 2·Hp threads holds 8 channels of several tokens per thread,
// read with 16-byte accesses where head dimension and alignment allow.
#pragma once

#include <cuda_runtime.h>

#include "common/params.h"
#include "common/tile.cuh"
#include "numerics/bf16.h"
#include "numerics/f16.h"
#include "numerics/int8.h"
#include "ptx/cvt.cuh"
#include "ptx/math.cuh"

namespace sage {

inline constexpr int kChannels = 8;  // channels a thread holds of one token

// A block's threads: Hp/8 neighbouring threads share a token, 16 tokens at a time.
template <int kHeadDim>
struct TokenThreads {
  static constexpr int kThreads = 2 * kHeadDim;
  static constexpr int kThreadsPerToken = kHeadDim / kChannels;  // 8, 16 or 32: never over a warp
  static constexpr int kTokensAtOnce = kThreads / kThreadsPerToken;
  static_assert(kTokensAtOnce == 16, "quantize_kv.cu and quantize_q.cu map 16 rows to tokens");

  static __device__ int row(int thread = static_cast<int>(threadIdx.x)) { return thread / kThreadsPerToken; }
  static __device__ int channel(int thread = static_cast<int>(threadIdx.x)) {
    return thread % kThreadsPerToken * kChannels;
  }
};

__device__ __forceinline__ float load_element(const void* x, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kF32) return static_cast<const float*>(x)[at];
  const uint16_t bits = static_cast<const uint16_t*>(x)[at];
  return dtype == Dtype::kBf16 ? bf16_value(bits) : f16_value(bits);
}

// Eight float32 channels.
__device__ __forceinline__ void load_floats(float (&x)[kChannels], const float* from) {
  const auto* const pair = reinterpret_cast<const float4*>(from);
  const float4 low = pair[0], high = pair[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// Eight channels of a token as they lie in memory: many are read before the first is used.
//   load         starts to read, if `inside`, the channels from `channel` on of a row that begins at element `row`
//   clear        makes them zeros
//   unpack       gives them as float32
//   magnitude    the largest |x| in a form that `Piece::larger` combines, `finite` and `value` read; a NaN is above Inf and
//                Inf above all numbers
//   Extremes     largest and smallest of each channel over several tokens
//   kReadsAhead  whether registers suffice for reading the next tokens while these are worked on

// Of a tensor whose dtype is known to the compiler and whose head dimension is a multiple of 8.
template <Dtype kDtype>
struct Piece {
  static_assert(kDtype != Dtype::kF32, "16-bit formats");
  static constexpr bool kBf16 = kDtype == Dtype::kBf16;
  static constexpr bool kReadsAhead = true;
  uint4 words = {0, 0, 0, 0};

  __device__ __forceinline__ void load(const void* tensor, Dtype, int64_t row, int channel, int head_dim,
                                       bool inside = true) {
    const auto* const from = static_cast<const uint16_t*>(tensor) + row + channel;
    words = make_uint4(0, 0, 0, 0);
    if (inside && channel < head_dim) words = *reinterpret_cast<const uint4*>(from);
  }
  __device__ __forceinline__ void clear() { words = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void unpack(float (&x)[kChannels]) const {
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) floats(x[2 * i], x[2 * i + 1], all[i]);
  }

  // Two at a time.
  __device__ __forceinline__ uint32_t magnitude() const {
    return larger(larger(words.x, words.y), larger(words.z, words.w));
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return kBf16 ? ptx::max_magnitude_bf16x2(a, b) : ptx::max_magnitude_f16x2(a, b);
  }
  __device__ __forceinline__ bool finite() const { return finite(magnitude()); }
  static __device__ __forceinline__ bool finite(uint32_t magnitude) {
    constexpr uint32_t kInf = kBf16 ? 0x7f80u : 0x7c00u;
    return (magnitude & 0x7fffu) < kInf && (magnitude >> 16 & 0x7fffu) < kInf;
  }
  static __device__ __forceinline__ float value(uint32_t magnitude) {
    const uint32_t bits = max(magnitude & 0x7fffu, magnitude >> 16 & 0x7fffu);  // ordered as numbers are, NaN above them
    float x, none;
    floats(x, none, bits);
    return x;
  }

  struct Extremes {
    uint32_t largest[4], smallest[4];

    __device__ __forceinline__ Extremes() {
      constexpr uint32_t kInf = kBf16 ? 0x7f807f80u : 0x7c007c00u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        largest[i] = kInf | 0x80008000u;
        smallest[i] = kInf;
      }
    }
    __device__ __forceinline__ void add(const Piece& x) {
      const uint32_t all[4] = {x.words.x, x.words.y, x.words.z, x.words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        largest[i] = kBf16 ? ptx::max_bf16x2(largest[i], all[i]) : ptx::max_f16x2(largest[i], all[i]);
        smallest[i] = kBf16 ? ptx::min_bf16x2(smallest[i], all[i]) : ptx::min_f16x2(smallest[i], all[i]);
      }
    }
    __device__ __forceinline__ void unpack(float (&most)[kChannels], float (&least)[kChannels]) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        floats(most[2 * i], most[2 * i + 1], largest[i]);
        floats(least[2 * i], least[2 * i + 1], smallest[i]);
      }
    }
  };

 private:
  static __device__ __forceinline__ void floats(float& low, float& high, uint32_t word) {
    if constexpr (kBf16) {
      low = bits_float(word << 16);
      high = bits_float(word & 0xffff0000u);
    } else {
      ptx::cvt_f32_f16x2(low, high, word);
    }
  }
};

// What pieces of float32 share.
struct FloatPiece {
  static constexpr bool kReadsAhead = false;
  float values[kChannels] = {};

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) values[i] = 0.0f;
  }
  __device__ __forceinline__ void unpack(float (&x)[kChannels]) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) x[i] = values[i];
  }
  __device__ __forceinline__ uint32_t magnitude() const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) largest = larger(largest, float_bits(values[i]) & 0x7fffffffu);
    return largest;
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return max(a, b); }
  __device__ __forceinline__ bool finite() const { return finite(magnitude()); }
  static __device__ __forceinline__ bool finite(uint32_t magnitude) { return magnitude < 0x7f800000u; }
  static __device__ __forceinline__ float value(uint32_t magnitude) { return bits_float(magnitude); }

  struct Extremes {
    float largest[kChannels], smallest[kChannels];

    __device__ __forceinline__ Extremes() {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        largest[i] = -INFINITY;
        smallest[i] = INFINITY;
      }
    }
    __device__ __forceinline__ void add(const FloatPiece& x) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        largest[i] = fmaxf(largest[i], x.values[i]);
        smallest[i] = fminf(smallest[i], x.values[i]);
      }
    }
    __device__ __forceinline__ void unpack(float (&most)[kChannels], float (&least)[kChannels]) const {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        most[i] = largest[i];
        least[i] = smallest[i];
      }
    }
  };
};

template <>
struct Piece<Dtype::kF32> : FloatPiece {
  __device__ __forceinline__ void load(const void* tensor, Dtype, int64_t row, int channel, int head_dim,
                                       bool inside = true) {
    clear();
    if (inside && channel < head_dim) load_floats(values, static_cast<const float*>(tensor) + row + channel);
  }
};

// Of any tensor.
struct AnyPiece : FloatPiece {
  __device__ __forceinline__ void load(const void* tensor, Dtype dtype, int64_t row, int channel, int head_dim,
                                       bool inside = true) {
    clear();
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if (inside && channel + i < head_dim) values[i] = load_element(tensor, dtype, row + channel + i);
    }
  }
};

// Calls start(P()) with the kind P of piece that fits tensors of these dtypes.
template <class Start>
const char* with_pieces(Dtype one, Dtype other, int head_dim, Start start) {
  if (one != other || head_dim % kChannels != 0) return start(AnyPiece());
  if (one == Dtype::kBf16) return start(Piece<Dtype::kBf16>());
  if (one == Dtype::kF16) return start(Piece<Dtype::kF16>());
  return start(Piece<Dtype::kF32>());
}

__device__ __forceinline__ float largest_magnitude(const float (&x)[kChannels]) {
  float a = 0.0f;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) a = fmaxf(a, fabsf(x[i]));
  return a;
}

// Whether `condition` holds for all threads of this thread's token; every lane takes part.
template <int kThreadsPerToken>
__device__ __forceinline__ bool whole_token(bool condition) {
  const unsigned failing = __ballot_sync(kFullWarp, !condition);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const unsigned mine = kThreadsPerToken == 32 ? kFullWarp : (1u << kThreadsPerToken) - 1u;
  return (failing >> (lane / kThreadsPerToken * kThreadsPerToken) & mine) == 0;
}

// Sum over `kLanes` neighbouring lanes.
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// Maximum over `kLanes` neighbouring lanes.
template <int kLanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  }
  return x;
}

// Each value combined over kLanes neighbouring lanes; lane i gets value i % kValues. One after the other they would take
// kValues · log2(kLanes) exchanges, and whatever follows kValues times as many instructions.
template <int kLanes, int kValues, class T, class Combine>
__device__ __forceinline__ T combine_lanes(T (&x)[kValues], const Combine& combine) {
  static_assert(kValues <= kLanes, "a lane for each value");
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int step = kValues / 2; step > 0; step /= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const T sent = upper ? x[i] : x[i + step], kept = upper ? x[i + step] : x[i];
      x[i] = combine(kept, __shfl_xor_sync(kFullWarp, sent, step));
    }
  }
#pragma unroll
  for (int step = kValues; step < kLanes; step *= 2) x[0] = combine(x[0], __shfl_xor_sync(kFullWarp, x[0], step));
  return x[0];
}

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Maximum over the block, which all of its threads meet in `barrier`. `scratch` holds a float a warp; it may be reused
// after the next one.
template <int kThreads, class Barrier>
__device__ __forceinline__ float block_max(float x, float* scratch, const Barrier& barrier) {
  x = lanes_max<kWarpSize>(x);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  barrier();
  x = scratch[0];
#pragma unroll
  for (int i = 1; i < kThreads / kWarpSize; ++i) x = fmaxf(x, scratch[i]);
  return x;
}
template <int kThreads>
__device__ __forceinline__ float block_max(float x, float* scratch) {
  return block_max<kThreads>(x, scratch, [] { __syncthreads(); });
}

// The larger of each thread's maxima of eight channels, over the block's 16 rows of threads, which meet here. Magnitudes are
// ordered as their bits are; `shared` held zeros.
template <int kHeadDim>
__device__ __forceinline__ void gather_maxima(uint32_t (&shared)[kHeadDim], const float (&largest)[kChannels]) {
  const int channel = TokenThreads<kHeadDim>::channel(ptx::opaque_thread());
#pragma unroll
  for (int c = 0; c < kChannels; ++c) atomicMax(&shared[channel + c], float_bits(largest[c]));
  __syncthreads();
}

// The same, and combines them with those in memory.
template <int kHeadDim>
__device__ __forceinline__ void store_maxima(uint32_t (&shared)[kHeadDim],
                                             const float (&largest)[kChannels], float* out) {
  gather_maxima(shared, largest);
  for (int c = ptx::opaque_thread(); c < kHeadDim; c += TokenThreads<kHeadDim>::kThreads) {
    if (shared[c] != 0) atomicMax(reinterpret_cast<uint32_t*>(out + c), shared[c]);
  }
}

// Eight INT8 codes as two words, lowest channel first: those of int8_code for |x · inverse| <= 127.5, and 0 for NaN.
__device__ __forceinline__ uint2 int8_codes(const float (&x)[kChannels], float inverse) {
  const auto four = [&](int i) {
    return ptx::cvt_s8x4_f32(__fmul_rn(x[i], inverse), __fmul_rn(x[i + 1], inverse), __fmul_rn(x[i + 2], inverse),
                             __fmul_rn(x[i + 3], inverse));
  };
  return make_uint2(four(0), four(4));
}

// x rounded to an integer, ties to even, for |x| < 2^22.
__device__ __forceinline__ float nearest_integer(float x) { return __fadd_rn(__fadd_rn(x, 12582912.0f), -12582912.0f); }

// Eight values as f16 or bf16, lowest channel first.
__device__ __forceinline__ uint4 halves(const float (&x)[kChannels], bool bf16) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = x[2 * i], high = x[2 * i + 1];
    words[i] = bf16 ? bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16
                    : f16_bits(low) | static_cast<uint32_t>(f16_bits(high)) << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// A tile of V's codes on its way to [channels][tokens]: words of four tokens, 16-byte chunks
// swizzled so that neighbouring threads, eight channels apart, write to different banks.
template <int kHeadDim>
struct TransposedTile {
  alignas(16) uint32_t words[kHeadDim][kTileKeys / 4];

  static __device__ int chunk(int channel, int chunk) { return chunk ^ (channel / kChannels & 3); }

  __device__ uint32_t& word(int channel, int index) {
    return words[channel][chunk(channel, index / 4) * 4 + index % 4];
  }

  // Copies the tile to columns [column, column + 64) of a matrix of rows `stride` bytes apart.
  __device__ void store(uint8_t* out, int64_t stride, int thread = static_cast<int>(threadIdx.x)) const {
    constexpr int kHalf = kHeadDim / 2;  // channels, a multiple of 32: chunks of both halves lie alike
    const uint32_t* const from = &words[thread / 4][chunk(thread / 4, thread % 4) * 4];
    uint8_t* const to = out + thread / 4 * stride + thread % 4 * 16;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    *reinterpret_cast<uint4*>(to + kHalf * stride) = *reinterpret_cast<const uint4*>(from + kHalf * (kTileKeys / 4));
  }
};

}  // namespace sage
