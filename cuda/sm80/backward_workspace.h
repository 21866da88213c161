// Scratch memory of the backward pass: the rows of sage_jax/_workspace.py, attend_backward_rows, each
// at a multiple of 256 bytes, then the mask summaries (common/mask.cuh).
#pragma once

#include "common/params.h"
#include "numerics/host_device.h"

namespace sage {

inline constexpr int kTileQueries = 64;  // queries that a block walks over at a time

// What the backward pass knows of a query before it meets a key. With s and d the dequantized-but-
// for-these-factors products Q·K and dO·V, a pair's probability and gradient are
//   e = 2^(s·score + shift),   e·(d·gain + offset).
struct alignas(16) QueryTerms {
  float score;   // q_scale · c · log2 e
  float shift;   // −m, train8: 8 − m (so that e comes out times 256); −inf for dead queries
  float gain;    // train8: dO's scale / r; sagebwd: 1/l
  float offset;  // train8: −D/r; sagebwd: −D/l
};

struct TileScales {  // of 64 queries
  float d_out, q;
};

struct BackwardWorkspace {
  QueryTerms* terms;      // [B, N, Tp]
  float* row_factor;      // [B, N, Tp]: what dQ's sum is multiplied by, besides its channel scale
  void* d_out;            // [B, N, Tp, Hp] s8 or bf16
  TileScales* scales;     // [B, N, T64], sagebwd
  uint8_t* x;             // [B, N, Hp, Tp] 8-bit operand of dV
  uint8_t* y;             // [B, N, Hp, Tp] of dK
  uint8_t* z;             // [B, K, Hp, Sp] of dQ
  float* x_max;           // [B, K, Hp] largest magnitude of each channel
  float* y_max;           // [B, K, Hp]
  uint32_t* taken;        // [3] blocks of keys that are taken, besides those dealt out; of queries, or pieces of heads by finish_dq;
                          //   of queries for D alone
  uint32_t* cleared;      // [B, K] blocks of keys that have cleared their share of the head's dQ
  uint32_t* added;        // [B, K] how often a warp has added its share of a block of keys to it
  int64_t counters;       // from x_max to the last of `added`: what is zero before the pass
  void* masks;            // mask summaries
  size_t bytes;
};

SAGE_HOST_DEVICE int tiles_of(int tokens) { return (tokens + 63) / 64; }

SAGE_HOST_DEVICE BackwardWorkspace backward_workspace(const BackwardParams& p) {
  const AttentionShape& s = p.shape;
  const int64_t Tp = 64 * static_cast<int64_t>(tiles_of(s.queries));
  const int64_t Sp = 64 * static_cast<int64_t>(tiles_of(s.keys)), Hp = s.padded_dim;
  const int64_t queries = s.batch * static_cast<int64_t>(s.heads) * Tp;
  const int64_t kv = s.batch * static_cast<int64_t>(s.kv_heads);
  auto* base = static_cast<unsigned char*>(p.workspace);
  size_t used = 0;
  const auto row = [&](int64_t bytes) {
    unsigned char* start = base + used;
    used += (static_cast<size_t>(bytes) + 255) / 256 * 256;
    return start;
  };
  BackwardWorkspace w;
  w.terms = reinterpret_cast<QueryTerms*>(row(queries * static_cast<int64_t>(sizeof(QueryTerms))));
  w.row_factor = reinterpret_cast<float*>(row(queries * 4));
  w.d_out = row(queries * Hp * (p.dp == DpFormat::kInt8 ? 1 : 2));
  w.scales = reinterpret_cast<TileScales*>(row(queries / 64 * 8));
  w.x = row(queries * Hp);
  w.y = row(queries * Hp);
  w.z = row(kv * Hp * Sp);
  w.x_max = reinterpret_cast<float*>(row((2 * kv * Hp + 2 * kv + 3) * 4));
  w.y_max = w.x_max + kv * Hp;
  w.taken = reinterpret_cast<uint32_t*>(w.y_max + kv * Hp);
  w.cleared = w.taken + 3;
  w.added = w.cleared + kv;
  w.counters = 2 * kv * Hp + 2 * kv + 3;
  w.masks = base + used;
  w.bytes = used;
  return w;
}

// What every kernel of the backward pass takes. The host finds the places: as kernel parameters the
// pointers cost no registers.
struct BackwardCall : BackwardParams {
  BackwardWorkspace w;
  // dQ comes beside dK and dV (sm90/backward_dq_sums.cuh), and the keys of z in the order for that. Of the heads of keys the
  // first `cleared_heads` have their dQ cleared by the pre-pass.
  bool adds_dq;
  int cleared_heads;
  explicit BackwardCall(const BackwardParams& params)
      : BackwardParams(params), w(backward_workspace(params)), adds_dq(false), cleared_heads(0) {}
};

}  // namespace sage
