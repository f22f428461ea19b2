// Memory that kernels may use, and the states of its bytes.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "shadow.h"

namespace ptx {

// States of a byte.
constexpr uint8_t kWritten = 1;
constexpr uint8_t kPending = 2;  // an asynchronous copy will write it

struct Allocation {
  std::string name;
  uint64_t base = 0, bytes = 0;  // the address that kernels use
  uint8_t* data = nullptr;
  bool writable = true;
  bool is_output = false;      // every byte must be written
  std::vector<uint8_t> state;  // of each byte; empty: all are written, and none is pending
  Shadow shadow;

  bool contains(uint64_t address, uint64_t size) const {
    return size <= bytes && address - base <= bytes - size;  // below the base it wraps around
  }
  uint8_t* at(uint64_t address) const { return data + (address - base); }
};

// The allocations of one address space.
class Memory {
 public:
  Allocation& add(const std::string& name, uint64_t base, uint8_t* data, uint64_t bytes,
                  bool writable, bool initialized);
  void clear() { allocations_.clear(); }
  const std::vector<std::unique_ptr<Allocation>>& allocations() const { return allocations_; }

  // The allocation that contains all these bytes, or null. `hint` is checked first.
  Allocation* find(uint64_t address, uint64_t bytes, uint32_t* hint) const {
    if (*hint < allocations_.size() && allocations_[*hint]->contains(address, bytes)) {
      return allocations_[*hint].get();
    }
    return search(address, bytes, hint);
  }
  // " 4 bytes into x (16 bytes)" for each allocation nearby.
  std::string near(uint64_t address, uint64_t far) const;

 private:
  Allocation* search(uint64_t address, uint64_t bytes, uint32_t* hint) const;

  std::vector<std::unique_ptr<Allocation>> allocations_;
};

// Text of a finding for each output with bytes that were not written.
std::vector<std::string> missing_outputs(const Memory& memory);

}  // namespace ptx
