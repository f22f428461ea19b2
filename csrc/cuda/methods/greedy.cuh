// Greedy selection: picks tokens one after the other, each time the one with the highest key. One
// block per image, one launch for all picks; a thread holds its tokens' state in registers.
#pragma once
#include <type_traits>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "methods/select.cuh"

namespace vispruner::cuda {

// A token and its key: an ordered_key, or kTaken.
struct Candidate {
  uint32_t key;
  int token;

  // Replaces the candidate if the key is higher. Of equal keys the first stays, because tokens come
  // in ascending order.
  __device__ __forceinline__ void raise(uint32_t other_key, int other) {
    if (other_key > key) *this = {other_key, other};
  }
};
constexpr uint32_t kTaken = 0;  // below the key of every value
__device__ __forceinline__ Candidate no_candidate() { return {kTaken, kMaxTokens}; }

__device__ __forceinline__ Candidate best_of_warp(const Candidate& own) {
  const uint32_t key = __reduce_max_sync(kAllLanes, own.key);
  const int token = own.key == key ? own.token : kMaxTokens;
  return {key, __reduce_min_sync(kAllLanes, token)};
}

// The best of the block, known to all threads. `slots` alternates between two arrays from call to
// call, so that one barrier is enough.
__device__ __forceinline__ Candidate best_of_block(const Candidate& own, Candidate* slots) {
  const Candidate of_warp = best_of_warp(own);
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return best_of_warp(lane < static_cast<int>(blockDim.x) / kWarp ? slots[lane] : no_candidate());
}

// The best of all tokens, by an array of keys; known to all threads, all of which must call it.
__device__ __forceinline__ Candidate best_of(const uint32_t* keys, int tokens, Candidate* slots) {
  Candidate best = no_candidate();
#pragma unroll 4
  for (int t = threadIdx.x; t < tokens; t += blockDim.x) best.raise(keys[t], t);
  return best_of_block(best, slots);
}

// The highest score of an image (at least 0 and finite).
__device__ __forceinline__ float highest_score(const uint32_t* scores, int tokens,
                                               Candidate* slots) {
  return positive_score(key_float(best_of(scores, tokens, slots).key));
}

// Token v of a thread.
__device__ __forceinline__ int own_token(int v) {
  return static_cast<int>(threadIdx.x) + v * static_cast<int>(blockDim.x);
}

// The arrays of an image that a rule reads.
struct GreedyImage {
  int tokens;
  const uint32_t* scores;  // (N) ordered keys, where the method reads them
  const float* matrix;     // (N, ld)
  int64_t ld;
  const float* inv;    // (N)
  unsigned char* own;  // the method's arrays

  __device__ __forceinline__ float importance_of(int token, float highest) const {
    return importance(positive_score(key_float(scores[token])), highest);
  }
};

__device__ __forceinline__ GreedyImage greedy_image(const Image& image, const WorkspaceLayout& at,
                                                    unsigned char* own) {
  return {image.shape.residual(),
          reinterpret_cast<const uint32_t*>(own + at.scores),
          reinterpret_cast<const float*>(own + at.matrix),
          at.ld,
          reinterpret_cast<const float*>(own + at.inv),
          own + at.method};
}

// One value per token of a thread: in registers, or for many tokens in the method's arrays.
constexpr int kMostInRegisters = 4;
template <typename T, int kValues>
struct OwnValues {
  T values[kValues <= kMostInRegisters ? kValues : 1];
  T* far;  // (N)

  __device__ __forceinline__ explicit OwnValues(void* array) : far(static_cast<T*>(array)) {}
  __device__ __forceinline__ T& operator[](int v) {
    if constexpr (kValues <= kMostInRegisters) {
      return values[v];
    } else {
      return far[own_token(v)];
    }
  }
};

// The selection with the rule of a method, for methods that read one row of similarities per pick.
//
//   Rule(image, parameter, slots)   has kValues tokens: own_token(v) for v in [0, kValues)
//   uint32_t key(int v)             the key of the token
//   void take(int v)                it is picked
//   void see(int v, float cosine, bool first)   the cosine to the pick
template <typename Rule>
__global__ void __launch_bounds__(kMostThreads, 1)
    greedy_kernel(Batch batch, int64_t channels, float parameter, int64_t* indices,
                  unsigned char* workspace) {
  begin_dependent(batch.more);
  VP_SHARED_MEMORY(memory);
  __shared__ Candidate slots[2][kMostThreads / kWarp];
  __shared__ uint32_t warp_sums[kMostThreads / kWarp];

  const Image image = batch[blockIdx.x];
  const int residual = image.shape.residual();  // all of its tokens, or none
  const WorkspaceLayout at = workspace_layout(image.shape.tokens, residual, channels);
  unsigned char* own = workspace + image.workspace;
  const Marks marks{reinterpret_cast<uint32_t*>(memory),
                    reinterpret_cast<const uint16_t*>(own + at.order)};
  marks.clear(image.shape.tokens);
  __syncthreads();
  for (int r = threadIdx.x; r < image.shape.important; r += blockDim.x) marks.set(r);

  if (residual > 0) {
    const GreedyImage view = greedy_image(image, at, own);
    Rule rule(view, parameter, slots[1]);
    for (int pick = 0;; ++pick) {
      Candidate best = no_candidate();
#pragma unroll kMostInRegisters
      for (int v = 0; v < Rule::kValues; ++v) {
        const int token = own_token(v);
        if (token < residual) best.raise(rule.key(v), token);
      }
      best = best_of_block(best, slots[pick & 1]);
      if (threadIdx.x == 0) marks.set(best.token);
      if (pick == image.shape.diverse - 1) break;
      const float* row = view.matrix + best.token * view.ld;
      const float inv = view.inv[best.token];
#pragma unroll kMostInRegisters
      for (int v = 0; v < Rule::kValues; ++v) {
        const int token = own_token(v);
        if (token >= residual) continue;
        rule.see(v, row[token] * inv, pick == 0);
        if (token == best.token) rule.take(v);
      }
    }
  }
  __syncthreads();
  write_indices(marks.bits, image.shape.tokens, image.index_base, indices + image.first_kept,
                warp_sums);
}

// Launches it; RuleOf<kValues> is the rule for kValues tokens per thread.
template <template <int> class RuleOf>
int select_greedily(const Batch& batch, const WaveSize& size, int64_t channels, float parameter,
                    int64_t* indices, void* workspace, Stream stream) {
  const auto run = [&](auto values) {
    const int each = (size.residual + values() - 1) / values();
    const auto threads = static_cast<int>(round_up(each > kWarp ? each : kWarp, kWarp));
    return launch_dependent<greedy_kernel<RuleOf<values()>>>(
        size.images, threads, words(size.tokens) * 4, stream, batch, channels, parameter, indices,
        static_cast<unsigned char*>(workspace));
  };
  if (size.residual <= kMostThreads) return run(std::integral_constant<int, 1>{});
  if (size.residual <= 4 * kMostThreads) return run(std::integral_constant<int, 4>{});
  return run(std::integral_constant<int, kMaxTokens / kMostThreads>{});
}

}  // namespace vispruner::cuda
