// The dedup loop and the selection: one block an image, one launch for all rounds.
//
// A round: (1) each token of A, one warp a token, looks for the first of its 32 neighbours that is
// in B now (one lane an entry, one vote; where there is none, the warp scans B); (2) A is sorted
// by redundancy, the r most redundant are dropped, and the next list is written. Two barriers a
// round while the list is short: ranks come from counting who beats whom. A longer list is sorted
// by warps and merged, a barrier a level.
//
// Steps at N = 576, k = 64: 64 dependent rounds of 136 tokens in A on average, each about 150
// cycles of latency for the look-up and 25k compares for the ranks.
#include <cstdlib>
#include <cstring>

#include "batch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kWords = kMaxTokens / 32;

VP_HD int64_t list_bytes(int residual) {
  return round_up(int64_t{residual} * kNeighbours * 2, 16) + int64_t{residual} * kNeighbours * 4;
}

__device__ __forceinline__ void copy_words(void* to, const void* from, int64_t bytes) {
  auto* out = static_cast<uint32_t*>(to);
  const auto* in = static_cast<const uint32_t*>(from);
  for (int64_t w = threadIdx.x; w < bytes / 4; w += blockDim.x) out[w] = in[w];
}

// What the rounds read of the stages before.
struct Similarity {
  const uint16_t* ids;   // (R, 32) neighbour lists, best first
  const uint32_t* keys;  // (R, 32) ordered keys of the redundancies they give
  const float* matrix;   // (R, ld) for tokens none of whose neighbours is in B
  int ld;
  const float* inv;  // (R)
};

// (1) keys[p] of the tokens at even list positions 2p; a warp has kLookups tokens in flight.
template <int kLookups>
__device__ __forceinline__ void look_up(const DedupState& state, const Similarity& similarity,
                                        const uint16_t* list, int n) {
  const int lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  const int a_count = half_up(n);
  for (int p0 = threadIdx.x / kWarp; p0 < a_count; p0 += warps * kLookups) {
    // Loads of several tokens overlap; the warp as a whole takes the same way through here.
    int token[kLookups];
    bool hit[kLookups];
#pragma unroll
    for (int u = 0; u < kLookups; ++u) {
      const int p = p0 + u * warps;
      token[u] = list[2 * (p < a_count ? p : p0)];
    }
#pragma unroll
    for (int u = 0; u < kLookups; ++u) {
      hit[u] = state.in_b[similarity.ids[token[u] * kNeighbours + lane]] != 0;
    }
#pragma unroll
    for (int u = 0; u < kLookups; ++u) {
      const int p = p0 + u * warps;
      if (p >= a_count) break;
      const unsigned hits = __ballot_sync(kAllLanes, hit[u]);
      uint32_t key;
      if (hits) {
        key = similarity.keys[token[u] * kNeighbours + __ffs(static_cast<int>(hits)) - 1];
      } else {
        uint32_t best = 0;
        const float* row = similarity.matrix + int64_t{token[u]} * similarity.ld;
#pragma unroll 1  // rare: not worth the registers
        for (int b = 2 * lane + 1; b < n; b += 2 * kWarp)
          best = max(best, ordered_key(row[list[b]]));
        best = __reduce_max_sync(kAllLanes, best);
        key = ordered_key(key_float(best) * similarity.inv[token[u]]);
      }
      if (lane == 0) state.keys[p] = key;
    }
  }
}

// Where the token at A position p, which has rank `rank`, goes: out, or on the next list.
__device__ __forceinline__ void place(const DedupState& state, const uint16_t* list, uint16_t* next,
                                      int p, int rank, int r) {
  const int token = list[2 * p];
  if (rank < r) {
    state.in_b[token] = 0;
  } else {
    next[rank - r] = static_cast<uint16_t>(token);
    state.in_b[token] = (rank - r) & 1;
  }
}

// (2) for a short A: a group of lanes counts who beats a token.
__device__ __forceinline__ void sort_by_counting(const DedupState& state, const uint16_t* list,
                                                 uint16_t* next, int a_count, int r) {
  int shift = 5;
  while (shift > 0 && static_cast<int>(blockDim.x >> shift) < a_count) --shift;
  const int lanes = 1 << shift, groups = blockDim.x >> shift;
  const int lane = threadIdx.x & (lanes - 1);
  // Every thread makes every turn, so that whole warps meet in the shuffles.
  for (int p0 = 0; p0 < a_count; p0 += groups) {
    const int p = p0 + (threadIdx.x >> shift);
    int rank = 0;
    if (p < a_count) {
      // Beaten by a higher key, or by an equal one of a lower position (keys are below 2^32 - 1).
      const uint32_t key = state.keys[p];
      for (int j = lane; j < a_count; j += lanes) {
        rank += state.keys[j] >= key + (j >= p ? 1u : 0u);
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      rank += __shfl_xor_sync(kAllLanes, rank, offset);
    }
    if (p < a_count && lane == 0) place(state, list, next, p, rank, r);
  }
}

// Ascending order of these words is the stable order by redundancy, highest first.
__device__ __forceinline__ uint64_t sort_word(uint32_t key, int p) {
  return (uint64_t{~key} << 32) | static_cast<uint32_t>(p);
}

// (2) for a long A: warps sort 32 words each, then sorted runs are merged in pairs; a word's
// place in the merged run is its own place plus the number of smaller words in the other run.
__device__ __forceinline__ void sort_by_merging(const DedupState& state, const uint16_t* list,
                                                uint16_t* next, int a_count, int r) {
  const int lane = threadIdx.x % kWarp;
  uint64_t* from = state.sorted[0];
  uint64_t* to = state.sorted[1];
  for (int base = threadIdx.x / kWarp * kWarp; base < a_count; base += blockDim.x) {
    const int p = base + lane;
    uint64_t word = p < a_count ? sort_word(state.keys[p], p) : ~uint64_t{0};
    for (int width = 2; width <= kWarp; width *= 2) {
      for (int offset = width / 2; offset > 0; offset /= 2) {
        const uint64_t other = __shfl_xor_sync(kAllLanes, word, offset);
        const bool keep_low = ((lane & offset) == 0) == ((lane & width) == 0);
        word = (word < other) == keep_low ? word : other;
      }
    }
    if (p < a_count) from[p] = word;
  }
  __syncthreads();
  for (int width = kWarp; width < a_count; width *= 2) {
    for (int x = threadIdx.x; x < a_count; x += blockDim.x) {
      const uint64_t word = from[x];
      const int pair = x & ~(2 * width - 1);
      const int other = pair + ((x & width) ? 0 : width);
      int low = min(other, a_count), high = min(other + width, a_count);
      const int other_begin = low;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (from[middle] < word) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      to[pair + (x & (width - 1)) + low - other_begin] = word;
    }
    __syncthreads();
    uint64_t* swapped = to;
    to = from;
    from = swapped;
  }
  for (int rank = threadIdx.x; rank < a_count; rank += blockDim.x) {
    place(state, list, next, static_cast<int>(static_cast<uint32_t>(from[rank])), rank, r);
  }
}

// Writes the set bits of `keep` as ascending token numbers; every thread has one word.
__device__ __forceinline__ void write_indices(const uint32_t* keep, int tokens, int64_t base,
                                              int64_t* out, int* warp_sums) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  uint32_t word = static_cast<int>(threadIdx.x) * 32 < tokens ? keep[threadIdx.x] : 0u;
  const int own = __popc(word);
  int before = own;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int left = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += left;
  }
  if (lane == kWarp - 1) warp_sums[warp] = before;
  __syncthreads();
  before -= own;
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  while (word) {
    const int bit = __ffs(static_cast<int>(word)) - 1;
    word &= word - 1;
    out[before++] = base + static_cast<int>(threadIdx.x) * 32 + bit;
  }
}

// All rounds; returns the list that is left.
template <int kLookups>
__device__ __forceinline__ const uint16_t* run_rounds(const DedupState& state,
                                                      const Similarity& similarity, int residual,
                                                      int diverse, int step) {
  uint16_t* list = state.list[0];
  uint16_t* next = state.list[1];
  for (int i = threadIdx.x; i < residual; i += blockDim.x) {
    list[i] = static_cast<uint16_t>(i);
    state.in_b[i] = i & 1;
  }
  __syncthreads();
  for (int n = residual; n > diverse;) {
    look_up<kLookups>(state, similarity, list, n);
    __syncthreads();
    const int a_count = half_up(n);
    const int r = min(min(step, n - diverse), a_count);
    if (a_count <= kMostCounting) {
      sort_by_counting(state, list, next, a_count, r);
    } else {
      sort_by_merging(state, list, next, a_count, r);
    }
    for (int b = threadIdx.x; b < n / 2; b += blockDim.x) {
      const int token = list[2 * b + 1];
      const int slot = a_count - r + b;
      next[slot] = static_cast<uint16_t>(token);
      state.in_b[token] = slot & 1;
    }
    __syncthreads();
    uint16_t* swapped = list;
    list = next;
    next = swapped;
    n -= r;
  }
  return list;
}

template <bool kListsShared, bool kStateShared>
__global__ void __launch_bounds__(kMostThreads, 1)
    dedup_kernel(Batch batch, int64_t channels, int step, int64_t* indices,
                 unsigned char* workspace) {
  begin_dependent();
  VP_SHARED_MEMORY(shared);
  __shared__ uint32_t keep[kWords];
  __shared__ int warp_sums[kMostThreads / kWarp];

  const Image image = batch[blockIdx.x];
  const int residual = image.shape.residual();
  const WorkspaceLayout at = workspace_layout(image.shape.tokens, residual, channels);
  unsigned char* own = workspace + image.workspace;
  const auto* order = reinterpret_cast<const uint16_t*>(own + at.order);

  for (int w = threadIdx.x; w < kWords; w += blockDim.x) keep[w] = 0;
  __syncthreads();
  const auto mark = [&](int rank) {
    const int token = order[rank];
    atomicOr(&keep[token / 32], 1u << (token % 32));
  };
  for (int r = threadIdx.x; r < image.shape.important; r += blockDim.x) mark(r);

  if (residual > 0) {
    DedupState state{};
    const int64_t used = carve(&state, kStateShared ? shared : own + at.state, residual);
    Similarity similarity{reinterpret_cast<const uint16_t*>(own + at.ids),
                          reinterpret_cast<const uint32_t*>(own + at.keys),
                          reinterpret_cast<const float*>(own + at.gram), static_cast<int>(at.ld),
                          reinterpret_cast<const float*>(own + at.inv)};
    if constexpr (kListsShared) {
      const int64_t ids_bytes = int64_t{residual} * kNeighbours * 2;
      auto* ids = reinterpret_cast<uint16_t*>(shared + used);
      auto* keys = reinterpret_cast<uint32_t*>(shared + used + round_up(ids_bytes, 16));
      copy_words(ids, similarity.ids, ids_bytes);
      copy_words(keys, similarity.keys, 2 * ids_bytes);
      similarity.ids = ids;
      similarity.keys = keys;
    }
    const uint16_t* survivors =
        run_rounds<kStateShared ? 4 : 2>(state, similarity, residual, image.shape.diverse, step);
    for (int i = threadIdx.x; i < image.shape.diverse; i += blockDim.x) {
      mark(image.shape.important + survivors[i]);
    }
  }
  __syncthreads();
  write_indices(keep, image.shape.tokens, image.index_base, indices + image.first_kept, warp_sums);
}

// Where the loop's arrays live: as near to the threads as they fit.
struct DedupPlan {
  enum Kind { kListsShared, kStateShared, kWorkspace } kind;
  int shared_bytes;
};

// VISPRUNER_DEDUP_PLAN=lists_shared|state_shared|workspace asks for a plan; one that does not fit
// gives way to the next.
DedupPlan choose_plan(int residual, int shared_limit) {
  constexpr int64_t kReserved = 8 * 1024;  // static shared memory, and what the driver takes
  const int64_t room = shared_limit - kReserved;
  const int64_t state = dedup_state_bytes(residual);
  const int64_t all = state + list_bytes(residual);
  const char* wanted = std::getenv("VISPRUNER_DEDUP_PLAN");
  const auto allowed = [&](const char* name, int64_t bytes) {
    return bytes <= room && (!wanted || std::strcmp(wanted, name) == 0);
  };
  if (allowed("lists_shared", all)) return {DedupPlan::kListsShared, static_cast<int>(all)};
  if (wanted && std::strcmp(wanted, "lists_shared") == 0) wanted = "state_shared";
  if (allowed("state_shared", state)) return {DedupPlan::kStateShared, static_cast<int>(state)};
  return {DedupPlan::kWorkspace, 0};
}

int threads_for(const WaveSize& size) {
  // Enough lanes for the ranks of A, and one thread a word of the selection.
  const int wanted = size.residual * 2 > size.tokens / 32 ? size.residual * 2 : size.tokens / 32;
  for (int threads = 128; threads < kMostThreads; threads *= 2) {
    if (threads >= wanted) return threads;
  }
  return kMostThreads;
}

}  // namespace

int dedup_and_select(const Batch& batch, const WaveSize& size, int64_t channels, int step,
                     int64_t* indices, void* workspace, void* stream) {
  int limit = 0;
  if (const int error = shared_memory_limit(&limit)) return error;
  const DedupPlan plan = choose_plan(size.residual, limit);
  const int threads = threads_for(size);
  auto* ws = static_cast<unsigned char*>(workspace);
  switch (plan.kind) {
    case DedupPlan::kListsShared:
      return launch_dependent<dedup_kernel<true, true>>(size.images, threads, plan.shared_bytes,
                                                        stream, batch, channels, step, indices, ws);
    case DedupPlan::kStateShared:
      return launch_dependent<dedup_kernel<false, true>>(
          size.images, threads, plan.shared_bytes, stream, batch, channels, step, indices, ws);
    default:
      return launch_dependent<dedup_kernel<false, false>>(size.images, threads, 0, stream, batch,
                                                          channels, step, indices, ws);
  }
}

}  // namespace vispruner::cuda
