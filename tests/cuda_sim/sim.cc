#include "sim.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace sim {

int schedule = 0;
int architecture = 80;
int launches = 0;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kCanaryBytes = 4096;
constexpr unsigned char kCanary = 0xA5;
constexpr int kWarpSize = 32;

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started, done;
  Index index;
  int number;
  const char* waiting_for;
  std::vector<Pending> open;                 // issued since the last commit
  std::vector<std::vector<Pending>> groups;  // committed, oldest first
};

struct Warp {
  const char* operation;
  void* operands[kWarpSize];
  int arrived;
  uint64_t generation;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned char*> stacks;
std::vector<unsigned char> shared;
size_t shared_size = 0;
int barrier_arrived = 0;
uint64_t barrier_generation = 0;
uint64_t progress = 0;
const std::function<void()>* body = nullptr;
Fiber* current = nullptr;
Index current_block, block_dim, grid_dim;
jmp_buf scheduler;
bool failed = false;
std::string message;
uint64_t random_state = 1;

void yield(const char* waiting_for) {
  current->waiting_for = waiting_for;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void enter() {
  (*body)();
  current->done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  ++progress;
  setcontext(&fiber.context);
}

uint64_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

void order_threads(std::vector<int>& order) {
  const int n = static_cast<int>(order.size());
  for (int i = 0; i < n; ++i) order[i] = schedule == 1 ? n - 1 - i : i;
  if (schedule <= 1) return;
  for (int i = n - 1; i > 0; --i) std::swap(order[i], order[next_random() % (i + 1)]);
}

void report_deadlock() {
  for (const Fiber& f : fibers) {
    if (f.done) continue;
    for (const Fiber& other : fibers) {
      const bool differs = other.done || strcmp(other.waiting_for, f.waiting_for) != 0;
      if (!differs) continue;
      message = "deadlock in block " + std::to_string(current_block.x) + ": thread " +
                std::to_string(f.number) + " waits at " + f.waiting_for + ", thread " +
                std::to_string(other.number) +
                (other.done ? " has left the kernel" : " waits at ") +
                (other.done ? "" : other.waiting_for);
      failed = true;
      return;
    }
  }
  message = "deadlock: every thread waits at the same place";
  failed = true;
}

void run_block() {
  const int threads = static_cast<int>(fibers.size());
  // 0xFF bytes read as NaN in every float format and as -1 in integers.
  shared.assign(shared_size + kCanaryBytes, 0xFF);
  memset(shared.data() + shared_size, kCanary, kCanaryBytes);
  for (Warp& w : warps) w = Warp{};
  barrier_arrived = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.started = f.done = false;
    f.number = i;
    f.waiting_for = "the start";
    f.index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    f.open.clear();
    f.groups.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[i];
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  std::vector<int> order(threads);
  for (int alive = threads; alive > 0 && !failed;) {
    const uint64_t before = progress;
    order_threads(order);
    alive = 0;
    for (int i : order) {
      if (!fibers[i].done) resume(fibers[i]);
      if (failed) return;
      alive += !fibers[i].done;
    }
    if (alive > 0 && progress == before) report_deadlock();
  }
  if (failed) return;
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (shared[shared_size + i] == kCanary) continue;
    message = "write past the end of shared memory, at byte " + std::to_string(shared_size + i) +
              " of " + std::to_string(shared_size);
    failed = true;
    return;
  }
}

}  // namespace

Index thread_index() { return current->index; }
Index block_index() { return current_block; }
Index block_shape() { return block_dim; }
Index grid_shape() { return grid_dim; }
int lane() { return current->number % kWarpSize; }
unsigned char* shared_memory() { return shared.data(); }
size_t shared_bytes() { return shared_size; }
const char* error_text() { return message.c_str(); }

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = std::string(text) + " (block " + std::to_string(current_block.x) + ", thread " +
            std::to_string(current->number) + ")";
  failed = true;
  _longjmp(scheduler, 1);
}

void warp_collective(const char* name, void* operands, const std::function<void(void**)>& compute) {
  Warp& warp = warps[current->number / kWarpSize];
  if (warp.arrived == 0) warp.operation = name;
  if (strcmp(warp.operation, name) != 0) {
    fail("divergent warp: one lane at %s, another at %s", warp.operation, name);
  }
  warp.operands[lane()] = operands;
  if (++warp.arrived == kWarpSize) {
    compute(warp.operands);
    warp.arrived = 0;
    ++warp.generation;
    ++progress;
    return;
  }
  for (const uint64_t generation = warp.generation; warp.generation == generation;) yield(name);
}

void barrier() {
  if (++barrier_arrived == static_cast<int>(fibers.size())) {
    barrier_arrived = 0;
    ++barrier_generation;
    ++progress;
    return;
  }
  for (const uint64_t g = barrier_generation; barrier_generation == g;) yield("__syncthreads");
}

void wait_until(const char* name, const std::function<bool()>& ready) {
  while (!ready()) yield(name);
  ++progress;
}

unsigned char* shared_at(const char* name, uint32_t address, size_t bytes, size_t alignment) {
  if (address % alignment != 0)
    fail("%s at shared address %u, not a multiple of %zu", name, address, alignment);
  if (address + bytes > shared_size) {
    fail("%s at shared address %u, past the block's %zu bytes", name, address, shared_size);
  }
  return shared.data() + address;
}

void copy_later(const Pending& copy) { current->open.push_back(copy); }

void commit_copies() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void finish_copies(int pending_groups) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const Pending& copy : groups.front()) {
      if (copy.valid) {
        memcpy(copy.shared, copy.global, copy.bytes);
      } else {
        memset(copy.shared, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

bool run(const std::function<void()>& kernel, Index grid, Index block, size_t bytes) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  failed = false;
  if (threads == 0 || threads > 1024 || threads % kWarpSize != 0) {
    message = "a block needs 32 to 1024 threads in whole warps, not " + std::to_string(threads);
    return false;
  }
  while (static_cast<int>(stacks.size()) < threads) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stacks.push_back(static_cast<unsigned char*>(stack));
  }
  ++launches;
  body = &kernel;
  grid_dim = grid;
  block_dim = block;
  shared_size = bytes;
  random_state = static_cast<uint64_t>(schedule) * 0x9E3779B97F4A7C15u + 1;
  fibers.resize(threads);
  warps.resize(threads / kWarpSize);
  for (unsigned z = 0; z < grid.z && !failed; ++z) {
    for (unsigned y = 0; y < grid.y && !failed; ++y) {
      for (unsigned x = 0; x < grid.x && !failed; ++x) {
        current_block = {x, y, z};
        run_block();
      }
    }
  }
  return !failed;
}

}  // namespace sim
