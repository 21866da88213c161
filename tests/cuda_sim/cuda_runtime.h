// The part of cuda_runtime.h that the kernels use, for the host simulator (sim.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "sim.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define __align__(n) __attribute__((aligned(n)))
// nvcc takes `__shared__ alignas(16) float x`, where g++ wants alignas before static; an attribute
// may stand in either place.
#define alignas(n) __attribute__((aligned(n)))

using std::isfinite;
using std::isnan;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// threadIdx and its kin: objects whose members ask the simulator when they are read.
namespace sim {
template <Index (*kIndex)(), unsigned Index::* kMember>
struct Coordinate {
  operator unsigned() const { return kIndex().*kMember; }
};
template <Index (*kIndex)()>
struct Coordinates {
  Coordinate<kIndex, &Index::x> x;
  Coordinate<kIndex, &Index::y> y;
  Coordinate<kIndex, &Index::z> z;
};
}  // namespace sim
inline sim::Coordinates<sim::thread_index> threadIdx;
inline sim::Coordinates<sim::block_index> blockIdx;
inline sim::Coordinates<sim::block_shape> blockDim;
inline sim::Coordinates<sim::grid_shape> gridDim;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __int_as_float(int x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}

inline void __syncthreads() { sim::barrier(); }
inline void __syncwarp(unsigned = ~0u) {
  sim::warp_collective("__syncwarp", nullptr, [](void**) {});
}

namespace sim {
inline void require_full_warp(unsigned mask) {
  if (mask != 0xffffffffu)
    fail("the simulator knows warp operations of all lanes only, not mask %x", mask);
}

template <class T, class Source>
T shuffle(const char* name, unsigned mask, T value, Source source) {
  require_full_warp(mask);
  struct Operands {
    T in, out;
  } mine = {value, value};
  warp_collective(name, &mine, [&](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      const int from = source(i);
      auto* to = static_cast<Operands*>(lanes[i]);
      to->out = static_cast<Operands*>(lanes[from < 0 || from > 31 ? i : from])->in;
    }
  });
  return mine.out;
}

template <class T, class Merge>
T reduce(const char* name, unsigned mask, T value, Merge merge) {
  require_full_warp(mask);
  warp_collective(name, &value, [&](void** lanes) {
    T total = *static_cast<T*>(lanes[0]);
    for (int i = 1; i < 32; ++i) total = merge(total, *static_cast<T*>(lanes[i]));
    for (int i = 0; i < 32; ++i) *static_cast<T*>(lanes[i]) = total;
  });
  return value;
}
}  // namespace sim

template <class T>
T __shfl_xor_sync(unsigned mask, T v, int step) {
  return sim::shuffle("__shfl_xor_sync", mask, v, [=](int i) { return i ^ step; });
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  // Lanes may name different sources: gather each lane's wish first.
  struct Wish {
    T v;
    int source;
  } wish = {v, source & (width - 1)};
  sim::require_full_warp(mask);
  struct Operands {
    Wish in;
    T out;
  } mine = {wish, v};
  sim::warp_collective("__shfl_sync", &mine, [=](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<Operands*>(lanes[i]);
      to->out = static_cast<Operands*>(lanes[(i & ~(width - 1)) | to->in.source])->in.v;
    }
  });
  return mine.out;
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int step) {
  return sim::shuffle("__shfl_down_sync", mask, v, [=](int i) { return i + step; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int step) {
  return sim::shuffle("__shfl_up_sync", mask, v, [=](int i) { return i - step; });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Operands {
    int in;
    unsigned out;
  } mine = {predicate, 0};
  sim::require_full_warp(mask);
  sim::warp_collective("__ballot_sync", &mine, [](void** lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= (static_cast<Operands*>(lanes[i])->in != 0 ? 1u : 0u) << i;
    for (int i = 0; i < 32; ++i) static_cast<Operands*>(lanes[i])->out = bits;
  });
  return mine.out;
}
template <class Half, class Pick>
unsigned pick_halves(unsigned a, unsigned b, Pick pick) {
  unsigned r = 0;
  for (int i = 0; i < 32; i += 16) {
    const Half picked = pick(static_cast<Half>(a >> i), static_cast<Half>(b >> i));
    r |= static_cast<unsigned>(static_cast<uint16_t>(picked)) << i;
  }
  return r;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return pick_halves<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x > y ? x : y; });
}
inline unsigned __vmaxs2(unsigned a, unsigned b) {
  return pick_halves<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y ? x : y; });
}
inline unsigned __vmins2(unsigned a, unsigned b) {
  return pick_halves<int16_t>(a, b, [](int16_t x, int16_t y) { return x < y ? x : y; });
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}
inline int __syncthreads_or(int predicate) {
  static int result;
  __syncthreads();
  result = 0;
  __syncthreads();
  result |= predicate != 0;
  __syncthreads();
  return result;
}

template <class T>
T atomicAdd(T* p, T v) {
  T old = *p;
  *p += v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  T old = *p;
  *p = std::min(old, v);
  return old;
}

// Runtime API.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorLaunchFailure = 719;
constexpr cudaError_t cudaErrorNoKernelImageForDevice = 209;
constexpr cudaError_t cudaErrorInvalidDeviceFunction = 98;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available for the device"
                                                  : sim::error_text();
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorLaunchFailure;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 3
           : attribute == cudaDevAttrComputeCapabilityMajor ? sim::architecture / 10
                                                            : sim::architecture % 10;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Params),
                               const std::remove_reference_t<Params>& params) {
  const auto index = [](const dim3& d) { return sim::Index{d.x, d.y, d.z}; };
  const bool done =
      sim::run([&] { kernel(params); }, index(c->gridDim), index(c->blockDim), c->dynamicSmemBytes);
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}
