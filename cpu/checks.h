// Reads the operands and results of an FFI call in order, checking types and shapes.
//
// The first problem is kept as one sentence and everything read after it is empty, so that a
// handler asks once, at the end.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "params.h"
#include "xla/ffi/api/ffi.h"

namespace sage {

namespace ffi = xla::ffi;

using Dims = std::vector<int64_t>;
using Types = std::initializer_list<ffi::DataType>;

constexpr int64_t kAnySize = -1;

class Buffers {
 public:
  Buffers(const char* operation, ffi::RemainingArgs args, ffi::RemainingRets rets, size_t operands,
          size_t results);

  // The next operand. A size of kAnySize in `dims` accepts any.
  ffi::AnyBuffer operand(const char* name, Types types, const Dims& dims);
  // Null when the operand is absent, that is, all its sizes are 0.
  const void* optional(const char* name, Types types, const Dims& dims);
  // As above; its axes may also have size 1. `strides` gets 0 for those.
  const void* broadcast(const char* name, Types types, const Dims& dims, Broadcast4* strides);
  ffi::AnyBuffer result(const char* name, Types types, const Dims& dims);

  void require(bool condition, const std::string& sentence);

  bool failed() const { return !problem_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(problem_); }

 private:
  ffi::AnyBuffer next(bool is_result);
  void match(const char* name, ffi::AnyBuffer buffer, Types types, const Dims& dims, bool ones);

  const char* operation_;
  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t next_arg_ = 0, next_ret_ = 0;
  std::string problem_;
};

constexpr ffi::DataType kS8 = ffi::DataType::S8, kS32 = ffi::DataType::S32;
constexpr ffi::DataType kU8 = ffi::DataType::U8;
constexpr ffi::DataType kF32 = ffi::DataType::F32, kF16 = ffi::DataType::F16;
constexpr ffi::DataType kBF16 = ffi::DataType::BF16, kPred = ffi::DataType::PRED;
constexpr ffi::DataType kE4M3 = ffi::DataType::F8E4M3FN;

DType dtype_of(ffi::AnyBuffer buffer);
inline Array array(ffi::AnyBuffer b) { return {b.untyped_data(), dtype_of(b)}; }
inline Result writable(ffi::AnyBuffer b) { return {b.untyped_data(), dtype_of(b)}; }
template <class T>
T* data(ffi::AnyBuffer b) {
  return static_cast<T*>(b.untyped_data());
}

}  // namespace sage
