// The operators' interface to the CUDA runtime: devices, limits and error messages.
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <string>

#include "launch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

thread_local std::string refusal;  // of the latest kRefused

// An error of an earlier kernel, which may be of another library.
bool is_asynchronous(int error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert: return true;
    default: return false;
  }
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string old_driver() {
  int driver = 0;
  (void)cudaDriverGetVersion(&driver);
  return "the driver of this machine supports CUDA " + version_text(driver) +
         ", and these kernels were compiled with CUDA " + version_text(CUDART_VERSION) +
         ": update the driver, or reinstall with the nvcc of your torch's CUDA version";
}

}  // namespace

int refuse(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  refusal = text;
  return kRefused;
}

std::string error_string(int error) {
  if (error == kRefused) return refusal;
  const auto code = static_cast<cudaError_t>(error);
  std::string text = "CUDA error " + std::to_string(error) + " (" + cudaGetErrorName(code) +
                     "): " + cudaGetErrorString(code);
  if (error == cudaErrorInsufficientDriver) text += "; " + old_driver();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    text +=
        "; the library holds no kernels for this GPU: reinstall with VISPRUNER_CUDA_ARCHS=native "
        "on this machine";
  }
  if (is_asynchronous(error)) {
    text +=
        "; CUDA kernel errors might be reported asynchronously at some other API call, so an "
        "earlier kernel may have caused it: for debugging set CUDA_LAUNCH_BLOCKING=1";
  }
  return text;
}

int set_device(int device) { return cudaSetDevice(device); }

int shared_memory_limit(int device, int* bytes) {
  constexpr int kReserved = 2048, kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not queried yet
  const bool remembered = device < kDevices;
  *bytes = remembered ? known[device].load(std::memory_order_relaxed) : 0;
  if (*bytes != 0) return 0;
  const cudaError_t e =
      cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e != cudaSuccess) return e;
  *bytes -= kReserved;
  if (remembered) known[device].store(*bytes, std::memory_order_relaxed);
  return 0;
}

}  // namespace vispruner::cuda
