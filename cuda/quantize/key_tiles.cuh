// What the quantisers of keys and values share: a block's tile of 64 tokens, and its reads of them. Params
// is QuantizeKvParams or QuantizeKvFp4Params.
#pragma once

#include "quantize/rows.cuh"

namespace sage {

inline constexpr int kPerThread = kTileKeys / 16;  // tokens a thread holds

// The (batch, key head) whose tokens a block reads, and its share of them. Heads come first: blocks at work at the same
// time read whole rows of memory.
struct PlaneIndex {
  int share, tiles, head, b, valid;
  int64_t plane;

  // `shares` blocks share a plane.
  template <class Params>
  __device__ PlaneIndex(const Params& p, int block, int shares) {
    tiles = (p.shape.keys + kTileKeys - 1) / kTileKeys;
    head = block % p.shape.kv_heads;
    share = block / p.shape.kv_heads % shares;
    b = block / p.shape.kv_heads / shares;
    valid = min(p.bounds[3 * static_cast<int64_t>(b) + 1], p.shape.keys);
    plane = static_cast<int64_t>(b) * p.shape.kv_heads + head;
  }
};

// A block's tile of 64 tokens. The launch that reads a second time goes backwards: what the first has read last may
// still lie in the L2 cache.
struct TileIndex : PlaneIndex {
  int tile;

  template <class Params>
  __device__ TileIndex(const Params& p, bool backwards)
      : PlaneIndex(p, static_cast<int>(backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x),
                   (p.shape.keys + kTileKeys - 1) / kTileKeys),
        tile(share) {}
};

// Eight channels of a thread's tokens of K and V. `used` tokens are valid and finite; others read as
// zero.
template <class Piece>
struct TokenPairs {
  Piece k[kPerThread], v[kPerThread];
  bool used[kPerThread];
  uint32_t bad = 0;  // bit i: token i is valid, but not finite

  TokenPairs() = default;

  template <class Rows, class Params, class Token>
  __device__ __forceinline__ TokenPairs(Rows rows, const Params& p, const PlaneIndex& at, Token token) {
    load(rows, p, at, token);
    check(rows, at, token);
  }

  // Starts to read.
  template <class Rows, class Params, class Token>
  __device__ __forceinline__ void load(Rows, const Params& p, const PlaneIndex& at, Token token) {
    const AttentionShape& s = p.shape;
    const int64_t stride = static_cast<int64_t>(s.kv_heads) * s.head_dim;
    const int64_t plane = static_cast<int64_t>(at.b) * s.keys * stride + at.head * s.head_dim;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      k[i] = Piece();
      v[i] = Piece();
      if (token(i) >= at.valid) continue;
      k[i].load(p.k, p.k_dtype, plane + token(i) * stride, Rows::channel(), s.head_dim);
      v[i].load(p.v, p.v_dtype, plane + token(i) * stride, Rows::channel(), s.head_dim);
    }
  }

  // Waits for what is read, and looks at it.
  template <class Rows, class Token>
  __device__ __forceinline__ void check(Rows, const PlaneIndex& at, Token token) {
    bad = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const bool valid = token(i) < at.valid;
      const bool finite =
          whole_token<Rows::kThreadsPerToken>(!valid || (k[i].finite() && v[i].finite()));
      used[i] = valid && finite;
      bad |= valid && !finite ? 1u << i : 0u;
    }
  }

  __device__ __forceinline__ void unpack(const Piece& piece, int i, float (&x)[kChannels]) const {
    piece.unpack(x);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) x[c] = used[i] ? x[c] : 0.0f;
  }
};

}  // namespace sage
