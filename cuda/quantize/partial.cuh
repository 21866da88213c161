// What the blocks that write the codes of keys and values have seen of them, and hand on to the launch after them.
#pragma once

#include "numerics/e4m3.h"
#include "quantize/key_tiles.cuh"

namespace sage {

inline constexpr int kBlockChannels = 256 * 128;  // of all blocks: two blocks on each of 128 multiprocessors

// Blocks that share the tiles of a (batch, key head): j of G takes tiles j, j + G, j + 2G, ... G depends on the shape alone,
// because it sizes the workspace.
__host__ __device__ inline int blocks_of_plane(const AttentionShape& s) {
  const int tiles = (s.keys + kTileKeys - 1) / kTileKeys;
  const int64_t channels = static_cast<int64_t>(s.batch) * s.kv_heads * s.padded_dim;
  return max(1, static_cast<int>(min(static_cast<int64_t>(tiles), kBlockChannels / max(channels, int64_t{1}))));
}

// What the blocks of the first launch hand on.
struct Partial {
  float* value_max;  // [B, K, G, Hp] the largest |V|, in e4m3 |V - mean|, where `exceeded`
  float* key_max;    // [B, K, G, Hp] with dp: the largest |K̂|
  float* norm;       // [B, K, G] with dp: the largest norm of a row of v_dp
  int* exceeded;     // [B, K, G] whether a value may be larger than what its channel's scale is for

  __host__ __device__ Partial(const AttentionShape& s, void* workspace) {
    const int64_t rows = static_cast<int64_t>(s.batch) * s.kv_heads * blocks_of_plane(s);
    value_max = static_cast<float*>(workspace);
    key_max = value_max + rows * s.padded_dim;
    norm = key_max + rows * s.padded_dim;
    exceeded = reinterpret_cast<int*>(norm + rows);
  }
  static size_t bytes(const AttentionShape& s) {
    const size_t rows = static_cast<size_t>(s.batch) * s.kv_heads * blocks_of_plane(s);
    return rows * (2 * sizeof(float) * s.padded_dim + sizeof(float) + sizeof(int));
  }
};

// What the backward pass scales its operands by: of the keys that a thread has seen the largest |K̂| of its channels, and the
// largest norm of a row of v_dp: of all rows of a warp, each lane has seen some. For the whole plane they are k_max and
// v_norm. In shared memory, because registers are few.
template <int kThreads>
struct LargestKeys {
  float4 channels[2][kThreads];
  float norms[kThreads];

  __device__ __forceinline__ void clear() {
    channels[0][threadIdx.x] = channels[1][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    norms[threadIdx.x] = 0.0f;
  }
  __device__ __forceinline__ void add_norm(float x) {
    float& norm = norms[ptx::opaque_thread()];
    norm = fmaxf(norm, x);
  }

  // Rounding keeps order: the largest code is that of the largest magnitude.
  __device__ __forceinline__ void add_keys(const float (&x)[kPerThread][kChannels], const GroupScale& scale) {
    const auto larger = [&](float seen, int c) {
      const float largest = fmaxf(fmaxf(fabsf(x[0][c]), fabsf(x[1][c])), fmaxf(fabsf(x[2][c]), fabsf(x[3][c])));
      return fmaxf(seen, nearest_integer(__fmul_rn(largest, scale.inverse)) * scale.scale);
    };
#pragma unroll
    for (int c = 0; c < kChannels; c += 4) {
      float4& most = channels[c / 4][ptx::opaque_thread()];
      most = make_float4(larger(most.x, c), larger(most.y, c + 1), larger(most.z, c + 2), larger(most.w, c + 3));
    }
  }
  __device__ __forceinline__ void channel_maxima(float (&most)[kChannels]) const {
    const float4 low = channels[0][threadIdx.x], high = channels[1][threadIdx.x];
    most[0] = low.x, most[1] = low.y, most[2] = low.z, most[3] = low.w;
    most[4] = high.x, most[5] = high.y, most[6] = high.z, most[7] = high.w;
  }
  template <int kLanes>
  __device__ __forceinline__ void add_values(const uint2 (&codes)[kPerThread], float scale) {
    float squares[kPerThread];  // below 2^22: exact
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int x = static_cast<int>(codes[i].x), y = static_cast<int>(codes[i].y);
      squares[i] = static_cast<float>(__dp4a(x, x, __dp4a(y, y, 0)));
    }
    add_norm(sqrtf(combine_lanes<kLanes>(squares, Add())) * scale);
  }
  // A token in bf16. Squares are taken relative to the largest entry, so that those of tiny values do not underflow.
  template <int kLanes>
  __device__ __forceinline__ void add_values(const uint4& words) {
    Piece<Dtype::kBf16> piece;
    piece.words = words;
    float x[kChannels];
    piece.unpack(x);
    const float largest = lanes_max<kLanes>(largest_magnitude(x));
    const float inverse = largest < kTinyAmax ? 0.0f : 1.0f / largest;
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sum = fmaf(x[c] * inverse, x[c] * inverse, sum);
    add_norm(largest * sqrtf(lanes_sum<kLanes>(sum)));
  }
};

// Where values may be larger than what their channels' scales are for: the largest of each channel, in shared memory.
template <int kHeadDim>
struct ExceededValues {
  uint32_t (&largest)[kHeadDim];
  uint32_t add;  // makes the highest bit of a code's byte 1 if the code is as large as that of the range, which is rounded down

  __device__ __forceinline__ ExceededValues(uint32_t (&shared)[kHeadDim], float range)
      : largest(shared), add((0x80u - e4m3_code(range * 0.999f)) * 0x01010101u) {}
  __device__ __forceinline__ void note(int channel, float magnitude) { atomicMax(&largest[channel], float_bits(magnitude)); }
  __device__ __forceinline__ bool holds(uint32_t codes) const { return (((codes & 0x7f7f7f7fu) + add) & 0x80808080u) != 0; }
};

}  // namespace sage
