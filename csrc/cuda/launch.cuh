// Kernel launches: shared memory, dependent launches, and errors that say what to do.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "vispruner/cuda.h"
#include "vispruner/plan.h"

namespace vispruner::cuda {

// Returned, like a cudaError_t, for work that a GPU or a plan cannot do; error_string() says why.
constexpr int kRefused = -1;
int refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Bytes of dynamic shared memory that a block may request on a device. 2 KiB are reserved for the
// static variables of a kernel and for what the system takes per block.
int shared_memory_limit(int device, int* bytes);

// Properties that are queried once per kernel and device.
template <auto kKernel>
struct KernelOnDevice {
  // A bit per device each.
  inline static std::atomic<uint64_t> known{0};
  inline static std::atomic<uint64_t> waits{0};  // the code that was loaded (griddepcontrol.wait)
  inline static std::atomic<uint64_t> captured{0};  // the driver keeps dependent launches in graphs

  // Lets the kernel use all shared memory of the device, and says whether a launch of this plan is
  // a dependent one.
  static int prepare(int device, plan::Launch launch, bool* dependent) {
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    bool code_waits = waits.load(std::memory_order_relaxed) & bit;
    bool is_captured = captured.load(std::memory_order_relaxed) & bit;
    if (!(known.load(std::memory_order_acquire) & bit)) {
      cudaFuncAttributes attributes{};
      int most = 0, driver = 0;
      cudaError_t e = cudaFuncGetAttributes(&attributes, kKernel);
      if (e == cudaSuccess) {
        e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      }
      if (e == cudaSuccess) {
        e = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(attributes.sharedSizeBytes));
      }
      if (e == cudaSuccess) e = cudaDriverGetVersion(&driver);
      if (e != cudaSuccess) return e;
      code_waits = attributes.ptxVersion >= 90;  // code of older PTX does not, on any device
      is_captured = driver >= 12030;
      if (code_waits) waits.fetch_or(bit, std::memory_order_relaxed);
      if (is_captured) captured.fetch_or(bit, std::memory_order_relaxed);
      known.fetch_or(bit, std::memory_order_release);
    }
    *dependent = code_waits && (launch == plan::Launch::kDependent ||
                                (launch == plan::Launch::kAuto && is_captured));
    if (launch != plan::Launch::kDependent || code_waits) return cudaSuccess;
    return refuse(
        "launch=dependent needs a GPU of compute capability 9.0 or later and kernels that were "
        "compiled for it: use launch=auto, or add '90' to VISPRUNER_CUDA_ARCHS and reinstall");
  }
};

// Launches a kernel on a stream and returns the cudaError_t, or kRefused. `launch`: whether it is a
// programmatic dependent launch.
template <auto kKernel, typename... Args>
int launch_with(plan::Launch launch, dim3 grid, int threads, int shared_bytes, Stream stream,
                const Args&... args) {
  bool dependent = false;
  // Requested even for 48 KiB or less: static variables count towards them.
  if (shared_bytes > 0 || launch != plan::Launch::kOrdered) {
    if (const int e = KernelOnDevice<kKernel>::prepare(stream.device, launch, &dependent)) return e;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, args...);
}

template <auto kKernel, typename... Args>
int launch(dim3 grid, int threads, int shared_bytes, Stream stream, const Args&... args) {
  return launch_with<kKernel>(plan::Launch::kOrdered, grid, threads, shared_bytes, stream, args...);
}

// The same for a kernel that begins with begin_dependent(). If the plan and the device allow it,
// its blocks start while the kernel before it on the stream still runs, which hides the launch
// latency.
template <auto kKernel, typename... Args>
int launch_dependent(dim3 grid, int threads, int shared_bytes, Stream stream, const Args&... args) {
  return launch_with<kKernel>(plan::current().launch, grid, threads, shared_bytes, stream, args...);
}

}  // namespace vispruner::cuda
