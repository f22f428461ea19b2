// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "isa.h"
#include "vispruner/cpu.h"

namespace vispruner::cpu {

namespace portable { extern const IsaKernels kKernels; }
#if defined(VP_X86_ISAS)
namespace avx2 { extern const IsaKernels kKernels; }
namespace avx512 { extern const IsaKernels kKernels; }
namespace avx512vnni { extern const IsaKernels kKernels; }
#endif

namespace {

struct Candidate {
  const IsaKernels* kernels;
  bool supported;
};

const IsaKernels* choose() {
  const char* wanted = std::getenv("VISPRUNER_CPU_ISA");
#if defined(VP_X86_ISAS)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                        __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {
      {&avx512vnni::kKernels, has_avx512 && __builtin_cpu_supports("avx512vnni")},
      {&avx512::kKernels, has_avx512},
      {&avx2::kKernels, has_avx2},
      {&portable::kKernels, true},
  };
#else
  const Candidate candidates[] = {{&portable::kKernels, true}};
#endif
  const IsaKernels* best = nullptr;
  for (const Candidate& c : candidates) {
    if (!c.supported) continue;
    if (wanted && std::strcmp(wanted, c.kernels->name) == 0) return c.kernels;
    if (!best) best = c.kernels;
  }
  return best;
}

}  // namespace

const IsaKernels& isa() {
  static const IsaKernels* const chosen = choose();
  return *chosen;
}

const char* isa_name() { return isa().name; }

const char* isa_built() {
#if defined(VP_X86_ISAS)
  return "portable,avx2,avx512,avx512vnni";
#else
  return "portable";
#endif
}

}  // namespace vispruner::cpu
