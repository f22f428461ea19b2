// The machine that runs kernels: its memory, options, findings and counters.
#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "counters.h"
#include "findings.h"
#include "memory.h"
#include "options.h"
#include "ptx.h"

namespace ptx {

struct LaunchShape {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block[3] = {1, 1, 1};
  uint32_t shared_bytes = 0;  // dynamic

  uint64_t threads() const { return uint64_t{block[0]} * block[1] * block[2]; }
  uint64_t blocks() const { return uint64_t{grid[0]} * grid[1] * grid[2]; }
};

struct Machine {
  Options options;
  Memory memory;  // global
  Findings findings;
  // By pretty name:
  std::map<std::string, Counters> counters;
  std::map<std::string, const Kernel*> kernels;  // that were launched, the last of each name
  uint32_t era = 0;                              // of the race checker

  // Runs a launch that the driver would accept. False: a finding ended it early.
  bool run(const Kernel& kernel, const LaunchShape& shape, const uint8_t* parameters);
};

Machine& machine();

}  // namespace ptx
