// What can be seen in a kernel without running it.
#pragma once
#include "ptx.h"

namespace ptx {

// Fills in Kernel::static_findings and waits_for_grid: in a kernel that waits for the grid before
// it, nothing that comes before the wait may touch memory or end a thread.
void check_statically(Kernel& kernel);

}  // namespace ptx
