#include "memory.h"

#include <algorithm>

namespace ptx {

Allocation& Memory::add(const std::string& name, uint64_t base, uint8_t* data, uint64_t bytes,
                        bool writable, bool initialized) {
  auto allocation = std::make_unique<Allocation>();
  allocation->name = name;
  allocation->base = base;
  allocation->bytes = bytes;
  allocation->data = data;
  allocation->writable = writable;
  if (!initialized) allocation->state.assign(bytes, 0);
  if (writable) allocation->shadow = Shadow(base, bytes);
  allocations_.push_back(std::move(allocation));
  return *allocations_.back();
}

Allocation* Memory::search(uint64_t address, uint64_t bytes, uint32_t* hint) const {
  for (uint32_t n = 0; n < allocations_.size(); ++n) {
    if (!allocations_[n]->contains(address, bytes)) continue;
    *hint = n;
    return allocations_[n].get();
  }
  return nullptr;
}

std::string Memory::near(uint64_t address, uint64_t far) const {
  std::string text;
  for (const auto& a : allocations_) {
    if (address + far <= a->base || address >= a->base + a->bytes + far) continue;
    text += " " + std::to_string(static_cast<int64_t>(address - a->base)) + " bytes into " +
            a->name + " (" + std::to_string(a->bytes) + " bytes)";
  }
  return text;
}

std::vector<std::string> missing_outputs(const Memory& memory) {
  std::vector<std::string> texts;
  for (const auto& a : memory.allocations()) {
    if (!a->is_output) continue;
    const auto missing = std::count(a->state.begin(), a->state.end(), 0);
    if (!missing) continue;
    const auto first = std::find(a->state.begin(), a->state.end(), 0) - a->state.begin();
    texts.push_back(std::to_string(missing) + " of " + std::to_string(a->bytes) + " bytes of " +
                    a->name + " were not written, the first at " + std::to_string(first));
  }
  return texts;
}

}  // namespace ptx
