// Instructions that CUDA C++ does not expose, as small named functions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "vispruner/numerics.h"

namespace vispruner::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Dynamic shared memory of the block; all kernels declare it by the same name and type.
#define VP_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

// ---- dependent launches -----------------------------------------------------------------------
// The first statement of every kernel that launch_dependent() launches: waits until everything
// before it on the stream is done and visible. `more`: another such kernel follows in this call and
// may start while this one runs.
__device__ __forceinline__ void begin_dependent(bool more) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (more) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#else
  (void)more;
#endif
}

// ---- asynchronous copies, 16 bytes per thread -------------------------------------------------
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  copy_async_16(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), global);
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Prevents the compiler from using a value before this point.
__device__ __forceinline__ void not_before(int& value) { asm volatile("" : "+r"(value)::"memory"); }

// ---- exponentials ------------------------------------------------------------------------------
// 2^x to two units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- int8 tensor cores ------------------------------------------------------------------------
// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8 and receives
// the 4 bytes at 4 * (l % 4) of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_row)
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* shared_row) {
  load_matrices(out, static_cast<uint32_t>(__cvta_generic_to_shared(shared_row)));
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
