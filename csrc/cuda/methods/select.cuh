// The last step of every method: the marked tokens as ascending indices. One block per image.
#pragma once
#include "device.cuh"

namespace vispruner::cuda {

constexpr int kMostThreads = 1024;  // per block

VP_HD int words(int bits) { return (bits + 31) / 32; }

// The sum over the lanes below.
__device__ __forceinline__ uint32_t sum_before(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
  uint32_t sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t left = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += left;
  }
  return sum - value;
}

// The marks of an image's tokens, in shared memory: a bit per token.
struct Marks {
  uint32_t* bits;         // (words(tokens))
  const uint16_t* order;  // of the positions

  __device__ __forceinline__ void clear(int tokens) const {
    for (int w = threadIdx.x; w < words(tokens); w += blockDim.x) bits[w] = 0;
  }
  __device__ __forceinline__ void set(int position) const {
    const int token = order[position];
    atomicOr(&bits[token / 32], 1u << (token % 32));
  }
};

// Writes the set bits of `keep` as ascending token numbers; each thread has some consecutive words.
__device__ __forceinline__ void write_indices(const uint32_t* keep, int tokens, int64_t base,
                                              int64_t* out, uint32_t* warp_sums) {
  const int each = (words(tokens) + blockDim.x - 1) / blockDim.x;
  const int first = min(static_cast<int>(threadIdx.x) * each, words(tokens));
  const int end = min(first + each, words(tokens));
  uint32_t own = 0;
  for (int w = first; w < end; ++w) own += __popc(keep[w]);
  uint32_t before = sum_before(own);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == kWarp - 1) warp_sums[warp] = before + own;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  for (int w = first; w < end; ++w) {
    for (uint32_t word = keep[w]; word; word &= word - 1) {
      out[before++] = base + w * 32 + __ffs(static_cast<int>(word)) - 1;
    }
  }
}

}  // namespace vispruner::cuda
