// Shape and type checks of handler buffers. The first failure is kept as one full sentence.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/params.h"
#include "xla/ffi/api/ffi.h"

namespace sage {

namespace ffi = xla::ffi;
using Shape = std::vector<int64_t>;

class Check {
 public:
  explicit Check(const char* operation) : operation_(operation) {}

  // The buffer must have exactly this shape and one of these types.
  void buffer(const char* name, const ffi::AnyBuffer& given, const Shape& shape,
              std::initializer_list<ffi::DataType> types) {
    const Shape actual(given.dimensions().begin(), given.dimensions().end());
    if (actual != shape) {
      fail(std::string(name) + " has shape " + text(actual) + ", but the other operands need " +
           text(shape));
    }
    for (ffi::DataType type : types) {
      if (given.element_type() == type) return;
    }
    fail(std::string(name) + " has an element type that the CUDA kernels do not take");
  }

  void require(bool condition, const std::string& sentence) {
    if (!condition) fail(sentence);
  }

  void fail(const std::string& what) {
    if (!error_) error_ = std::string(operation_) + ": " + what + " (docs/abi.md states the contract).";
  }

  bool failed() const { return error_.has_value(); }
  ffi::Error result() const {
    return error_ ? ffi::Error::InvalidArgument(*error_) : ffi::Error::Success();
  }

 private:
  static std::string text(const Shape& shape) {
    std::string s = "[";
    for (size_t n = 0; n < shape.size(); ++n) s += (n ? ", " : "") + std::to_string(shape[n]);
    return s + "]";
  }

  const char* operation_;
  std::optional<std::string> error_;
};

inline constexpr std::initializer_list<ffi::DataType> kFloats = {
    ffi::DataType::BF16, ffi::DataType::F16, ffi::DataType::F32};

inline Dtype dtype_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::BF16: return Dtype::kBf16;
    case ffi::DataType::F16: return Dtype::kF16;
    default: return Dtype::kF32;
  }
}

// Size of axis `axis`, or 0 where the buffer has fewer axes (the shape check then says so).
inline int axis(const ffi::AnyBuffer& buffer, size_t axis) {
  const auto dims = buffer.dimensions();
  return axis < dims.size() ? static_cast<int>(dims[axis]) : 0;
}

template <class T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

inline int64_t tiles64(int64_t tokens) { return (tokens + 63) / 64; }

}  // namespace sage
