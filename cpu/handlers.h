#pragma once

#include "xla/ffi/api/c_api.h"

namespace sage {

XLA_FFI_Error* quantize_kv_handler(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* quantize_q_handler(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* attend_handler(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* attend_backward_handler(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* quantize_kv_fp4_handler(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* quantize_q_fp4_handler(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* attend_fp4_handler(XLA_FFI_CallFrame* frame);

}  // namespace sage
