// What the kernels need of the machine, behind small named functions: launching, shared memory
// and the few instructions that CUDA C++ has no word for. Under VP_SIMT the same names come from
// the host shim (tests/simt/simt.h), with plain C++ twins of the instructions.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vispruner/numerics.h"

namespace vispruner::cuda {
constexpr int kTooMuchSharedMemory = -1;  // beside the cudaError_t that launches return

// Whether an environment variable asks for this launch plan (docs/performance.md).
inline bool plan_asked(const char* variable, const char* plan) {
  const char* value = std::getenv(variable);
  return value && std::strcmp(value, plan) == 0;
}
}  // namespace vispruner::cuda

#if defined(VP_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>

#include <atomic>

namespace vispruner::cuda {

// Dynamic shared memory of the block; all kernels declare it by the same name and type.
#define VP_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

// Whether launch_dependent overlaps kernels: VISPRUNER_LAUNCH=dependent, on compute capability 9.0
// and later. Not the default until it has been measured.
inline int overlap_kernels(bool* overlap) {
  *overlap = plan_asked("VISPRUNER_LAUNCH", "dependent");
  if (!*overlap) return cudaSuccess;
  int device = 0, major = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  const cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  *overlap = major >= 9;
  return e;
}

// Launches a kernel on a stream; above 48 KiB of shared memory it first asks the driver for
// them, once a kernel and device. Returns the cudaError_t.
template <auto kKernel, typename... Args>
int launch_with(cudaLaunchAttribute* attributes, int attribute_count, dim3 grid, int threads,
                int shared_bytes, void* stream, const Args&... args) {
  if (shared_bytes > 48 * 1024) {
    static std::atomic<uint64_t> allowed{0};
    int device = 0;
    if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (!(allowed.load(std::memory_order_relaxed) & bit) || device >= 64) {
      int most = 0;
      cudaError_t e =
          cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      cudaFuncAttributes fixed{};
      if (e == cudaSuccess) e = cudaFuncGetAttributes(&fixed, kKernel);
      if (e == cudaSuccess) {
        e = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(fixed.sharedSizeBytes));
      }
      if (e != cudaSuccess) return e;
      allowed.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = static_cast<unsigned>(attribute_count);
  const cudaError_t e = cudaLaunchKernelEx(&config, kKernel, args...);
  if (e == cudaErrorInvalidValue && shared_bytes > 48 * 1024) return kTooMuchSharedMemory;
  return e;
}

template <auto kKernel, typename... Args>
int launch(dim3 grid, int threads, int shared_bytes, void* stream, const Args&... args) {
  return launch_with<kKernel>(nullptr, 0, grid, threads, shared_bytes, stream, args...);
}

// The same for a kernel that begins with begin_dependent(): where that is asked for, its blocks
// come to the device while the kernel before it on the stream still runs (programmatic dependent
// launch), so that the time of a launch is hidden.
template <auto kKernel, typename... Args>
int launch_dependent(dim3 grid, int threads, int shared_bytes, void* stream, const Args&... args) {
  bool overlap = false;
  if (const int e = overlap_kernels(&overlap)) return e;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return launch_with<kKernel>(&attribute, overlap ? 1 : 0, grid, threads, shared_bytes, stream,
                              args...);
}

// First of all in such a kernel, in every thread: lets the kernel after it come to the device, and
// waits until all that was before it on the stream is done and visible.
__device__ __forceinline__ void begin_dependent() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Bytes of shared memory one block may ask for on the current device.
inline int shared_memory_limit(int* bytes) {
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// ---- asynchronous copies, 16 bytes a thread ---------------------------------------------------
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from using a value before this place.
__device__ __forceinline__ void not_before(int& value) { asm volatile("" : "+r"(value)::"memory"); }

// ---- int8 tensor cores ------------------------------------------------------------------------
// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8 and receives
// the 4 bytes at 4 * (l % 4) of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* shared_row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}
// sum (16 x 8, int32) += a (16 x 32, int8, rows) * b (32 x 8, int8, columns)
__device__ __forceinline__ void multiply_add_s8(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- 16-bit tensor cores ----------------------------------------------------------------------
// sum (16 x 8, float32) += a (16 x 16, rows) * b (16 x 8, columns)
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace vispruner::cuda
#endif

namespace vispruner::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace vispruner::cuda
