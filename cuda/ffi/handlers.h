// The handlers of the operations for platform CUDA, as symbols that XLA calls.
#pragma once

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(SageQuantizeKvCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageQuantizeQCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageAttendCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageAttendQueriesCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageAttendBackwardCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageQuantizeKvFp4Cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageQuantizeQFp4Cuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SageAttendFp4Cuda);
