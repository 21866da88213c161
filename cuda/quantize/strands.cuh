// Means of K and V and maxima of V over the sequence, the first launch of quantize_kv.cu. Of many keys a sample counts.
//
// The tiles of a (batch, key head) are shared out in strands: strand j of G takes tiles j, j + G, j + 2G, ... The sum
// over tiles, which docs/abi.md defines as halving (the upper half is added to the lower, again and again), adds tiles
// that are G apart before it adds strands: a strand is a subtree. A block walks over one strand, in the order in which
// a depth-first walk meets the subtree's leaves, and keeps one partial sum a level; the second launch adds the strands.
#pragma once

#include "ptx/shared.cuh"
#include "quantize/key_tiles.cuh"

namespace sage {

inline constexpr int kMostStrands = 16;
inline constexpr int kStrandChannels = 256 * 128;  // of all strands: two blocks on each of 128 multiprocessors
inline constexpr int kLevels = 16;                 // of a strand's subtree: at least 2^22 tokens

__host__ __device__ inline int tiles_of_keys(const AttentionShape& s) {
  return (s.keys + kTileKeys - 1) / kTileKeys;
}

// G, a power of two and at most the number of tiles.
__host__ __device__ inline int strands(const AttentionShape& s) {
  const int64_t planes = static_cast<int64_t>(s.batch) * s.kv_heads;
  int count = 1;
  while (count < kMostStrands && 2 * count <= tiles_of_keys(s) &&
         planes * 2 * count * s.padded_dim <= kStrandChannels) {
    count *= 2;
  }
  return count;
}

// The keys whose mean K loses: all of them or, of many, sixteen of each 128 (docs/abi.md): of one tile of two.
enum class Keys { kAll, kSample };

__host__ __device__ inline Keys counted_keys(const AttentionShape& s) { return s.keys < 1024 ? Keys::kAll : Keys::kSample; }

// Where the tile's keys that count begin, from its first key on; -1 if there are none.
template <Keys kKeys>
__device__ __forceinline__ int first_counted(int tile) {
  if (kKeys == Keys::kAll) return 0;
  const int pair = tile / 2, group = (pair + pair / 8) % 8;
  return group / 4 == tile % 2 ? group % 4 * 16 : -1;
}

// What the first launch hands on: a row a strand.
struct Statistics {
  float* key_sums;    // [B, K, G, Hp]
  float* value_sums;  // [B, K, G, Hp]
  float* value_max;   // [B, K, G, Hp]; -inf where no token counts
  float* value_min;   // [B, K, G, Hp]; inf where no token counts
  int* keys;          // [B, K, G] tokens counted
  int* values;        // [B, K, G]

  __host__ __device__ Statistics(const AttentionShape& s, void* workspace) {
    const int64_t rows = static_cast<int64_t>(s.batch) * s.kv_heads * strands(s);
    key_sums = static_cast<float*>(workspace);
    value_sums = key_sums + rows * s.padded_dim;
    value_max = value_sums + rows * s.padded_dim;
    value_min = value_max + rows * s.padded_dim;
    keys = reinterpret_cast<int*>(value_min + rows * s.padded_dim);
    values = keys + rows;
  }
  static size_t bytes(const AttentionShape& s) {
    const size_t rows = static_cast<size_t>(s.batch) * s.kv_heads * strands(s);
    return rows * (4 * sizeof(float) * s.padded_dim + 2 * sizeof(int));
  }
};

// The tiles of a strand in the order of the walk. Past the last tile there may be some that do not exist.
struct StrandWalk {
  int strand, strands, tiles, levels;

  __device__ StrandWalk(const PlaneIndex& at, int strand_count)
      : strand(at.share), strands(strand_count), tiles(at.tiles), levels(0) {
    while (strand_count << levels < tiles) ++levels;
  }
  __device__ int count() const { return 1 << levels; }
  __device__ int tile(int visit) const {
    return strand + strands * static_cast<int>(__brev(static_cast<unsigned>(visit)) >> 1 >> (31 - levels));
  }
};

// What a plane's maxima for the backward pass begin with, by kHeadDim threads or more.
__device__ __forceinline__ void clear_largest(const QuantizeKvParams& p, int64_t plane) {
  const int c = static_cast<int>(threadIdx.x);
  if (c < p.shape.padded_dim) p.k_max[plane * p.shape.padded_dim + c] = 0.0f;
  if (c == 0) p.v_norm[plane] = 0.0f;
}

template <int kHeadDim>
struct StrandShared {
  static constexpr int kWarps = 2 * kHeadDim / kWarpSize;
  // Of K and V; at the end largest and smallest V. Of one tile and the next in turns: a barrier a tile is enough.
  float rows[2][2][kWarps][kHeadDim];
  float partial[kLevels][2 * kHeadDim];    // sums of the walk
  int used[2][kWarps];
};

static_assert(sizeof(StrandShared<256>) <= 99 * 1024, "what an sm_89 or sm_120 offers a block");

// A thread's tokens of a tile, for their sums.
template <class Piece, Keys kKeys>
struct StrandTile {
  Piece k[kKeys == Keys::kAll ? kPerThread : 1], v[kPerThread];

  // Starts to read.
  __device__ __forceinline__ void load(const QuantizeKvParams& p, const PlaneIndex& at, int tile, int row, int channel) {
    const int first = tile * kTileKeys + row, counted = first_counted<kKeys>(tile);
    if (counted >= 0) read_tokens(k, p.k, p.k_dtype, at, EverySixteenth{first + counted}, channel, p.shape);
    read_tokens(v, p.v, p.v_dtype, at, EverySixteenth{first}, channel, p.shape);
  }
};

// Waits for the thread's tokens; makes those that are not finite zeros. Bit i: token i counts. Every lane takes part.
template <int kThreadsPerToken, class Piece, int kCount>
__device__ __forceinline__ uint32_t finite_tokens(Piece (&x)[kCount], int left) {
  uint32_t largest = 0, counts = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    largest = Piece::larger(largest, x[i].magnitude());
    counts |= EverySixteenth::distance(i) < left ? 1u << i : 0u;  // others have been read as zeros
  }
  if (__all_sync(kFullWarp, Piece::finite(largest))) return counts;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (whole_token<kThreadsPerToken>(x[i].finite())) continue;
    x[i].clear();
    counts &= ~(1u << i);
  }
  return counts;
}

template <int kHeadDim, class Piece, Keys kKeys>
__global__ void __launch_bounds__(2 * kHeadDim, 256 / kHeadDim) strand_statistics(const QuantizeKvParams p) {
  using Rows = RowBlock<kHeadDim>;
  constexpr int kWarps = StrandShared<kHeadDim>::kWarps;
  auto& shared = *reinterpret_cast<StrandShared<kHeadDim>*>(ptx::dynamic_shared());
  const int count = strands(p.shape);
  const PlaneIndex at(p, static_cast<int>(blockIdx.x), count);
  const StrandWalk walk(at, count);
  // A warp holds rows of 16 that halving adds first: 8 apart, then 4.
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int row = lane / Rows::kThreadsPerToken * kWarps + warp, channel = Rows::channel();
  const int c = static_cast<int>(threadIdx.x) % kHeadDim;  // two threads a channel
  const int tensor = static_cast<int>(threadIdx.x) / kHeadDim;
  int turn = 0;
  // Hands the rows of a warp, already combined, to the threads of their channels.
  const auto spread = [&](int to, float (&x)[kChannels], auto combine) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
#pragma unroll
      for (int step = kWarpSize / 2; step >= Rows::kThreadsPerToken; step /= 2) {
        x[i] = combine(x[i], __shfl_xor_sync(kFullWarp, x[i], step));
      }
    }
    if (lane < Rows::kThreadsPerToken) {
      auto* const out = reinterpret_cast<float4*>(&shared.rows[turn][to][warp][channel]);
      out[0] = make_float4(x[0], x[1], x[2], x[3]);
      out[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
  };

  typename Piece::Extremes extremes;
  float sum = 0.0f;
  int used[2] = {0, 0};
  using Tile = StrandTile<Piece, kKeys>;
  Tile next;
  const auto load = [&](Tile& x, int visit) {
    const int tile = visit < walk.count() ? walk.tile(visit) : at.tiles;
    if (tile < at.tiles) x.load(p, at, tile, ptx::opaque(row), ptx::opaque(channel));
  };
  if (Piece::kReadsAhead) load(next, 0);
#pragma unroll 1
  for (int visit = 0; visit < walk.count(); ++visit) {
    const int tile = walk.tile(visit);
    Tile x;
    if constexpr (Piece::kReadsAhead) {
      x = next;
      load(next, visit + 1);
    } else {
      load(x, visit);
    }
    sum = 0.0f;
    if (tile < at.tiles) {
      const int left = at.valid - tile * kTileKeys - row, of_keys = first_counted<kKeys>(tile);
      const auto add = [](float a, float b) { return a + b; };
      // Tokens row, row + 16, row + 32, row + 48: the first two halvings of the tile happen here.
      const auto sum_tokens = [&](int to, const auto& tokens) {
        constexpr int kCount = sizeof(tokens) / sizeof(Piece);
        float y[kCount][kChannels], four[kChannels];
#pragma unroll
        for (int i = 0; i < kCount; ++i) tokens[i].unpack(y[i]);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          if constexpr (kCount == 1) {
            four[i] = y[0][i] + 0.0f;  // the tile's other tokens
          } else {
            four[i] = (y[0][i] + y[2][i]) + (y[1][i] + y[3][i]);
          }
        }
        spread(to, four, add);
      };
      if (of_keys >= 0) {
        used[0] += __popc(finite_tokens<Rows::kThreadsPerToken>(x.k, left - of_keys));
        sum_tokens(0, x.k);
      }
      const uint32_t values = finite_tokens<Rows::kThreadsPerToken>(x.v, left);
      used[1] += __popc(values);
      sum_tokens(1, x.v);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (values >> i & 1) extremes.add(x.v[i]);
      }
      __syncthreads();
      if (tensor == 1 || of_keys >= 0) {
        float z[kWarps];
#pragma unroll
        for (int i = 0; i < kWarps; ++i) z[i] = shared.rows[turn][tensor][i][c];
#pragma unroll
        for (int half = kWarps / 2; half > 0; half /= 2) {
#pragma unroll
          for (int i = 0; i < half; ++i) z[i] += z[i + half];
        }
        sum = z[0];
      }
      turn ^= 1;
    }
    int level = 0;
    for (; visit >> level & 1; ++level) sum += shared.partial[level][threadIdx.x];
    if (visit + 1 < walk.count()) shared.partial[level][threadIdx.x] = sum;  // the last is of the whole strand
  }

  const Statistics out(p.shape, p.workspace);
  const int64_t to = at.plane * count + at.share;
  (tensor == 0 ? out.key_sums : out.value_sums)[to * kHeadDim + c] = sum;
  float largest[kChannels], smallest[kChannels];
  extremes.unpack(largest, smallest);
  spread(0, largest, [](float a, float b) { return fmaxf(a, b); });
  spread(1, smallest, [](float a, float b) { return fminf(a, b); });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int tokens = channel == 0 ? used[i] : 0;
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) tokens += __shfl_xor_sync(kFullWarp, tokens, step);
    if (lane == 0) shared.used[i][warp] = tokens;
  }
  __syncthreads();
  const auto& rows = shared.rows[turn];
  float extreme = rows[tensor][0][c];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) {
    extreme = tensor == 0 ? fmaxf(extreme, rows[tensor][i][c]) : fminf(extreme, rows[tensor][i][c]);
  }
  (tensor == 0 ? out.value_max : out.value_min)[to * kHeadDim + c] = extreme;
  if (c == 0) {
    int total = 0;
    for (int i = 0; i < kWarps; ++i) total += shared.used[tensor][i];
    (tensor == 0 ? out.keys : out.values)[to] = total;
  }
  if (p.dp != DpFormat::kNone && at.share == 0) clear_largest(p, at.plane);
}

// A channel of K or V over all strands of a plane.
struct ChannelStatistics {
  float mean = 0.0f;
  float largest = 0.0f;  // of V: |V|, in e4m3 |V - mean|

  ChannelStatistics() = default;
  __device__ ChannelStatistics(const QuantizeKvParams& p, int64_t plane, int channel, bool of_values) {
    const Statistics in(p.shape, p.workspace);
    const int count = strands(p.shape), width = p.shape.padded_dim;
    const int64_t first = plane * count * width + channel;
    const float* const from = (of_values ? in.value_sums : in.key_sums) + first;
    float sums[kMostStrands], most = -INFINITY, least = INFINITY;
    int used = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      used += (of_values ? in.values : in.keys)[plane * count + i];
      if (!of_values) continue;
      most = fmaxf(most, in.value_max[first + i * width]);
      least = fminf(least, in.value_min[first + i * width]);
    }
#pragma unroll
    for (int i = 0; i < kMostStrands; ++i) sums[i] = i < count ? from[i * width] : 0.0f;
#pragma unroll
    for (int half = kMostStrands / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) sums[i] = i + half < count ? sums[i] + sums[i + half] : sums[i];
    }
    if (of_values ? p.smooth_v : p.smooth_k) {
      mean = bf16_value(bf16_bits(sums[0] * (1.0f / static_cast<float>(max(used, 1)))));
    }
    if (of_values && kSmallMean * fabsf(mean) < fmaxf(most, -least)) mean = 0.0f;
    // Rounding keeps order: this is the largest of the rounded |v - mean|.
    const float removed = p.pv == PvFormat::kE4m3 ? mean : 0.0f;
    if (of_values) largest = fmaxf(0.0f, fmaxf(most - removed, removed - least));
  }
};

}  // namespace sage
