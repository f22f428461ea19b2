// Launches: the driver's checks, and a log.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "executor.h"

namespace ptx {

struct LaunchRequest {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block[3] = {1, 1, 1};
  uint64_t shared_bytes = 0;
  // Dynamic shared memory that cudaFuncSetAttribute has allowed; negative: it was not called.
  int64_t allowed_shared = -1;
  bool dependent = false;  // programmatic stream serialization
};

struct LaunchRecord {
  std::string kernel;
  LaunchRequest request;
  uint32_t target = 0;  // of the PTX
};

struct Log {
  std::vector<LaunchRecord> launches;
  std::map<std::string, uint64_t> runtime_calls;
};
Log& log();

// Runs a kernel as the driver would. Returns the cudaError_t.
int launch(const Kernel& kernel, const LaunchRequest& request,
           const std::vector<uint8_t>& parameters);

// A finding for a launch or another call of the runtime.
void report_launch(const std::string& text);

}  // namespace ptx
