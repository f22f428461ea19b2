// Neighbour lists: for every residual token the (up to) 32 residual tokens most similar to it,
// best first, with the redundancy each would give.
//
// The list is complete above its last value, so "the first entry that is in B now" is the largest
// similarity to any token of B (ties change nothing: only the value counts). Any threshold that 32
// to 64 tokens reach gives the candidates, of which the best 32 stay; a bisection finds one in a
// few steps. If equal values cross the limit, some of them are taken.
//
// A row stays in the registers of one warp for up to 1024 tokens, and of one block for more. Bytes:
// 4 R^2 read, 192 R written. Steps per row: the extremes of each thread's values, two to four
// counts of R values, and the ranking of the candidates.
#include <type_traits>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "methods/lists.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kCandidates = 2 * kNeighbours;
constexpr int kValueProbes = 16;  // bisect between values first, then between their bit patterns

// Synchronizes the threads of a row.
template <int kWarps>
__device__ __forceinline__ void synchronize() {
  if constexpr (kWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The values of a row's threads, reduced for every one of them by `reduce`, which reduces those of
// a warp. `slots` alternates between two arrays, so that one barrier per call is enough.
template <int kWarps, typename Reduce>
__device__ __forceinline__ uint32_t over_row(uint32_t value, uint32_t identity, uint32_t* slots,
                                             const Reduce& reduce) {
  value = reduce(value);
  if constexpr (kWarps > 1) {
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) slots[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = reduce(lane < kWarps ? slots[lane] : identity);
  }
  return value;
}

template <int kThreads, int kValues>
__global__ void __launch_bounds__(kThreads)
    neighbours_kernel(Batch batch, int64_t channels, unsigned char* workspace) {
  begin_dependent(batch.more);
  constexpr int kWarps = kThreads / kWarp;
  __shared__ uint32_t slots[2][kWarps];
  alignas(16) __shared__ uint32_t found_keys[kCandidates];
  __shared__ uint16_t found_ids[kCandidates];
  __shared__ int found, ties_left;

  const Image image = batch[blockIdx.y];
  const int rows = image.shape.residual();
  const int self = blockIdx.x;
  if (self >= rows) return;
  const WorkspaceLayout at = workspace_layout(image.shape.tokens, rows, channels);
  unsigned char* own = workspace + image.workspace;
  const float* similarities = reinterpret_cast<const float*>(own + at.matrix) + self * at.ld;

  // 0 is below every key: not a token, or the token itself.
  uint32_t keys[kValues];
  uint32_t most = 0;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    const int j = threadIdx.x + v * kThreads;
    keys[v] = j < rows && j != self ? ordered_key(similarities[j]) : 0u;
    most = max(most, keys[v]);
  }
  if (threadIdx.x == 0) found = 0;
  for (int e = threadIdx.x; e < kCandidates; e += kThreads) found_keys[e] = 0;
  // At least kThreads keys, so 32 or more, are >= the smallest per-thread maximum.
  uint32_t low = over_row<kWarps>(most, UINT32_MAX, slots[0], [](uint32_t value) {
    return __reduce_min_sync(kAllLanes, value);
  });
  uint32_t high = over_row<kWarps>(
      most, 0, slots[1], [](uint32_t value) { return __reduce_max_sync(kAllLanes, value); });

  const auto count_from = [&](uint32_t threshold, int turn) {
    uint32_t count = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) count += keys[v] >= threshold;
    return static_cast<int>(over_row<kWarps>(count, 0, slots[turn & 1], [](uint32_t value) {
      return __reduce_add_sync(kAllLanes, value);
    }));
  };

  // 32 keys or more are >= low, fewer are > high, until the answer is between them.
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
  synchronize<kWarps>();

  const int lane = threadIdx.x % kWarp;
  int own_found = 0;  // with one warp per row, the warp counts without atomics
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    const bool take =
        keys[v] >= threshold || (ties > 0 && keys[v] == tied && atomicSub(&ties_left, 1) > 0);
    const unsigned taken = __ballot_sync(kAllLanes, take);
    if (!taken) continue;
    int slot = own_found;
    own_found += __popc(taken);
    if constexpr (kWarps > 1) {
      if (lane == 0) slot = atomicAdd(&found, __popc(taken));
      slot = __shfl_sync(kAllLanes, slot, 0);
    }
    if (take) {
      slot += __popc(taken & ((1u << lane) - 1));
      found_keys[slot] = keys[v];
      found_ids[slot] = static_cast<uint16_t>(threadIdx.x + v * kThreads);
    }
  }
  synchronize<kWarps>();
  const int count = kWarps > 1 ? found : own_found;
  if (threadIdx.x >= kCandidates) return;

  // For every candidate, the candidates ahead of it are counted, four at a time (equal ones in any
  // order: they give the same redundancy). Zeros, which are below all keys, follow the last one.
  constexpr int kEach = kThreads < kCandidates ? kCandidates / kThreads : 1;
  uint32_t key[kEach];
  int place[kEach] = {};
#pragma unroll
  for (int e = 0; e < kEach; ++e) key[e] = found_keys[(threadIdx.x + e * kThreads) % kCandidates];
  for (int first = 0; first < count; first += 4) {
    struct alignas(16) Four {
      uint32_t of[4];
    };
    const Four others = *reinterpret_cast<const Four*>(found_keys + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const bool after = first + i >= static_cast<int>(threadIdx.x) + e * kThreads;
        place[e] += others.of[i] >= key[e] + (after ? 1u : 0u);
      }
    }
  }

  // Reloaded: held until here, these would take registers that the row needs.
  int block = blockIdx.y;
  not_before(block);
  const Image out = batch[block];
  const WorkspaceLayout out_at = workspace_layout(out.shape.tokens, out.shape.residual(), channels);
  const ListsLayout lists_at = lists_layout(out.shape.residual());
  unsigned char* to = workspace + out.workspace;
  const float inv = reinterpret_cast<const float*>(to + out_at.inv)[self];
  auto* ids = reinterpret_cast<uint16_t*>(to + out_at.method + lists_at.ids);
  auto* redundancies = reinterpret_cast<uint32_t*>(to + out_at.method + lists_at.keys);
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int entry = threadIdx.x + e * kThreads;
    if (entry < count && place[e] < kNeighbours) {
      const int slot = list_slot(self, place[e]);
      ids[slot] = found_ids[entry];
      redundancies[slot] = ordered_key(key_float(key[e]) * inv);
    } else if (entry >= count && entry < kNeighbours) {
      // An unused entry: a token is never in B when its own list is read.
      const int slot = list_slot(self, entry);
      ids[slot] = static_cast<uint16_t>(self);
      redundancies[slot] = 0;
    }
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

}  // namespace

int neighbours(const Batch& batch, const WaveSize& size, int64_t channels, void* workspace,
               Stream stream) {
  const dim3 grid(size.residual, size.images);
  auto* ws = static_cast<unsigned char*>(workspace);
  const auto run = [&](auto threads, auto values) {
    static_assert(threads() * values() <= kMaxTokens, "");
    return launch_dependent<neighbours_kernel<threads(), values()>>(grid, threads(), 0, stream,
                                                                    batch, channels, ws);
  };
  const plan::Neighbours plan = plan::choose(plan::current().neighbours, size.residual);
  if (size.residual > plan::most_residual(plan)) {
    return refuse(
        "the plan for neighbours holds at most %d residual tokens, and an image has %d: "
        "use neighbours=auto",
        plan::most_residual(plan), size.residual);
  }
  switch (plan) {
    case plan::Neighbours::kWarp576: return run(Constant<32>{}, Constant<18>{});
    case plan::Neighbours::kWarp1024: return run(Constant<32>{}, Constant<32>{});
    case plan::Neighbours::kBlock4096: return run(Constant<256>{}, Constant<16>{});
    case plan::Neighbours::kBlock16384: return run(Constant<512>{}, Constant<32>{});
    default: return run(Constant<1024>{}, Constant<32>{});
  }
}

}  // namespace vispruner::cuda
