#include "static_checks.h"

namespace ptx {
namespace {

bool touches_memory(const Instruction& i) {
  switch (i.kind) {
    case Kind::kLoad: return i.space != Space::kParameter;
    case Kind::kStore:
    case Kind::kAtomic:
    case Kind::kAsyncCopy:
    case Kind::kLoadMatrix: return true;
    default: return false;
  }
}

}  // namespace

void check_statically(Kernel& kernel) {
  for (const Instruction& i : kernel.code) {
    kernel.waits_for_grid = kernel.waits_for_grid || i.waits_for_grid;
  }
  if (!kernel.waits_for_grid) return;

  // Everything that can run before the wait.
  std::vector<bool> seen(kernel.code.size());
  std::vector<uint32_t> next{0};
  while (!next.empty()) {
    const uint32_t pc = next.back();
    next.pop_back();
    if (pc >= kernel.code.size() || seen[pc]) continue;
    seen[pc] = true;
    const Instruction& i = kernel.code[pc];
    const bool always = i.guard == kNoRegister;
    if (i.waits_for_grid && always) continue;
    if (touches_memory(i)) {
      kernel.static_findings.push_back("memory is used before griddepcontrol.wait, at " +
                                       kernel.where(pc));
    }
    if (i.kind == Kind::kExit) {
      kernel.static_findings.push_back("a thread may end before griddepcontrol.wait, at " +
                                       kernel.where(pc));
    }
    if (i.kind == Kind::kBranch) next.push_back(i.target);
    const bool leaves = i.kind == Kind::kExit || i.kind == Kind::kBranch;
    if (!leaves || !always) next.push_back(pc + 1);
  }
}

}  // namespace ptx
