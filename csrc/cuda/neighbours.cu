// Neighbour lists: for every residual token the (up to) 32 residual tokens most similar to it,
// best first, with the redundancy each would give.
//
// The list is complete above its last value, so "the first entry that is in B now" is the largest
// similarity to any token of B (ties change nothing: only the value counts). Any threshold that 32
// to 64 tokens reach yields candidates, of which the best 32 stay; a bisection finds one in a few
// steps. Where a value ties across the limit, some of its ties are taken.
//
// A block takes one row; the row stays in registers. Bytes: 4 R^2 read, 192 R written. Steps:
// about 8 counts of R values, one barrier each, and the ranking of the candidates.
#include "batch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kCandidates = 2 * kNeighbours;
constexpr int kValueProbes = 16;  // bisect between values first, then between their bit patterns

// Sum over the block, known to every thread. `slots` alternates between two arrays, so that one
// barrier a call is enough.
template <int kWarps>
__device__ __forceinline__ int block_sum(int value, int* slots) {
  value = __reduce_add_sync(kAllLanes, value);
  if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = value;
  __syncthreads();
  int sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += slots[w];
  return sum;
}

template <int kThreads, int kValues>
__global__ void __launch_bounds__(kThreads)
    neighbours_kernel(Batch batch, int64_t channels, unsigned char* workspace) {
  begin_dependent();
  constexpr int kWarps = kThreads / kWarp;
  __shared__ int slots[2][kWarps];
  __shared__ uint32_t lows[kWarps], highs[kWarps];
  __shared__ uint32_t found_keys[kCandidates];
  __shared__ uint16_t found_ids[kCandidates];
  __shared__ int found, ties_left;

  const Image image = batch[blockIdx.y];
  const int rows = image.shape.residual();
  const int self = blockIdx.x;
  if (self >= rows) return;
  const WorkspaceLayout at = workspace_layout(image.shape.tokens, rows, channels);
  unsigned char* own = workspace + image.workspace;
  const float* similarities = reinterpret_cast<const float*>(own + at.gram) + self * at.ld;

  // 0 is below every key: not a token, or the token itself.
  uint32_t keys[kValues];
  uint32_t low = 0xffffffffu, high = 0;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    const int j = threadIdx.x + v * kThreads;
    keys[v] = j < rows && j != self ? ordered_key(similarities[j]) : 0u;
    if (keys[v]) {
      low = min(low, keys[v]);
      high = max(high, keys[v]);
    }
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (threadIdx.x % kWarp == 0) {
    lows[threadIdx.x / kWarp] = low;
    highs[threadIdx.x / kWarp] = high;
  }
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    low = min(low, lows[w]);
    high = max(high, highs[w]);
  }

  const auto count_from = [&](uint32_t threshold, int turn) {
    int count = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) count += keys[v] >= threshold;
    return block_sum<kWarps>(count, slots[turn & 1]);
  };

  // More than 64 keys are >= low, fewer than 32 are > high, until the answer is between them.
  uint32_t threshold = 1;  // few tokens: all of them
  uint32_t tied = 0;
  int ties = 0;
  if (rows - 1 > kCandidates) {
    for (int turn = 0;; ++turn) {
      if (low == high) {
        threshold = low + 1;
        tied = low;
        ties = kNeighbours - count_from(threshold, turn);
        break;
      }
      uint32_t probe = 0;
      if (turn < kValueProbes) probe = ordered_key(0.5f * key_float(low) + 0.5f * key_float(high));
      if (probe <= low || probe > high) probe = low + (high - low + 1) / 2;
      const int count = count_from(probe, turn);
      if (count > kCandidates) {
        low = probe;
      } else if (count < kNeighbours) {
        high = probe - 1;
      } else {
        threshold = probe;
        break;
      }
    }
  }
  if (threadIdx.x == 0) ties_left = ties;
  __syncthreads();

  // Collect in any order; then every entry counts the ones before it.
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    if (keys[v] >= threshold || (ties > 0 && keys[v] == tied && atomicSub(&ties_left, 1) > 0)) {
      const int slot = atomicAdd(&found, 1);
      found_keys[slot] = keys[v];
      found_ids[slot] = static_cast<uint16_t>(threadIdx.x + v * kThreads);
    }
  }
  __syncthreads();
  if (threadIdx.x >= kCandidates) return;
  const int entry = threadIdx.x;
  auto* ids = reinterpret_cast<uint16_t*>(own + at.ids);
  auto* redundancies = reinterpret_cast<uint32_t*>(own + at.keys);
  if (entry >= found) {  // an unused entry: a token is never in B when its own list is read
    if (entry >= kNeighbours) return;
    ids[id_slot(self, entry)] = static_cast<uint16_t>(self);
    redundancies[key_slot(self, entry)] = 0;
    return;
  }
  const uint32_t key = found_keys[entry];
  const int id = found_ids[entry];
  int place = 0;
  for (int other = 0; other < found; ++other) {
    place += found_keys[other] > key || (found_keys[other] == key && found_ids[other] < id);
  }
  if (place >= kNeighbours) return;
  const float inv = reinterpret_cast<const float*>(own + at.inv)[self];
  ids[id_slot(self, place)] = static_cast<uint16_t>(id);
  redundancies[key_slot(self, place)] = ordered_key(key_float(key) * inv);
}

}  // namespace

int neighbours(const Batch& batch, const WaveSize& size, int64_t channels, void* workspace,
               void* stream) {
  const dim3 grid(size.residual, size.images);
  auto* ws = static_cast<unsigned char*>(workspace);
  if (size.residual <= 128 * 8) {
    return launch_dependent<neighbours_kernel<128, 8>>(grid, 128, 0, stream, batch, channels, ws);
  }
  if (size.residual <= 256 * 16) {
    return launch_dependent<neighbours_kernel<256, 16>>(grid, 256, 0, stream, batch, channels, ws);
  }
  if (size.residual <= 512 * 32) {
    return launch_dependent<neighbours_kernel<512, 32>>(grid, 512, 0, stream, batch, channels, ws);
  }
  static_assert(1024 * 32 >= kMaxTokens, "the longest row fits the largest block");
  return launch_dependent<neighbours_kernel<1024, 32>>(grid, 1024, 0, stream, batch, channels, ws);
}

}  // namespace vispruner::cuda
