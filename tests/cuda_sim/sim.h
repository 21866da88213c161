// A host simulator of one CUDA block at a time: kernels compile as ordinary C++ against the shims
// in this folder (cuda_runtime.h, ptx/*.cuh) and run with every thread as a fiber.
//
// What it checks beyond results: warp-wide operations need all 32 lanes at the same operation;
// barriers need every thread; shared memory starts as NaN garbage; cp.async copies land only when
// their group is waited for; ldmatrix and cp.async addresses stay inside shared memory; a deadlock
// is reported with what each thread waits for; and the order in which threads run can be varied, so
// that a missing barrier shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace sim {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

struct Pending {  // one cp.async
  unsigned char* shared;
  const void* global;
  bool valid;
  int bytes;
};

// The running thread.
Index thread_index();
Index block_index();
Index block_shape();
Index grid_shape();
int lane();

// Stops the launch; cudaGetErrorString then returns this text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Every lane of the warp arrives with its operands; the last one runs `compute` for all of them.
void warp_collective(const char* name, void* operands, const std::function<void(void**)>& compute);

void barrier();

// Lets the other threads run until `ready` says true.
void wait_until(const char* name, const std::function<bool()>& ready);

unsigned char* shared_memory();
size_t shared_bytes();
// The shared memory at `address`, which must hold `bytes` bytes at a multiple of `alignment`.
unsigned char* shared_at(const char* name, uint32_t address, size_t bytes, size_t alignment);

void copy_later(const Pending& copy);
void commit_copies();
void finish_copies(int pending_groups);

// Runs `kernel` once per thread of the grid; false after fail().
bool run(const std::function<void()>& kernel, Index grid, Index block, size_t shared_bytes);
const char* error_text();

// Settings: thread order (0 ascending, 1 descending, else a random seed), and the architecture that
// the shim's cudaDeviceGetAttribute reports (80, 89, ...).
extern int schedule;
extern int architecture;
extern int launches;  // counted since the start

}  // namespace sim
