// Requested plans: their names, environment variables and values.
#include "vispruner/plan.h"

#include <atomic>
#include <cstdlib>
#include <vector>

namespace vispruner::plan {
namespace {

struct Stage {
  const char* name;
  const char* variable;
  bool cuda;
  std::vector<const char*> plans;  // in the order of the enum
  std::atomic<int> asked{0};

  Stage(const char* name_, const char* variable_, bool cuda_, std::vector<const char*> plans_)
      : name(name_), variable(variable_), cuda(cuda_), plans(std::move(plans_)) {}

  template <typename Plan>
  Plan as() const {
    return static_cast<Plan>(asked.load(std::memory_order_relaxed));
  }

  // An error message if the name is invalid, or an empty string.
  std::string ask(const std::string& plan) {
    std::string known;
    for (size_t i = 0; i < plans.size(); ++i) {
      if (plan == plans[i]) {
        asked.store(static_cast<int>(i), std::memory_order_relaxed);
        return "";
      }
      known += std::string(i ? ", " : "") + plans[i];
    }
    return "no plan '" + plan + "' for " + name + ": use one of " + known;
  }
};

struct Registry {
  Stage rank{"rank", "VISPRUNER_RANK_PLAN", true, {"auto", "tokens_8", "tokens_32"}};
  Stage gram{"gram", "VISPRUNER_GRAM_PLAN", true, {"auto", "tiles_32", "tiles_64", "tiles_128"}};
  Stage neighbours{"neighbours",
                   "VISPRUNER_NEIGHBOURS_PLAN",
                   true,
                   {"auto", "warp_576", "warp_1024", "block_4096", "block_16384", "block_32768"}};
  Stage dedup{
      "dedup", "VISPRUNER_DEDUP_PLAN", true, {"auto", "lists_shared", "state_shared", "workspace"}};
  Stage sort{"sort", "VISPRUNER_SORT_PLAN", true, {"auto", "buckets", "counting"}};
  Stage cls_attention{
      "cls_attention", "VISPRUNER_CLS_ATTENTION_PLAN", true, {"auto", "shared", "workspace"}};
  Stage received_attention{
      "received_attention", "VISPRUNER_RECEIVED_ATTENTION_PLAN", true, {"auto", "wide", "narrow"}};
  Stage launch{"launch", "VISPRUNER_LAUNCH", true, {"auto", "ordered", "dependent"}};
  Stage cpu{"cpu",
            "VISPRUNER_CPU_ISA",
            false,
            {"auto", "portable", "avx2", "avx512", "avx512vnni", "avx512bf16"}};
  std::string error;  // of the environment

  std::vector<Stage*> all() {
    return {&rank,   &gram, &neighbours, &dedup, &sort, &cls_attention, &received_attention,
            &launch, &cpu};
  }

  Registry() {
    for (Stage* stage : all()) {
      const char* value = std::getenv(stage->variable);
      if (!value || !*value) continue;
      const std::string wrong = stage->ask(value);
      if (!wrong.empty() && error.empty()) {
        error = "environment variable " + std::string(stage->variable) + ": " + wrong;
      }
    }
  }
};

Registry& registry() {
  static Registry the_one;
  return the_one;
}

// Reads the environment when the library is loaded, before threads that may write to it.
// NOLINTNEXTLINE(bugprone-throwing-static-initialization): throws only if out of memory
[[maybe_unused]] const Registry& loaded = registry();

}  // namespace

Plans current() {
  const Registry& r = registry();
  return {r.rank.as<Rank>(),
          r.gram.as<Gram>(),
          r.neighbours.as<Neighbours>(),
          r.dedup.as<Dedup>(),
          r.sort.as<Sort>(),
          r.cls_attention.as<ClsAttention>(),
          r.received_attention.as<ReceivedAttention>(),
          r.launch.as<Launch>(),
          r.cpu.as<Cpu>()};
}

Cpu current_cpu() { return registry().cpu.as<Cpu>(); }

std::string set(const std::string& stage, const std::string& name) {
  std::string known;
  for (Stage* s : registry().all()) {
    if (stage == s->name) return s->ask(name);
    known += (known.empty() ? "" : ", ") + std::string(s->name);
  }
  return "no stage '" + stage + "' has launch plans: use one of " + known;
}

std::string environment_error() { return registry().error; }

std::string describe(bool cuda) {
  const auto quoted = [](const char* s) { return "\"" + std::string(s) + "\""; };
  std::string json = "{";
  for (const Stage* s : registry().all()) {
    if (s->cuda && !cuda) continue;
    std::string names;
    for (const char* plan : s->plans) names += (names.empty() ? "" : ",") + quoted(plan);
    json += (json.size() > 1 ? "," : "") + quoted(s->name) +
            ":{\"variable\":" + quoted(s->variable) + ",\"names\":[" + names + "],\"current\":" +
            quoted(s->plans[static_cast<size_t>(s->asked.load(std::memory_order_relaxed))]) + "}";
  }
  return json + "}";
}

}  // namespace vispruner::plan
