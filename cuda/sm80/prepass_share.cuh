// What the launches of the backward pre-pass (backward_prepass.cu) share: how their blocks divide the tokens of a head.
#pragma once

#include "common/tile.cuh"
#include "quantize/rows.cuh"
#include "sm80/backward.h"
#include "sm80/backward_workspace.h"

namespace sage::prepass {

inline constexpr int kTile = 64;  // tokens at once
inline constexpr int kPerThread = kTile / 16;

struct PrepassCall {
  BackwardCall p;
  int query_shares, key_shares;  // blocks of a launch that share a head's queries, its keys
};

// Tiles `first`, first + step, … of a head's `tiles`. Heads come first: blocks at work at the same time read whole rows of
// memory.
struct HeadShare {
  int head, batch, first, step, tiles;
  int64_t plane;
  __device__ HeadShare(int block, int heads, int shares, int tokens)
      : head(block % heads),
        batch(block / heads / shares),
        first(block / heads % shares),
        step(shares),
        tiles(tiles_of(tokens)),
        plane(static_cast<int64_t>(batch) * heads + head) {}
};

__device__ __forceinline__ uint2 load_codes(const int8_t* codes) {
  return *reinterpret_cast<const uint2*>(codes);
}

// Whether the key of this thread, whose codes are spread over `kLanes` lanes, holds a NaN or Inf: its first code tells.
template <int kLanes>
__device__ __forceinline__ bool bad_key(uint2 codes) {
  const uint32_t first = __shfl_sync(kFullWarp, codes.x, static_cast<int>(threadIdx.x) % kWarpSize / kLanes * kLanes);
  return static_cast<int8_t>(first & 0xff) == kBadCode;
}

// Eight INT8 codes as floats: code + 128 in the low byte of 2^23. A conversion has a quarter of the rate.
__device__ __forceinline__ void unpack_codes(float (&x)[kChannels], uint2 codes) {
  const uint32_t shifted[2] = {codes.x ^ 0x80808080u, codes.y ^ 0x80808080u};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    x[c] = bits_float(ptx::prmt(shifted[c / 4], 0x4b000000u, 0x7540u + c % 4)) - 8388736.0f;
  }
}

}  // namespace sage::prepass
