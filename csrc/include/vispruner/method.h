// Methods of selection: their names, their parameters and which stages they need.
//
// The methods share the stages for ranking, quantization and the Gram matrix. The rest of each
// method is one file per backend, in csrc/cpu/methods and csrc/cuda/methods.
#pragma once
#include <cstdint>
#include <string>

#include "vispruner/shape.h"

namespace vispruner {

enum class Method { kVispruner, kTopk, kRandom, kMaxmin, kScope, kMmr };

// The order of the positions that the stages after the ranking work on.
enum class Order { kScore, kRandom, kIndex };

// The output of the Gram stage.
enum class Matrix {
  kSimilarity,  // float: similarity(G_ij, inv_j)
  kCosine,      // float: similarity(G_ij, inv_j) * inv_i
  kCoverage,    // uint32: coverage of the cosine, symmetric
};

// A method and its parameters.
struct Selection {
  Method method;
  double important_ratio;  // of vispruner: share of k kept by score
  int step;                // of vispruner: tokens dropped per round
  float mmr_lambda;
  int scope_quarters;  // 4 alpha
  uint32_t seed;       // of random
};

inline Selection vispruner_selection(double important_ratio, int64_t step) {
  Selection selection{};
  selection.method = Method::kVispruner;
  selection.important_ratio = important_ratio;
  // Larger than any image: the number of tokens bounds the rounds.
  selection.step = static_cast<int>(step < kMaxTokens ? step : kMaxTokens);
  return selection;
}

// The other methods, which have one parameter or none (then 0). Returns a one-line error message,
// or an empty string.
std::string parse_selection(const std::string& method, double parameter, Selection* selection);

// The split of k: `important` tokens are kept by rank, `diverse` ones by the method's loop.
inline ImageShape image_shape(int64_t tokens, int64_t k, const Selection& selection) {
  switch (selection.method) {
    case Method::kVispruner: return image_shape(tokens, k, selection.important_ratio);
    case Method::kTopk:
    case Method::kRandom: return image_shape(tokens, k, 1.0);
    default: return image_shape(tokens, k, 0.0);
  }
}

}  // namespace vispruner
