// Tables of built kernels, and the choice among them when the device is known: at run time.
#pragma once

#include "common/launch.h"
#include "common/params.h"

namespace sage {

struct ForwardKernel {
  int architecture;  // oldest that runs it: 80 for sm_80
  PvFormat pv;
  bool f16_accumulate;
  int padded_dim;
  const char* (*launch)(const AttendParams&, Stream);
  bool quantizes_queries = false;  // of 16 bits, whose head dimension is a multiple of 16
};

struct ForwardTable {
  const ForwardKernel* kernels;
  int count;
};

ForwardTable sm80_forward_kernels();
ForwardTable sm80_e4m3_forward_kernels();
ForwardTable sm89_forward_kernels();
ForwardTable sm90_mma_forward_kernels();  // warp-level products
ForwardTable sm90_forward_kernels();      // warpgroup-level products

}  // namespace sage
