// Tiles of shared memory: rows of bytes whose 16-byte chunks are swizzled so that the eight rows an
// ldmatrix reads, and the eight chunks a row is written with, fall into different banks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"

namespace sage {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;
inline constexpr int kChunkBytes = 16;

// kRows rows of kRowBytes bytes. The tile starts at a multiple of 128 bytes.
template <int kRows, int kRowBytes>
struct SharedTile {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes % 128 == 0,
                "the swizzle knows rows of 32, 64 and 128·n");
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kBytes = kRows * kRowBytes;

  // Where chunk `chunk` of row `row` lies. Two rows of 64 bytes, or four of 32, share the 128 bytes of all
  // banks.
  static __device__ __forceinline__ int offset(int row, int chunk) {
    // The part of `chunk` that is not twisted stands apart: it becomes an immediate of the access.
    return row * kRowBytes + (chunk & ~7) * kChunkBytes + (((chunk & 7) ^ twist(row)) * kChunkBytes);
  }
  static __device__ __forceinline__ constexpr int twist(int row) {
    return kRowBytes == 32 ? (row >> 2) & 1 : kRowBytes == 64 ? (row >> 1) & 3 : row & 7;
  }

  // Starts the copies of the whole tile from rows `stride` bytes apart (all rows within 2^32
  // bytes); rows from `valid_rows` on become zero. All kThreads threads of the block take part.
  template <int kThreads>
  static __device__ __forceinline__ void copy(uint32_t tile, const void* global, uint32_t stride,
                                              int valid_rows, int thread = threadIdx.x) {
    static_assert(kThreads % kChunks == 0, "a thread copies the same column of every row it meets");
    constexpr int kRowsAtOnce = kThreads / kChunks;
    static_assert(kRows % kRowsAtOnce == 0, "every thread copies as many chunks");
    const int first = thread / kChunks, chunk = thread % kChunks;
    const auto* source =
        static_cast<const unsigned char*>(global) + first * stride + chunk * kChunkBytes;
    const uint32_t target = tile + offset(first, chunk);
#pragma unroll
    for (int i = 0; i < kRows / kRowsAtOnce; ++i, source += kRowsAtOnce * stride) {
      const int row = i * kRowsAtOnce;
      const int moved = kRowsAtOnce % 8 == 0 ? row * kRowBytes  // the twist repeats every 8 rows
                                             : offset(first + row, chunk) - offset(first, chunk);
      ptx::cp_async_16(target + moved, source, first + row < valid_rows);
    }
  }

  // The same where each row begins right behind the one before. A loop of its own: one for both spills registers in six
  // kernels of sm_89 and sm_120.
  template <int kThreads>
  static __device__ __forceinline__ void copy_run(uint32_t tile, const void* global, int valid_rows,
                                                  int thread = threadIdx.x) {
    static_assert(kThreads % kChunks == 0 && kRows * kChunks % kThreads == 0,
                  "a thread copies the same column of every row it meets, every thread as many");
    constexpr int kRowsAtOnce = kThreads / kChunks;
    const int first = thread / kChunks, chunk = thread % kChunks;
    const auto* const source = static_cast<const unsigned char*>(global) + thread * kChunkBytes;
    const uint32_t target = tile + offset(first, chunk);
    const int valid = valid_rows - first;
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsAtOnce) {
      const int moved = kRowsAtOnce % 8 == 0 ? row * kRowBytes
                                             : offset(first + row, chunk) - offset(first, chunk);
      ptx::cp_async_16(target + moved, source + row * kRowBytes, row < valid);
    }
  }

  // The address of chunk `c` of row `r`, moved down by 8·n rows and right by `chunk` chunks, where
  // `chunk` and `c` share no bit. Written so that all loads of a tile share one register that
  // depends on the lane: the twist and `chunk` are both exclusive-or, and `tile` leaves their bits
  // alone.
  static __device__ __forceinline__ uint32_t address(uint32_t tile, int row, int chunk, int r,
                                                     int c) {
    constexpr int kSpan = kChunks < 8 ? kChunks : 8;  // chunks that the twist permutes
    return ((tile + offset(r, c)) ^ (chunk % kSpan * kChunkBytes)) + row * kRowBytes +
           chunk / kSpan * kSpan * kChunkBytes;
  }

  // A operands of 8-bit products, for rows [row, row + 16) and k = bytes [32·step, 32·step + 32).
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row,
                                                int step) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, matrix = lane / 8;
    ptx::ldmatrix_x4(a, address(tile, row, 2 * step, matrix % 2 * 8 + lane % 8, matrix / 2));
  }

  // B operands of 8-bit products, for columns = rows [row, row + 16) of the tile and k = bytes
  // [32·step, 32·step + 32): b[0], b[1] for the first eight, b[2], b[3] for the others. row = 8·n.
  static __device__ __forceinline__ void load_b16(uint32_t (&b)[4], uint32_t tile, int row,
                                                  int step) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, matrix = lane / 8;
    ptx::ldmatrix_x4(b, address(tile, row, 2 * step, matrix / 2 * 8 + lane % 8, matrix % 2));
  }

  // The same with the rows of [row, row + 32) in the order that leaves the columns 8t .. 8t + 7 of a row to
  // lane 4g + t: column c of eight, of the tile's `pair`-th 16 columns, is row 8·(c/2) + 2·n + c%2 for the
  // n-th eight of the 32 (SageAttention3, arXiv 2505.11594, section 3.4). pair = 0 or 1, row = 32·n.
  static __device__ __forceinline__ void load_b16_interleaved(uint32_t (&b)[4], uint32_t tile,
                                                              int row, int pair, int step) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, matrix = lane / 8, c = lane % 8;
    const int from = c / 2 * 8 + c % 2 + matrix / 2 * 2;  // and 4·pair
    // The twist of row `from` + 4·pair, as offset() has it, in two parts of which one depends on the lane.
    const int twist = kRowBytes == 32 ? 0 : kRowBytes == 64 ? matrix / 2 : c % 2 + matrix / 2 * 2;
    const int moved = 2 * step ^ (kRowBytes == 32 ? pair : kRowBytes == 64 ? 2 * pair : 4 * pair);
    const int chunk = matrix % 2 ^ twist;
    // In rows of 64 bytes the parts share no bit: all loads of a tile share one register.
    const int place = kRowBytes == 64 ? chunk + moved : chunk ^ moved;
    ptx::ldmatrix_x4(b, tile + from * kRowBytes + place * kChunkBytes + (row + 4 * pair) * kRowBytes);
  }

  // The same for columns [row, row + 8) and k = bytes [64·half, 64·half + 64): b[0], b[1] for the
  // first 32 bytes, b[2], b[3] for the others.
  static __device__ __forceinline__ void load_b8(uint32_t (&b)[4], uint32_t tile, int row,
                                                 int half) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, matrix = lane / 8;
    ptx::ldmatrix_x4(b, address(tile, row, 4 * half, lane % 8, matrix));
  }

  // B operands of 16-bit products from a tile whose rows are k: k = rows [row, row + 16), columns
  // [8·chunk, 8·chunk + 16): b[0], b[1] for the first eight, b[2], b[3] for the others.
  // row = 8·n, chunk = 2·n.
  static __device__ __forceinline__ void load_b16_transposed(uint32_t (&b)[4], uint32_t tile,
                                                             int row, int chunk) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, matrix = lane / 8;
    ptx::ldmatrix_x4_trans(b, address(tile, row, chunk, matrix % 2 * 8 + lane % 8, matrix / 2));
  }
};

// x in shared memory, read by lane 0 for the whole warp: by the lane that will say that the warp has done with it.
template <class T>
__device__ __forceinline__ T from_lane_0(const T& x) {
  T y = 0;
  if (threadIdx.x % kWarpSize == 0) y = x;
  return __shfl_sync(kFullWarp, y, 0);
}

// The largest value among the four lanes that hold one row of an accumulator, and the sum.
template <class T>
__device__ __forceinline__ T quad_max(T x) {
  x = max(x, __shfl_xor_sync(kFullWarp, x, 1));
  return max(x, __shfl_xor_sync(kFullWarp, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

}  // namespace sage
