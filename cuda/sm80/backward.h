// Steps of the backward pass, each a few launches. Between them run only the launches of one stream.
#pragma once

#include "common/params.h"
#include "sm80/backward_workspace.h"

namespace sage {

// Fills the workspace (backward_prepass.cu).
const char* prepare_backward(const BackwardCall& params, Stream stream);

// dq, dk, dv (and, for exact_delta, first D) from the filled workspace: the same numbers, by matrix
// units that multiply e4m3 (sm_89 and sm_120; sm_90 a warpgroup at a time), that unpack it to f16 by
// one instruction (sm_90, a warp at a time), or that need bit operations for it (sm_80, sm_86).
const char* train8_gradients_sm80(const BackwardCall& params, Stream stream);
const char* train8_gradients_sm89(const BackwardCall& params, Stream stream);
const char* train8_gradients_sm90(const BackwardCall& params, Stream stream);
void choose_way_sm90(BackwardCall& params);  // sets what says whether all three are computed at once; before the pre-pass
const char* train8_gradients_sm90_mma(const BackwardCall& params, Stream stream);
const char* sagebwd_gradients_sm80(const BackwardCall& params, Stream stream);

}  // namespace sage
