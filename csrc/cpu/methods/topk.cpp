// Methods without a loop: the ranking is the selection.
#include "stages.h"

namespace vispruner::cpu {
namespace {

void reserve(Arena& /*arena*/, const GramWorkspace& /*gram*/, int /*threads*/) {}

const uint16_t* select(Arena& /*arena*/, const Stages& /*stages*/, int /*picks*/,
                       const Selection& /*selection*/, const Threads& /*threads*/) {
  return nullptr;  // never called: no tokens for a loop
}

}  // namespace

const MethodKernels kTopk{Order::kScore, false, reserve, select};
const MethodKernels kRandom{Order::kRandom, false, reserve, select};

}  // namespace vispruner::cpu
