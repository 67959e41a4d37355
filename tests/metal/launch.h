// Between runtime.cpp, which runs threads, and launch.cpp, which owns memory and errors.
#pragma once
#include "runtime.h"

namespace emulator {

// False where it has reported why.
bool run_grid(const Kernel&, const Launch&, void** buffers);
// The thread that is running, if one is.
const Ids* running();
// Keeps the first error of a launch.
void report(const char* what, const Ids* where);

}  // namespace emulator
