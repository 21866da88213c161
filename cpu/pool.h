// Work items shared between the calling thread and the threads of a pool.
//
// How items are cut is the kernels' choice and never depends on the number of threads, so results
// do not either.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sage {

class Pool {  // what the kernels need of XLA's thread pool
 public:
  virtual int64_t threads() const = 0;
  virtual void schedule(void (*task)(void*), void* data) = 0;

 protected:
  ~Pool() = default;
};

class Items {  // hands out 0, 1, ..., count - 1, each once, to whichever worker asks
 public:
  virtual bool take(int64_t* item) = 0;

 protected:
  ~Items() = default;
};

// Runs `worker(context, items)` on the calling thread and on up to threads() - 1 pool threads;
// returns when every item taken is finished. A worker allocates its scratch, then loops over
// `take`. std::bad_alloc thrown by any worker is rethrown here.
void run_workers(Pool& pool, int64_t count, void (*worker)(void* context, Items& items),
                 void* context);

// Arrays aligned to a cache line and freed together: the scratch of a worker or of a call.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* bytes(size_t size);  // throws std::bad_alloc

  static constexpr int kMaxArrays = 64;
  void* arrays_[kMaxArrays];
  int count_ = 0;
};

}  // namespace sage
