// Runs CUDA kernel source on the host, for tests where there is no GPU: one fiber a thread, blocks
// one after another. Barriers, warp collectives, shared memory and atomics behave as on a device;
// the inline instructions of device.cuh have plain C++ twins here.
//
// This shows the kernels' logic. It shows nothing of races between warps beyond the order that the
// schedule happens to take (three are tried), of alignment, of memory ordering or of speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "vispruner/numerics.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time: a static is the block's

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

extern dim3 thread_index, block_index, block_size;
extern unsigned char* dynamic_shared;
constexpr int kMostShared = 227 * 1024;
extern int shared_limit;  // what shared_memory_limit reports: tests force launch plans with it

// Order of the warps, and of the threads in them: 0 ascending, 1 descending, else a shuffle with
// this seed. A missing barrier shows in at least one of the first two.
extern unsigned schedule;

// Threads that have called begin_dependent(): every one has to.
extern int64_t begun;
void check_begun(int64_t threads);

void block_barrier();
bool block_barrier_or(bool vote);

// Every lane hands in `bytes` and gets all 32 lanes' values back, kSlotBytes apart.
constexpr int kSlotBytes = 32;
const unsigned char* exchange(unsigned mask, const void* value, int bytes);
int lane();

int run_grid(dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel);

template <typename T>
T from_lane(const unsigned char* slots, int lane) {
  T value;
  std::memcpy(&value, slots + lane * kSlotBytes, sizeof value);
  return value;
}

template <typename T, typename Fold>
T reduce(unsigned mask, T value, const Fold& fold) {
  const unsigned char* slots = exchange(mask, &value, sizeof value);
  T result = from_lane<T>(slots, 0);
  for (int l = 1; l < 32; ++l) result = fold(result, from_lane<T>(slots, l));
  return result;
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size

inline void __syncthreads() { simt::block_barrier(); }
inline int __syncthreads_or(int vote) { return simt::block_barrier_or(vote != 0); }

inline void __syncwarp() {
  const char nothing = 0;
  simt::exchange(~0u, &nothing, 1);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  const int from = simt::lane() ^ offset;
  return simt::from_lane<T>(simt::exchange(mask, &value, sizeof value), from);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return simt::from_lane<T>(simt::exchange(mask, &value, sizeof value), from % 32);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int offset) {
  const int from = simt::lane() >= offset ? simt::lane() - offset : simt::lane();
  return simt::from_lane<T>(simt::exchange(mask, &value, sizeof value), from);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const unsigned own = vote ? 1u << simt::lane() : 0u;
  return simt::reduce(mask, own, [](unsigned a, unsigned b) { return a | b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return simt::reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return simt::reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return simt::reduce(mask, value, [](T a, T b) { return a + b; });
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
template <typename T>
T atomicSub(T* at, T value) {
  const T old = *at;
  *at -= value;
  return old;
}
template <typename T>
T atomicExch(T* at, T value) {
  return std::exchange(*at, value);
}
template <typename T>
T atomicOr(T* at, T value) {
  const T old = *at;
  *at |= value;
  return old;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  }
  return sum;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
using std::max;
using std::min;

// ---- twins of csrc/cuda/device.cuh ------------------------------------------------------------
#define VP_SHARED_MEMORY(name) unsigned char* name = simt::dynamic_shared

namespace vispruner::cuda {

template <auto kKernel, typename... Args>
int launch(dim3 grid, int threads, int shared_bytes, void*, const Args&... args) {
  return simt::run_grid(grid, threads, shared_bytes, [&] { kKernel(args...); });
}

template <auto kKernel, typename... Args>
int launch_dependent(dim3 grid, int threads, int shared_bytes, void* stream, const Args&... args) {
  simt::begun = 0;
  const int e = launch<kKernel>(grid, threads, shared_bytes, stream, args...);
  simt::check_begun(int64_t{grid.x} * grid.y * grid.z * threads);
  return e;
}
inline void begin_dependent() { ++simt::begun; }

inline int shared_memory_limit(int* bytes) {
  *bytes = simt::shared_limit;
  return 0;
}

inline void copy_async_16(void* shared, const void* global) { std::memcpy(shared, global, 16); }
inline void copy_async_commit() {}
template <int kPending>
void copy_async_wait() {}

inline void not_before(int&) {}

inline void load_matrices(uint32_t (&out)[4], const void* shared_row) {
  const unsigned char* slots = simt::exchange(~0u, &shared_row, sizeof shared_row);
  const int lane = simt::lane();
  for (int m = 0; m < 4; ++m) {
    const auto* row = simt::from_lane<const unsigned char*>(slots, 8 * m + lane / 4);
    std::memcpy(&out[m], row + 4 * (lane % 4), 4);
  }
}

// The matrix instructions: a is 16 rows of 32 bytes, b 8 columns of 32 bytes, and a lane holds the
// 4 bytes at 4 (lane % 4) of both halves of row lane / 4, of row lane / 4 + 8, and of column lane
// / 4.
template <typename Element, typename Sum>
void multiply_fragments(Sum (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr int kElements = 4 / sizeof(Element);
  struct Fragment {
    Element a[4][kElements], b[2][kElements];
  } own;
  std::memcpy(own.a, a, 16);
  std::memcpy(own.b[0], &b0, 4);
  std::memcpy(own.b[1], &b1, 4);
  const unsigned char* slots = simt::exchange(~0u, &own, sizeof own);
  const auto fragment = [&](int lane) {
    return reinterpret_cast<const Fragment*>(slots + lane * simt::kSlotBytes);
  };
  const auto value = [](Element x) {
    if constexpr (sizeof(Element) == 1) {
      return static_cast<Sum>(x);
    } else {
      return vispruner::to_float(x);
    }
  };
  const int lane = simt::lane();
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4, column = lane % 4 * 2 + e % 2, lower = e / 2;  // rows 8 to 15
    for (int t = 0; t < 4; ++t) {
      const Fragment* x = fragment(row * 4 + t);
      const Fragment* y = fragment(column * 4 + t);
      for (int i = 0; i < kElements; ++i) {
        sum[e] += value(x->a[lower][i]) * value(y->b[0][i]);
        sum[e] += value(x->a[2 + lower][i]) * value(y->b[1][i]);
      }
    }
  }
}

inline void multiply_add_s8(int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<int8_t>(sum, a, b0, b1);
}
template <typename Element>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Element) {
  multiply_fragments<Element>(sum, a, b0, b1);
}

}  // namespace vispruner::cuda
