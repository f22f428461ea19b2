#include "device.h"

namespace ptx {
namespace {

Device current;
int set_count = 0;

struct ErrorName {
  int error;
  const char* name;
  const char* text;
};
constexpr ErrorName kErrors[] = {
    {cuda_error::kSuccess, "cudaSuccess", "no error"},
    {cuda_error::kInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cuda_error::kInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cuda_error::kInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cuda_error::kInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction",
     "invalid device function"},
    {cuda_error::kInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cuda_error::kNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cuda_error::kInvalidPtx, "cudaErrorInvalidPtx", "a PTX JIT compilation failed"},
    {cuda_error::kLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cuda_error::kNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

const ErrorName* find_error(int error) {
  for (const ErrorName& e : kErrors) {
    if (e.error == error) return &e;
  }
  return nullptr;
}

}  // namespace

const Device& device() { return current; }

void set_device(const Device& device) {
  current = device;
  ++set_count;
}

int first_device_number() { return kDevices * set_count; }

const char* error_name(int error) {
  const ErrorName* found = find_error(error);
  return found ? found->name : "unrecognized error code";
}

const char* error_text(int error) {
  const ErrorName* found = find_error(error);
  return found ? found->text : "unrecognized error code";
}

}  // namespace ptx
