// Names and parameters of the methods.
#include "vispruner/method.h"

#include <cmath>

namespace vispruner {
namespace {

constexpr double kMostLambda = 100.0, kMostAlpha = 4.0, kMostSeed = 4294967295.0;

struct Named {
  const char* name;
  Method method;
};
constexpr Named kMethods[] = {
    {"topk", Method::kTopk},   {"random", Method::kRandom}, {"maxmin", Method::kMaxmin},
    {"scope", Method::kScope}, {"mmr", Method::kMmr},
};

const char* parameter_error(Method method, double value) {
  switch (method) {
    case Method::kRandom:
      if (value >= 0.0 && value <= kMostSeed && std::floor(value) == value) return nullptr;
      return "seed must be an integer in [0, 4294967295]";
    case Method::kScope:
      if (value >= 0.0 && value <= kMostAlpha && std::floor(4.0 * value) == 4.0 * value) {
        return nullptr;
      }
      return "scope_alpha must be a multiple of 0.25 in [0, 4]";
    case Method::kMmr:
      if (value >= 0.0 && value <= kMostLambda) return nullptr;
      return "mmr_lambda must be in [0, 100]";
    default: return value == 0.0 ? nullptr : "this method has no parameter: it must be 0";
  }
}

}  // namespace

std::string parse_selection(const std::string& method, double parameter, Selection* selection) {
  std::string known;
  for (const Named& named : kMethods) {
    known += (known.empty() ? "" : ", ") + std::string(named.name);
    if (method != named.name) continue;
    if (const char* wrong = parameter_error(named.method, parameter)) {
      return std::string(wrong) + ", got " + std::to_string(parameter);
    }
    *selection = {};
    selection->method = named.method;
    if (named.method == Method::kMmr) selection->mmr_lambda = static_cast<float>(parameter);
    if (named.method == Method::kScope) {
      selection->scope_quarters = static_cast<int>(4.0 * parameter);
    }
    if (named.method == Method::kRandom) selection->seed = static_cast<uint32_t>(parameter);
    return "";
  }
  return "no method '" + method + "': use one of " + known;
}

}  // namespace vispruner
