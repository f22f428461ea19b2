// The PTX in a fat binary, which nvcc puts into a host object.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"

namespace ptx {

struct FatEntry {
  uint32_t target = 0;  // compute capability: 80, 90, ...
  bool compressed = false;
  std::string_view text;  // in the fat binary
};

// There is PTX, but none that fits the device.
struct NoFittingPtx : Error {
  using Error::Error;
};

// The PTX entries, in the order of the file.
std::vector<FatEntry> read_fat_binary(const uint8_t* data);

// The entry that a driver chooses: the newest that the device can run, of those up to `newest` (0:
// all).
const FatEntry& choose_ptx(const std::vector<FatEntry>& entries, uint32_t capability,
                           uint32_t newest);

}  // namespace ptx
