// Chooses the instruction set: the best one of this processor, unless a plan selects another.
#include <array>
#include <string>
#include <vector>

#include "isa.h"
#include "vispruner/cpu.h"
#include "vispruner/plan.h"

namespace vispruner::cpu {

namespace portable { extern const IsaKernels kKernels; }
#if defined(VP_X86_ISAS)
namespace avx2 { extern const IsaKernels kKernels; }
namespace avx512 { extern const IsaKernels kKernels; }
namespace avx512vnni { extern const IsaKernels kKernels; }
namespace avx512bf16 { extern const IsaKernels kKernels; }
#endif

namespace {

struct Candidate {
  plan::Cpu plan;
  const IsaKernels* kernels;
  bool supported;
};

// Best first.
const std::vector<Candidate>& candidates() {
#if defined(VP_X86_ISAS)
  static const std::vector<Candidate> all = [] {
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                          __builtin_cpu_supports("fma");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
    return std::vector<Candidate>{
        {plan::Cpu::kAvx512Bf16, &avx512bf16::kKernels,
         has_vnni && __builtin_cpu_supports("avx512bf16")},
        {plan::Cpu::kAvx512Vnni, &avx512vnni::kKernels, has_vnni},
        {plan::Cpu::kAvx512, &avx512::kKernels, has_avx512},
        {plan::Cpu::kAvx2, &avx2::kKernels, has_avx2},
        {plan::Cpu::kPortable, &portable::kKernels, true},
    };
  }();
#else
  static const std::vector<Candidate> all{{plan::Cpu::kPortable, &portable::kKernels, true}};
#endif
  return all;
}

std::string names(bool supported_only) {
  std::string list;
  for (const Candidate& c : candidates()) {
    if (supported_only && !c.supported) continue;
    if (!list.empty()) list.insert(0, ",");
    list.insert(0, c.kernels->name);
  }
  return list;
}

// The kernels of an instruction set, or null if this processor or build does not have it.
const IsaKernels* find(plan::Cpu asked) {
  for (const Candidate& c : candidates()) {
    if (c.supported && (asked == plan::Cpu::kAuto || asked == c.plan)) return c.kernels;
  }
  return nullptr;
}

// The results of find(), cached for inner loops.
const IsaKernels* found(plan::Cpu asked) {
  static const auto all = [] {
    std::array<const IsaKernels*, plan::kCpus> kernels{};
    for (size_t i = 0; i < kernels.size(); ++i) kernels[i] = find(static_cast<plan::Cpu>(i));
    return kernels;
  }();
  return all[static_cast<size_t>(asked)];
}

}  // namespace

const IsaKernels& isa() {
  const IsaKernels* asked = found(plan::current_cpu());
  return asked ? *asked : portable::kKernels;  // ops.cpp refuses to run then
}

bool isa_supported(plan::Cpu asked) { return found(asked) != nullptr; }
const char* isa_name() { return isa().name; }
std::string isa_built() { return names(false); }
std::string isa_usable() { return names(true); }

}  // namespace vispruner::cpu
