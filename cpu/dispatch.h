// Which build of the kernels runs.
#pragma once

#include <string>

#include "params.h"

namespace sage {

// The kernels in use: the fastest that this CPU can run, unless select_isa chose others.
const Kernels& kernels();

// Makes later calls use the kernels of an instruction set, so that tests reach them all. False, and
// no change, if this build or this CPU does not have it.
bool select_isa(const std::string& name);

}  // namespace sage
