// The handlers of the four operations for platform CUDA, as symbols that XLA calls.
#pragma once

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(SageQuantizeKvCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageQuantizeQCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageAttendCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageAttendBackwardCuda);
