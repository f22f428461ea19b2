#include "shadow.h"

#include <cstddef>

namespace ptx {
namespace {

// Splits every unit into 2^log2 smaller ones with the same record.
template <typename T>
void split(std::vector<T>& units, size_t count, uint32_t log2) {
  if (units.size() < count) units.resize(count);
  for (size_t n = count; n-- > 0;) units[n] = units[n >> log2];
}

}  // namespace

// Old units have eras before the horizon, so nothing needs to be cleared.
void ShadowPage::restart(uint32_t horizon) {
  horizon_ = horizon;
  unit_log2_ = kLargestUnitLog2;
  has_atomics_ = false;
  if (cells_.empty()) cells_.resize(kBytes >> unit_log2_);
}

void ShadowPage::refine(uint32_t bytes) {
  const uint32_t before = unit_log2_;
  while (bytes < 1u << unit_log2_) --unit_log2_;
  const size_t count = kBytes >> unit_log2_;
  split(cells_, count, before - unit_log2_);
  if (has_atomics_) split(atomics_, count, before - unit_log2_);
}

void ShadowPage::add_atomics() {
  if (has_atomics_) return;
  has_atomics_ = true;
  const size_t count = kBytes >> unit_log2_;
  if (atomics_.size() < count) atomics_.resize(count);
}

}  // namespace ptx
