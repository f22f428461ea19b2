#include "launch.h"

#include "device.h"

namespace ptx {
namespace {

constexpr int64_t kDefaultShared = 48 * 1024;  // static and dynamic bytes, without permission
constexpr uint32_t kMostParameterBytes = 4096;

std::string triple(const uint32_t (&of)[3]) {
  return "(" + std::to_string(of[0]) + ", " + std::to_string(of[1]) + ", " + std::to_string(of[2]) +
         ")";
}

std::string description(const Kernel& kernel, const LaunchRequest& request) {
  return kernel.pretty_name + " <<<" + triple(request.grid) + ", " + triple(request.block) + ", " +
         std::to_string(request.shared_bytes) + ">>>";
}

// Why a device does not accept the grid or the block; empty: it does.
std::string shape_fault(const Kernel& kernel, const LaunchRequest& request) {
  constexpr uint64_t kMostGrid[3] = {0x7fffffff, 65535, 65535}, kMostBlock[3] = {1024, 1024, 64};
  constexpr uint64_t kMostThreads = 1024;
  uint64_t threads = 1;
  for (int d = 0; d < 3; ++d) {
    if (!request.grid[d] || !request.block[d]) return "an empty grid or block";
    if (request.grid[d] > kMostGrid[d]) return "too large a grid";
    if (request.block[d] > kMostBlock[d]) return "too large a block";
    threads *= request.block[d];
  }
  if (threads > kMostThreads) return "more than 1024 threads";
  if (threads > kernel.max_threads) {
    return "more threads than the kernel was compiled for, " + std::to_string(kernel.max_threads);
  }
  for (int d = 0; d < 3; ++d) {
    if (kernel.required_block[d] && kernel.required_block[d] != request.block[d]) {
      return "another block than the kernel requires, " + triple(kernel.required_block);
    }
  }
  return "";
}

int refusal(const Kernel& kernel, const LaunchRequest& request) {
  const std::string what = description(kernel, request);
  if (request.dependent && device().major < 9) {
    report_launch("a dependent launch on compute capability " + std::to_string(device().major) +
                  "." + std::to_string(device().minor) + ": " + what);
    return cuda_error::kNotSupported;
  }
  if (const std::string fault = shape_fault(kernel, request); !fault.empty()) {
    report_launch(fault + ": " + what);
    return cuda_error::kInvalidConfiguration;
  }
  const auto dynamic = static_cast<int64_t>(request.shared_bytes);
  const int64_t fixed = kernel.static_shared_bytes;
  if (request.allowed_shared < 0 && fixed + dynamic > kDefaultShared) {
    report_launch("more than 48 KiB of shared memory, " + std::to_string(fixed) +
                  " bytes of them static, although cudaFuncSetAttribute was not called: " + what);
    return cuda_error::kInvalidValue;
  }
  // No finding: host code may try, and report the error to its caller.
  if (request.allowed_shared >= 0 && dynamic > request.allowed_shared) {
    return cuda_error::kInvalidValue;
  }
  if (kernel.parameter_bytes > kMostParameterBytes) {
    report_launch(std::to_string(kernel.parameter_bytes) +
                  " bytes of parameters are more than 4096: " + what);
    return cuda_error::kInvalidValue;
  }
  return cuda_error::kSuccess;
}

}  // namespace

Log& log() {
  static Log one;
  return one;
}

void report_launch(const std::string& text) { machine().findings.add("launch", text); }

int launch(const Kernel& kernel, const LaunchRequest& request,
           const std::vector<uint8_t>& parameters) {
  log().launches.push_back({kernel.pretty_name, request, kernel.target});
  if (const int error = refusal(kernel, request)) return error;
  if (request.dependent && !kernel.waits_for_grid) {
    report_launch("a dependent launch of a kernel without griddepcontrol.wait: " +
                  description(kernel, request));
  }
  LaunchShape shape;
  for (int d = 0; d < 3; ++d) {
    shape.grid[d] = request.grid[d];
    shape.block[d] = request.block[d];
  }
  shape.shared_bytes = static_cast<uint32_t>(request.shared_bytes);
  return machine().run(kernel, shape, parameters.data()) ? cuda_error::kSuccess
                                                         : cuda_error::kLaunchFailure;
}

}  // namespace ptx
