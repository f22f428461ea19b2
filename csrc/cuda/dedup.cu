// The dedup loop and the selection: one block an image, one launch for all rounds.
//
// A round: (1) each token of A looks for the first of its 32 neighbours that is in B now; one to
// eight lanes share a token, a lane probes four entries at once. (2) Where there is none, a warp
// scans B. (3) A is sorted by redundancy, the r most redundant are dropped, and the next list is
// written. A short A is ranked by counting who beats whom. A longer one goes through buckets, whose
// widths follow the spread of the round before, so that each holds a few tokens. Only where many
// redundancies agree to the last bits, so that buckets are crowded, is it counted or merged.
//
// A round waits for two to four barriers. What bounds it is latency, and the shared memory's one
// access of a warp a cycle: counting takes A^2 / 32 of them, 2300 for the 272 tokens of a first
// round, and that is why there are buckets (docs/performance.md).
#include <type_traits>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kMostThreads = 1024;    // a block
constexpr int kMostFarThreads = 512;  // with its arrays in the workspace: addresses of 64 bits
constexpr int kProbes = 4;            // entries of a neighbour list that a lane looks at together
constexpr int kBuckets = 1024;        // 64 an octave of distance from the most redundant token
constexpr int kMostInBucket = 64;     // more in one, and the buckets are given up
constexpr int kOctaves = 16;

// What the block always has in shared memory.
struct Shared {
  uint32_t* counts;    // (kBuckets) tokens; zero outside of a ranking
  uint32_t* heads;     // (kBuckets) A position of the token that came last
  uint32_t* spans;     // (kBuckets) tokens << 16 | tokens in the buckets of its 32 before it
  uint32_t* before;    // (2, 32) tokens in the buckets before each 32: of this round, of the next
  uint32_t* extremes;  // (2, 2) highest and lowest key: of the round before, and of this one
  uint32_t* missing;   // (1) tokens of A that have no neighbour in B
  uint32_t* in_b;      // (2, R / 32) which tokens are in B: in this round, and in the next
  uint32_t* keep;      // (N / 32) which tokens are selected
};

struct SharedLayout {  // in 32-bit words, but for the last
  int64_t heads, spans, before, extremes, missing, in_b, keep, bytes;
};

VP_HD int words(int bits) { return (bits + 31) / 32; }

VP_HD SharedLayout shared_layout(int tokens, int residual) {
  SharedLayout at{};
  at.heads = kBuckets;
  at.spans = at.heads + kBuckets;
  at.before = at.spans + kBuckets;
  at.extremes = at.before + 2 * (kBuckets / 32);
  at.missing = at.extremes + 4;
  at.in_b = at.missing + 1;
  at.keep = at.in_b + 2 * words(residual);
  at.bytes = round_up((at.keep + words(tokens)) * 4, 16);
  return at;
}

struct DedupState {  // the arrays of DedupLayout
  uint64_t* sorted[2];
  uint32_t* keys;
  uint16_t* chain;
  uint16_t* lists;
};

VP_HD int64_t list_bytes(int residual) {
  return round_up(int64_t{residual} * kNeighbours * 2, 16) + int64_t{residual} * kNeighbours * 4;
}

// What the rounds read of the stages before.
struct Similarity {
  const uint16_t* ids;   // (R, 32) neighbour lists, best first (id_slot)
  const uint32_t* keys;  // (R, 32) ordered keys of the redundancies they give (key_slot)
  const float* matrix;   // (R, ld) for tokens none of whose neighbours is in B
  int ld;
  const float* inv;  // (R)
};

struct Round {
  const uint16_t* list;  // (n) tokens: A at even positions, B at odd ones
  uint16_t* next;        // the list after this round
  const uint32_t* in_b;
  uint32_t* next_in_b;
  uint32_t* before;
  uint32_t* next_before;
  const uint32_t* extremes;
  uint32_t* next_extremes;
  int n, a_count, r;
  bool buckets;  // A is to be ranked by them
};

// Which bucket a key falls into: by its distance from the highest key of the round before, on a
// logarithmic scale (the bits of a float are its logarithm, linear between powers of two) that
// ends at twice the distance of the lowest. Any rule that never falls with the key would give the
// same ranks; redundancies bunch near the highest, and this one still spreads them.
struct BucketRule {
  float high;
  int first;

  __device__ __forceinline__ explicit BucketRule(const uint32_t* extremes)
      : high(key_float(extremes[0])), first(distance(extremes[1]) - ((kOctaves - 1) << 23)) {}

  __device__ __forceinline__ int operator()(uint32_t key) const {
    constexpr int kShift = 23 + 4 - 10;  // bits of an octave, times octaves, over buckets
    static_assert(kOctaves == 1 << 4 && kBuckets == 1 << 10, "");
    return min(max((distance(key) - first) >> kShift, 0), kBuckets - 1);
  }

  // The bits; redundancies are within [-1, 1] and a rounding error, so that sums stay in range.
  __device__ __forceinline__ int distance(uint32_t key) const {
    return static_cast<int>(float_bits(max(high - key_float(key), 0.0f)));
  }
};

// The redundancy of the token at A position p is known.
__device__ __forceinline__ void store_key(const Shared& shared, const DedupState& state,
                                          const Round& round, const BucketRule& bucket, int p,
                                          uint32_t key) {
  state.keys[p] = key;
  if (!round.buckets) return;
  const int b = bucket(key);
  atomicAdd(&shared.counts[b], 1u);
  // The first token of a bucket gets what the head was before; its count ends the chain there.
  state.chain[p] = static_cast<uint16_t>(atomicExch(&shared.heads[b], static_cast<uint32_t>(p)));
}

// How many lanes, a power of two up to 2^most, share a token of A: as many as there are threads
// for.
__device__ __forceinline__ int log2_lanes(int most, int a_count) {
  while (most > 0 && static_cast<int>(blockDim.x >> most) < a_count) --most;
  return most;
}

// (1) The keys of A, as far as the neighbour lists tell them; the other positions are left in
// `next`. Returns whether this thread left one.
__device__ __forceinline__ bool look_up(const Shared& shared, const DedupState& state,
                                        const Similarity& similarity, const Round& round) {
  struct alignas(2 * kProbes) Ids {
    uint16_t of[kProbes];
  };
  const BucketRule bucket(round.extremes);
  const int lane = threadIdx.x % kWarp;
  const int shift = log2_lanes(3, round.a_count);
  static_assert(kProbes << 3 == kNeighbours, "eight lanes see the whole list");
  const int lanes = 1 << shift, own = lane & (lanes - 1);
  const unsigned team = ((1u << lanes) - 1) << (lane - own);
  bool left = false;
  for (int p0 = threadIdx.x / kWarp * (kWarp >> shift); p0 < round.a_count;
       p0 += blockDim.x >> shift) {
    const int p = p0 + (lane >> shift);
    bool open = p < round.a_count;
    const int token = round.list[2 * (open ? p : p0)];
    for (int first = 0; first < kNeighbours; first += lanes * kProbes) {
      const int entry = first + own * kProbes;
      const Ids ids = *reinterpret_cast<const Ids*>(similarity.ids + id_slot(token, entry));
      unsigned hits = 0;
#pragma unroll
      for (int i = 0; i < kProbes; ++i) {
        const uint32_t id = ids.of[i];
        hits |= (round.in_b[id / 32] >> (id % 32) & 1u) << i;
      }
      const unsigned votes = __ballot_sync(kAllLanes, open && hits) & team;
      if (votes) {
        open = false;
        if (lane == __ffs(static_cast<int>(votes)) - 1) {
          const int best = entry + __ffs(static_cast<int>(hits)) - 1;
          store_key(shared, state, round, bucket, p, similarity.keys[key_slot(token, best)]);
        }
      }
      if (!__ballot_sync(kAllLanes, open)) break;
    }
    if (open && own == 0) {
      left = true;
      round.next[atomicAdd(shared.missing, 1u)] = static_cast<uint16_t>(p);
    }
  }
  return left;
}

// (2) The keys that look_up left, one warp a token.
__device__ __forceinline__ void scan_missing(const Shared& shared, const DedupState& state,
                                             const Similarity& similarity, const Round& round) {
  const BucketRule bucket(round.extremes);
  const int lane = threadIdx.x % kWarp;
  const auto missing = static_cast<int>(*shared.missing);
  for (int m = threadIdx.x / kWarp; m < missing; m += blockDim.x / kWarp) {
    const int p = round.next[m];
    const int token = round.list[2 * p];
    const float* row = similarity.matrix + int64_t{token} * similarity.ld;
    uint32_t best = 0;
#pragma unroll 4
    for (int b = 2 * lane + 1; b < round.n; b += 2 * kWarp) {
      best = max(best, ordered_key(row[round.list[b]]));
    }
    best = __reduce_max_sync(kAllLanes, best);
    if (lane == 0) {
      const float redundancy = key_float(best) * similarity.inv[token];
      store_key(shared, state, round, bucket, p, ordered_key(redundancy));
    }
  }
}

// The token comes to this place of the next list.
__device__ __forceinline__ void put(const Round& round, int slot, int token) {
  round.next[slot] = static_cast<uint16_t>(token);
  if (slot & 1) atomicOr(&round.next_in_b[token / 32], 1u << (token % 32));
}

// B follows the survivors of A, in its old order.
__device__ __forceinline__ void move_b(const Round& round) {
  // From the last thread on: the first ones have more to do in the rankings.
  for (int b = blockDim.x - 1 - threadIdx.x; b < round.n / 2; b += blockDim.x) {
    put(round, round.a_count - round.r + b, round.list[2 * b + 1]);
  }
}

// Where the token at A position p, which has rank `rank`, goes: out, or on the next list.
__device__ __forceinline__ void place(const DedupState& state, const Round& round, int p,
                                      int rank) {
  if (rank == 0) round.next_extremes[0] = state.keys[p];
  if (rank == round.a_count - 1) round.next_extremes[1] = state.keys[p];
  if (rank >= round.r) put(round, rank - round.r, round.list[2 * p]);
}

// Beaten by a higher key, or by an equal one of a lower position (keys are below 2^32 - 1).
__device__ __forceinline__ bool beats(const DedupState& state, int other, uint32_t key, int p) {
  return state.keys[other] >= key + (other >= p ? 1u : 0u);
}

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

// (3) for a longer A: a token's rank is the tokens in the buckets before its own and those of its
// own that beat it. False, and nothing done, where a bucket is crowded.
__device__ __forceinline__ bool sort_by_buckets(const Shared& shared, const DedupState& state,
                                                const Round& round) {
  const int lane = threadIdx.x % kWarp;
  bool crowded = false;
  for (int b = threadIdx.x; b < kBuckets; b += blockDim.x) {
    const uint32_t count = shared.counts[b];
    shared.counts[b] = 0;
    crowded = crowded || count > kMostInBucket;
    shared.spans[b] = count << 16 | sum_before(count);
    const uint32_t sum = __reduce_add_sync(kAllLanes, count);
    if (lane > b / kWarp) atomicAdd(&round.before[lane], sum);
    static_assert(kBuckets / kWarp == kWarp, "a lane adds to each");
  }
  if (__syncthreads_or(crowded)) return false;

  const BucketRule bucket(round.extremes);
  for (int p = threadIdx.x; p < round.a_count; p += blockDim.x) {
    const uint32_t key = state.keys[p];
    const int b = bucket(key);
    const uint32_t span = shared.spans[b];
    auto rank = static_cast<int>(round.before[b / kWarp] + (span & 0xffffu));
    auto other = static_cast<int>(shared.heads[b]);
    for (int left = static_cast<int>(span >> 16); left > 0; --left) {
      rank += beats(state, other, key, p);
      other = state.chain[other];
    }
    place(state, round, p, rank);
  }
  return true;
}

// (3) for a short A: a group of lanes counts who beats a token.
__device__ __forceinline__ void sort_by_counting(const DedupState& state, const Round& round) {
  const int shift = log2_lanes(5, round.a_count);
  const int lanes = 1 << shift, groups = blockDim.x >> shift;
  const int lane = threadIdx.x & (lanes - 1);
  // Every thread makes every turn, so that whole warps meet in the shuffles.
  for (int p0 = 0; p0 < round.a_count; p0 += groups) {
    const int p = p0 + (threadIdx.x >> shift);
    int rank = 0;
    if (p < round.a_count) {
      const uint32_t key = state.keys[p];
      for (int j = lane; j < round.a_count; j += lanes) rank += beats(state, j, key, p);
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      rank += __shfl_xor_sync(kAllLanes, rank, offset);
    }
    if (p < round.a_count && lane == 0) place(state, round, p, rank);
  }
}

// Ascending order of these words is the stable order by redundancy, highest first.
__device__ __forceinline__ uint64_t sort_word(uint32_t key, int p) {
  return (uint64_t{~key} << 32) | static_cast<uint32_t>(p);
}

// (3) for a long A of crowded buckets: warps sort 32 words each, then sorted runs are merged in
// pairs; a word's place in the merged run is its own place plus the number of smaller words in the
// other run.
__device__ __forceinline__ void sort_by_merging(const DedupState& state, const Round& round) {
  const int a_count = round.a_count;
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
    place(state, round, static_cast<int>(static_cast<uint32_t>(from[rank])), rank);
  }
}

// Writes the set bits of `keep` as ascending token numbers; a thread has some words in a row.
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

// All rounds; returns the list that is left.
__device__ __forceinline__ const uint16_t* run_rounds(const Shared& shared, const DedupState& state,
                                                      const Similarity& similarity, int residual,
                                                      int diverse, int step, int few_tokens) {
  for (int i = threadIdx.x; i < residual; i += blockDim.x) {
    state.lists[i] = static_cast<uint16_t>(i);
  }
  for (int w = threadIdx.x; w < words(residual); w += blockDim.x) shared.in_b[w] = 0xaaaaaaaau;
  for (int b = threadIdx.x; b < kBuckets; b += blockDim.x) shared.counts[b] = 0;
  if (threadIdx.x < kBuckets / kWarp) shared.before[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    *shared.missing = 0;
    shared.extremes[0] = ordered_key(1.0f);
    shared.extremes[1] = ordered_key(-1.0f);
  }
  __syncthreads();
  int now = 0;
  for (int n = residual; n > diverse; now ^= 1) {
    Round round{};
    round.list = state.lists + now * residual;
    round.next = state.lists + (now ^ 1) * residual;
    round.in_b = shared.in_b + now * words(residual);
    round.next_in_b = shared.in_b + (now ^ 1) * words(residual);
    round.before = shared.before + now * (kBuckets / kWarp);
    round.next_before = shared.before + (now ^ 1) * (kBuckets / kWarp);
    round.extremes = shared.extremes + now * 2;
    round.next_extremes = shared.extremes + (now ^ 1) * 2;
    round.n = n;
    round.a_count = half_up(n);
    round.r = min(min(step, n - diverse), round.a_count);
    round.buckets = round.a_count > few_tokens;

    const bool left = look_up(shared, state, similarity, round);
    for (int w = threadIdx.x; w < words(residual); w += blockDim.x) round.next_in_b[w] = 0;
    if (threadIdx.x < kBuckets / kWarp) round.next_before[threadIdx.x] = 0;
    if (__syncthreads_or(left)) {
      scan_missing(shared, state, similarity, round);
      __syncthreads();
      if (threadIdx.x == 0) *shared.missing = 0;
    }
    move_b(round);
    if (!round.buckets || !sort_by_buckets(shared, state, round)) {
      if (round.a_count <= kMostCounting) {
        sort_by_counting(state, round);
      } else {
        sort_by_merging(state, round);
      }
    }
    __syncthreads();
    n -= round.r;
  }
  return state.lists + now * residual;
}

template <bool kListsShared, bool kStateShared>
__global__ void __launch_bounds__(kStateShared ? kMostThreads : kMostFarThreads, 1)
    dedup_kernel(Batch batch, int64_t channels, int step, int few_tokens, int64_t* indices,
                 unsigned char* workspace) {
  begin_dependent(batch.more);
  VP_SHARED_MEMORY(memory);
  __shared__ uint32_t warp_sums[kMostThreads / kWarp];

  const Image image = batch[blockIdx.x];
  const int residual = image.shape.residual();
  const WorkspaceLayout at = workspace_layout(image.shape.tokens, residual, channels);
  unsigned char* own = workspace + image.workspace;
  const auto* order = reinterpret_cast<const uint16_t*>(own + at.order);
  const SharedLayout shared_at = shared_layout(image.shape.tokens, residual);
  auto* shared_words = reinterpret_cast<uint32_t*>(memory);
  const Shared shared{shared_words,
                      shared_words + shared_at.heads,
                      shared_words + shared_at.spans,
                      shared_words + shared_at.before,
                      shared_words + shared_at.extremes,
                      shared_words + shared_at.missing,
                      shared_words + shared_at.in_b,
                      shared_words + shared_at.keep};
  int64_t used = shared_at.bytes;

  for (int w = threadIdx.x; w < words(image.shape.tokens); w += blockDim.x) shared.keep[w] = 0;
  __syncthreads();
  const auto mark = [&](int rank) {
    const int token = order[rank];
    atomicOr(&shared.keep[token / 32], 1u << (token % 32));
  };
  for (int r = threadIdx.x; r < image.shape.important; r += blockDim.x) mark(r);

  if (residual > 0) {
    const DedupLayout state_at = dedup_layout(residual);
    unsigned char* base = kStateShared ? memory + used : own + at.state;
    const DedupState state{{reinterpret_cast<uint64_t*>(base + state_at.sorted[0]),
                            reinterpret_cast<uint64_t*>(base + state_at.sorted[1])},
                           reinterpret_cast<uint32_t*>(base + state_at.keys),
                           reinterpret_cast<uint16_t*>(base + state_at.chain),
                           reinterpret_cast<uint16_t*>(base + state_at.lists)};
    if (kStateShared) used += state_at.bytes;
    Similarity similarity{reinterpret_cast<const uint16_t*>(own + at.ids),
                          reinterpret_cast<const uint32_t*>(own + at.keys),
                          reinterpret_cast<const float*>(own + at.gram), static_cast<int>(at.ld),
                          reinterpret_cast<const float*>(own + at.inv)};
    if constexpr (kListsShared) {
      const auto bring = [&](const void* from, int64_t bytes) {
        unsigned char* to = memory + used;
        for (int64_t i = int64_t{threadIdx.x} * 16; i < bytes; i += int64_t{blockDim.x} * 16) {
          copy_async_16(to + i, static_cast<const unsigned char*>(from) + i);
        }
        used += bytes;
        return to;
      };
      const int64_t ids_bytes = int64_t{residual} * kNeighbours * 2;
      similarity.ids = reinterpret_cast<const uint16_t*>(bring(similarity.ids, ids_bytes));
      similarity.keys = reinterpret_cast<const uint32_t*>(bring(similarity.keys, 2 * ids_bytes));
      copy_async_commit();
      copy_async_wait<0>();  // run_rounds begins with a barrier
    }
    const uint16_t* survivors =
        run_rounds(shared, state, similarity, residual, image.shape.diverse, step, few_tokens);
    for (int i = threadIdx.x; i < image.shape.diverse; i += blockDim.x) {
      mark(image.shape.important + survivors[i]);
    }
  }
  __syncthreads();
  // Read again: kept through the rounds, these would take registers that the rounds need.
  int block = blockIdx.x;
  not_before(block);
  const Image out = batch[block];
  write_indices(shared.keep, out.shape.tokens, out.index_base, indices + out.first_kept, warp_sums);
}

plan::DedupBytes shared_bytes(const WaveSize& size) {
  const int64_t least = shared_layout(size.tokens, size.residual).bytes;
  const int64_t state = least + dedup_layout(size.residual).bytes;
  return {state + list_bytes(size.residual), state, least};
}

// Four lanes a token of A in the first round, if there are as many.
int threads_for(int residual, int most) {
  int threads = 128;
  while (threads < most && threads < residual * 2) threads *= 2;
  return threads;
}

}  // namespace

int dedup_and_select(const Batch& batch, const WaveSize& size, int64_t channels, int step,
                     int64_t* indices, void* workspace, void* stream) {
  int limit = 0;
  if (const int error = shared_memory_limit(&limit)) return error;
  const plan::Plans asked = plan::current();
  const plan::DedupBytes needed = shared_bytes(size);
  const plan::Dedup plan = plan::choose(asked.dedup, needed, limit);
  const int64_t bytes = needed.of(plan);
  if (bytes > limit) {
    return refuse(
        "the plan for dedup takes %lld bytes of shared memory per block for %d residual tokens, "
        "and this GPU has %d: use dedup=auto",
        static_cast<long long>(bytes), size.residual, limit);
  }
  const int threads =
      threads_for(size.residual, plan == plan::Dedup::kWorkspace ? kMostFarThreads : kMostThreads);
  auto* ws = static_cast<unsigned char*>(workspace);
  const auto run = [&](auto lists_shared, auto state_shared) {
    return launch_dependent<dedup_kernel<lists_shared(), state_shared()>>(
        size.images, threads, static_cast<int>(bytes), stream, batch, channels, step,
        plan::most_counted(asked.sort), indices, ws);
  };
  switch (plan) {
    case plan::Dedup::kListsShared: return run(std::true_type{}, std::true_type{});
    case plan::Dedup::kStateShared: return run(std::false_type{}, std::true_type{});
    default: return run(std::false_type{}, std::false_type{});
  }
}

}  // namespace vispruner::cuda
