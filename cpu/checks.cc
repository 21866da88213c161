#include "checks.h"

#include <sstream>

namespace sage {
namespace {

XLA_FFI_Buffer empty_buffer() {
  static int64_t dims[4] = {0, 0, 0, 0};
  XLA_FFI_Buffer buffer = {};
  buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
  buffer.dtype = XLA_FFI_DataType_F32;
  buffer.rank = 4;
  buffer.dims = dims;
  return buffer;
}
const XLA_FFI_Buffer kEmpty = empty_buffer();

template <class List>
std::string sizes(const List& dims) {
  std::ostringstream text;
  const char* separator = "[";
  for (int64_t size : dims) {
    text << separator;
    if (size == kAnySize) text << "any";
    else text << size;
    separator = ", ";
  }
  text << (dims.size() ? "]" : "[]");
  return text.str();
}

bool is_absent(ffi::AnyBuffer buffer) {
  for (int64_t size : buffer.dimensions()) {
    if (size != 0) return false;
  }
  return true;
}

}  // namespace

DType dtype_of(ffi::AnyBuffer buffer) {
  return buffer.element_type() == kBF16  ? DType::bf16
         : buffer.element_type() == kF16 ? DType::f16
                                         : DType::f32;
}

Buffers::Buffers(const char* operation, ffi::RemainingArgs args, ffi::RemainingRets rets,
                 size_t operands, size_t results)
    : operation_(operation), args_(args), rets_(rets) {
  std::ostringstream text;
  text << "it was called with " << args.size() << " operands and " << rets.size()
       << " results, but takes " << operands << " and gives " << results << ".";
  require(args.size() == operands && rets.size() == results, text.str());
}

void Buffers::require(bool condition, const std::string& sentence) {
  if (!condition && !failed()) problem_ = std::string(operation_) + ": " + sentence;
}

ffi::AnyBuffer Buffers::next(bool is_result) {
  if (failed()) return ffi::AnyBuffer(&kEmpty);
  if (is_result) return **rets_.get<ffi::AnyBuffer>(next_ret_++);
  return *args_.get<ffi::AnyBuffer>(next_arg_++);
}

void Buffers::match(const char* name, ffi::AnyBuffer buffer, Types types, const Dims& dims,
                    bool ones) {
  if (failed()) return;
  bool type_fits = false;
  for (ffi::DataType type : types) type_fits |= buffer.element_type() == type;
  bool dims_fit = buffer.dimensions().size() == dims.size();
  for (size_t i = 0; dims_fit && i < dims.size(); ++i) {
    int64_t size = buffer.dimensions()[i];
    dims_fit = size == dims[i] || dims[i] == kAnySize || (ones && size == 1);
  }
  std::ostringstream text;
  text << "`" << name << "` is " << buffer.element_type() << sizes(buffer.dimensions())
       << ", but must be ";
  const char* separator = "";
  for (ffi::DataType type : types) {
    text << separator << type;
    separator = " or ";
  }
  text << " of shape " << sizes(dims) << (ones ? " (or 1 along an axis)." : ".");
  require(type_fits && dims_fit, text.str());
}

ffi::AnyBuffer Buffers::operand(const char* name, Types types, const Dims& dims) {
  ffi::AnyBuffer buffer = next(false);
  match(name, buffer, types, dims, false);
  return failed() ? ffi::AnyBuffer(&kEmpty) : buffer;
}

const void* Buffers::optional(const char* name, Types types, const Dims& dims) {
  ffi::AnyBuffer buffer = next(false);
  if (is_absent(buffer)) return nullptr;
  match(name, buffer, types, dims, false);
  return buffer.untyped_data();
}

const void* Buffers::broadcast(const char* name, Types types, const Dims& dims,
                               Broadcast4* strides) {
  *strides = {};
  ffi::AnyBuffer buffer = next(false);
  if (is_absent(buffer)) return nullptr;
  match(name, buffer, types, dims, true);
  if (failed()) return nullptr;
  int64_t* stride[4] = {&strides->b, &strides->n, &strides->t, &strides->s};
  int64_t step = 1;
  for (int axis = 3; axis >= 0; --axis) {
    int64_t size = buffer.dimensions()[axis];
    *stride[axis] = size == 1 ? 0 : step;
    step *= size;
  }
  return buffer.untyped_data();
}

ffi::AnyBuffer Buffers::result(const char* name, Types types, const Dims& dims) {
  ffi::AnyBuffer buffer = next(true);
  match(name, buffer, types, dims, false);
  return failed() ? ffi::AnyBuffer(&kEmpty) : buffer;
}

}  // namespace sage
