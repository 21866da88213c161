// What the quantisers of keys and values share: a block's tile of 64 tokens, and its reads of them. Params
// is QuantizeKvParams or QuantizeKvFp4Params.
#pragma once

#include "quantize/rows.cuh"

namespace sage {

inline constexpr int kPerThread = kTileKeys / 16;  // tokens a thread holds

// The (batch, key head) whose tokens a block reads, and its share of them. Heads come first: blocks at work at the same
// time read whole rows of memory.
struct PlaneIndex {
  int share, tiles, b, valid;
  int64_t plane;

  // `shares` blocks share a plane.
  template <class Params>
  __device__ PlaneIndex(const Params& p, int block, int shares) {
    tiles = (p.shape.keys + kTileKeys - 1) / kTileKeys;
    const int head = block % p.shape.kv_heads;
    share = block / p.shape.kv_heads % shares;
    b = block / p.shape.kv_heads / shares;
    valid = min(p.bounds[3 * static_cast<int64_t>(b) + 1], p.shape.keys);
    plane = static_cast<int64_t>(b) * p.shape.kv_heads + head;
  }
};

// Which four of a tile's tokens a thread holds: `first`, and others at distances that the compiler knows.
struct EverySixteenth {
  int first;
  static __device__ constexpr int distance(int i) { return 16 * i; }
};
// The words of V's codes: the order `pi` in groups of 16 (docs/abi.md). Of rows 0 to 15 of a block.
struct PiOrder {
  int first;
  __device__ PiOrder(int tile, int row) : first(tile * kTileKeys + row / 4 * 16 + row % 4 * 2) {}
  static __device__ constexpr int distance(int i) { return i % 2 + i / 2 * 8; }
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

// Starts to read the thread's first kCount tokens of K or V.
template <int kCount, class Piece, class Tokens>
__device__ __forceinline__ void read_tokens(Piece (&pieces)[kCount], const void* tensor, Dtype dtype, const PlaneIndex& at,
                                            Tokens tokens, int channel, const AttentionShape& shape) {
  // Found anew for each tile: what is remembered takes registers.
  const int b = ptx::opaque(at.b), head = ptx::opaque(static_cast<int>(at.plane)) - b * shape.kv_heads;
  const int stride = shape.kv_heads * shape.head_dim;  // from a token to the next, in elements
  const int64_t first = (static_cast<int64_t>(b) * shape.keys + tokens.first) * stride + head * shape.head_dim;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    pieces[i].load(tensor, dtype, first + static_cast<unsigned>(Tokens::distance(i) * stride), channel, shape.head_dim,
                   Tokens::distance(i) < at.valid - tokens.first);
  }
}

// Eight channels of a thread's tokens of K and V. `used` tokens are valid and finite; others read as
// zero.
template <class Piece>
struct TokenPairs {
  Piece k[kPerThread], v[kPerThread];
  bool used[kPerThread];
  uint32_t bad = 0;  // bit i: token i is valid, but not finite

  TokenPairs() = default;

  template <class Rows, class Params, class Tokens>
  __device__ __forceinline__ TokenPairs(Rows rows, const Params& p, const PlaneIndex& at, Tokens tokens) {
    load(p, at, tokens, Rows::channel());
    check(rows, at, tokens);
  }

  // Starts to read.
  template <class Params, class Tokens>
  __device__ __forceinline__ void load(const Params& p, const PlaneIndex& at, Tokens tokens, int channel) {
    load_keys(p, at, tokens, channel);
    load_values(p, at, tokens, channel);
  }
  template <class Params, class Tokens>
  __device__ __forceinline__ void load_keys(const Params& p, const PlaneIndex& at, Tokens tokens, int channel) {
    read_tokens(k, p.k, p.k_dtype, at, tokens, channel, p.shape);
  }
  template <class Params, class Tokens>
  __device__ __forceinline__ void load_values(const Params& p, const PlaneIndex& at, Tokens tokens, int channel) {
    read_tokens(v, p.v, p.v_dtype, at, tokens, channel, p.shape);
  }

  // Reads the values once more, after a check, where they did not find room in registers.
  template <class Params, class Tokens>
  __device__ __forceinline__ void read_again(const Params& p, const PlaneIndex& at, Tokens tokens, int channel) {
    load_values(p, at, tokens, channel);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (!used[i]) v[i].clear();
    }
  }

  // Waits for what is read, and looks at it.
  template <class Rows, class Tokens>
  __device__ __forceinline__ void check(Rows, const PlaneIndex& at, Tokens tokens) {
    const int left = at.valid - tokens.first;
    bad = 0;
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      largest = Piece::larger(largest, Piece::larger(k[i].magnitude(), v[i].magnitude()));
    }
    if (__all_sync(kFullWarp, Piece::finite(largest))) {  // as nearly always
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) used[i] = Tokens::distance(i) < left;  // others have been read as zeros
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const bool valid = Tokens::distance(i) < left;
      const bool finite =
          whole_token<Rows::kThreadsPerToken>(Piece::finite(Piece::larger(k[i].magnitude(), v[i].magnitude())));
      used[i] = valid && finite;
      bad |= valid && !finite ? 1u << i : 0u;
      if (!used[i]) {
        k[i].clear();
        v[i].clear();
      }
    }
  }
};

}  // namespace sage
