// Launching kernels: shared memory, dependent launches, and errors that say what to do.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "vispruner/plan.h"

namespace vispruner::cuda {

// Returned, like a cudaError_t, for work that a GPU or a plan cannot do; error_string() says why.
constexpr int kRefused = -1;
int refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Bytes of dynamic shared memory that a block may ask for on the current device. 2 KiB are set
// aside for the static variables of a kernel and for what the system reserves per block.
int shared_memory_limit(int* bytes);

// What is found out once per kernel and device.
template <auto kKernel>
struct KernelOnDevice {
  inline static std::atomic<uint64_t> known{0};      // a bit per device
  inline static std::atomic<uint64_t> dependent{0};  // its code waits (griddepcontrol.wait)

  // Lets the kernel use all shared memory of the device, and looks at which code was loaded.
  static int prepare(bool* can_depend) {
    int device = 0;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if (known.load(std::memory_order_acquire) & bit) {
      *can_depend = dependent.load(std::memory_order_relaxed) & bit;
      return cudaSuccess;
    }
    cudaFuncAttributes attributes{};
    int most = 0;
    cudaError_t e = cudaFuncGetAttributes(&attributes, kKernel);
    if (e == cudaSuccess) {
      e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (e == cudaSuccess) {
      e = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes));
    }
    if (e != cudaSuccess) return e;
    // Code made of older PTX does not wait, whatever the device could do.
    *can_depend = attributes.ptxVersion >= 90;
    if (*can_depend) dependent.fetch_or(bit, std::memory_order_relaxed);
    known.fetch_or(bit, std::memory_order_release);
    return cudaSuccess;
  }
};

// Launches a kernel on a stream and returns the cudaError_t, or kRefused. `overlap`: programmatic
// dependent launch.
template <auto kKernel, typename... Args>
int launch_with(bool overlap, dim3 grid, int threads, int shared_bytes, void* stream,
                const Args&... args) {
  // Asked for even where 48 KiB are enough without: static variables count among them.
  if (shared_bytes > 0 || overlap) {
    bool can_depend = false;
    if (const int e = KernelOnDevice<kKernel>::prepare(&can_depend)) return e;
    if (overlap && !can_depend) {
      return refuse(
          "launch=dependent needs a GPU of compute capability 9.0 or later and kernels that were "
          "compiled for it: use launch=auto, or add '90' to VISPRUNER_CUDA_ARCHS and reinstall");
    }
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, args...);
}

template <auto kKernel, typename... Args>
int launch(dim3 grid, int threads, int shared_bytes, void* stream, const Args&... args) {
  return launch_with<kKernel>(false, grid, threads, shared_bytes, stream, args...);
}

// The same for a kernel that begins with begin_dependent(). With the plan launch=dependent its
// blocks come to the device while the kernel before it on the stream still runs, which hides the
// time of a launch.
template <auto kKernel, typename... Args>
int launch_dependent(dim3 grid, int threads, int shared_bytes, void* stream, const Args&... args) {
  return launch_with<kKernel>(plan::overlaps(plan::current().launch), grid, threads, shared_bytes,
                              stream, args...);
}

}  // namespace vispruner::cuda
