// Checks of a kernel without running it.
#pragma once
#include "ptx.h"

namespace ptx {

// Fills in Kernel::static_findings and waits_for_grid: in a kernel that waits for the grid before
// it, no instruction before the wait may access memory or end a thread.
void check_statically(Kernel& kernel);

}  // namespace ptx
