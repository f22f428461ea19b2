// Methods without a loop: the ranking is the selection, and no token is left to a loop.
#include "stages.h"

namespace vispruner::cpu {

const MethodKernels kTopk{Order::kScore, false, nullptr, nullptr};
const MethodKernels kRandom{Order::kRandom, false, nullptr, nullptr};

}  // namespace vispruner::cpu
