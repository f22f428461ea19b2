// Greedy selection on the CPU: picks tokens one after the other, each time the one with the highest
// value.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "vispruner/numerics.h"

namespace vispruner::cpu {

constexpr uint32_t kTaken = 0;  // below the key of every value

// The position of the highest key, the first of equal ones. key(position) is an ordered_key, or
// kTaken.
template <typename Key>
int highest(int count, const Key& key) {
  int best = 0;
  uint32_t best_key = kTaken;
  for (int i = 0; i < count; ++i) {
    const uint32_t own = key(i);
    if (own > best_key) {
      best_key = own;
      best = i;
    }
  }
  return best;
}

// Scores divided by the highest one.
inline void importances(const float* scores, int count, float* out) {
  float most = 0.0f;
  for (int i = 0; i < count; ++i) {
    out[i] = positive_score(scores[i]);
    most = std::max(most, out[i]);
  }
  for (int i = 0; i < count; ++i) out[i] = importance(out[i], most);
}

}  // namespace vispruner::cpu
