// The fake device, and the errors of the CUDA runtime that can happen on it.
#pragma once
#include <cstdint>

namespace ptx {

struct Device {
  int major = 9, minor = 0;       // compute capability
  int shared_bytes = 227 * 1024;  // maximum per block
  int driver = 0;                 // CUDA version of the driver; 0: that of the runtime
  int newest_ptx = 0;             // newer PTX is hidden, as in an old library; 0: none is

  int capability() const { return 10 * major + minor; }
};

// The current device. Every call of set_device() creates a new one, for which no shared memory has
// been requested. Its number differs from all earlier ones, so that host code that caches by device
// number starts over as well.
const Device& device();
void set_device(const Device& device);
constexpr int kDevices = 8;  // equal ones
int first_device_number();   // 0 before the first set_device()
// The number of the device that cudaSetDevice selected.
int current_device_number();

namespace cuda_error {
constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kInvalidConfiguration = 9;
constexpr int kInsufficientDriver = 35;
constexpr int kInvalidDeviceFunction = 98;
constexpr int kInvalidDevice = 101;
constexpr int kNoKernelImageForDevice = 209;
constexpr int kInvalidPtx = 218;
constexpr int kLaunchFailure = 719;
constexpr int kNotSupported = 801;
}  // namespace cuda_error
const char* error_name(int error);  // as cudaGetErrorName and cudaGetErrorString have them
const char* error_text(int error);

}  // namespace ptx
