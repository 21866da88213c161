#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

namespace sage {
namespace {

constexpr size_t kLine = 64;

// Shared by the caller and the tasks it schedules. A task that starts after all items are taken
// must not touch `context`, which lives on the caller's stack: it only sees that there is nothing
// left to do.
struct Job : Items {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*worker)(void*, Items&);
  void* context;
  std::mutex mutex;
  std::condition_variable changed;
  int active = 0;
  bool closed = false, out_of_memory = false;

  bool take(int64_t* item) override { return (*item = next.fetch_add(1)) < count; }

  void work() {
    try {
      worker(context, *this);
    } catch (const std::bad_alloc&) {
      next.store(count);
      std::lock_guard<std::mutex> lock(mutex);
      out_of_memory = true;
    }
  }

  void help() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (closed) return;
      ++active;
    }
    work();
    std::lock_guard<std::mutex> lock(mutex);
    --active;
    changed.notify_all();
  }

  void finish() {
    std::unique_lock<std::mutex> lock(mutex);
    closed = true;
    changed.wait(lock, [this] { return active == 0; });
  }
};

void help_task(void* data) {
  auto* job = static_cast<std::shared_ptr<Job>*>(data);
  (*job)->help();
  delete job;
}

}  // namespace

void run_workers(Pool& pool, int64_t count, void (*worker)(void*, Items&), void* context) {
  if (count <= 0) return;
  auto job = std::make_shared<Job>();
  job->count = count;
  job->worker = worker;
  job->context = context;
  int64_t helpers = (count < pool.threads() ? count : pool.threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.schedule(help_task, new std::shared_ptr<Job>(job));
  }
  job->work();
  job->finish();
  if (job->out_of_memory) throw std::bad_alloc();
}

Scratch::~Scratch() {
  for (int i = 0; i < count_; ++i) std::free(arrays_[i]);
}

void* Scratch::bytes(size_t size) {
  if (count_ == kMaxArrays) throw std::bad_alloc();
  size_t rounded = (size + kLine) / kLine * kLine;  // never zero
  void* array = std::aligned_alloc(kLine, rounded);
  if (!array) throw std::bad_alloc();
  return arrays_[count_++] = array;
}

}  // namespace sage
