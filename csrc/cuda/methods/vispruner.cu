// The dedup loop and the selection: one block per image, one launch for all rounds.
//
// A round has three steps, with a barrier after each:
//
// - Look up. One lane per token of A finds the first of its 32 neighbours that is in B, eight at a
//   time, and skips groups of eight that are all dropped. The redundancy determines a bucket; an
//   atomic addition to the bucket's count returns the token's place in it. If no neighbour is in B,
//   a warp scans B; that, or a crowded bucket, takes two more barriers.
// - Scatter. Each token adds up the counts of the buckets before its own and writes its word there,
//   so that A is ordered by bucket. B moves to the next list.
// - Rank. Each token counts the words of its bucket that are less than its own. The r most
//   redundant tokens are dropped, the others are written to the next list.
//
// If a bucket is crowded because many redundancies agree to the last bits, A is ranked by counting
// or merging.
//
// The data of a token of A stay in its thread's registers from step to step if the block has a
// thread for each of them, and are in memory otherwise.
//
// The chain of dependent accesses to shared memory: the list entry, (ids, `where`) per group of
// eight, the key, the bucket's count; the counts before it; the words of the bucket. Bytes: 192 R
// of neighbour lists, once, if they fit into shared memory.
#include <type_traits>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "methods/lists.cuh"
#include "methods/methods.cuh"
#include "methods/select.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kMostFarThreads = 512;   // with its arrays in the workspace: 64-bit addresses
constexpr int kMostNearThreads = 640;  // with its lists in shared memory: one for each token of A
constexpr int kGroup = 16;             // buckets per group of counts

// The buckets of A's keys (BucketRule). A long A has more of them, so that few tokens share one.
template <int kLog2_>
struct Buckets {
  static constexpr int kLog2 = kLog2_;
  static constexpr int kCount = 1 << kLog2;
  static constexpr int kMost = 65536 / kCount;  // per bucket; with more, buckets are not used
  static constexpr int kGroups = kCount / kGroup;
  static constexpr int kEach = kGroups / kWarp;  // groups that one lane adds up
  static constexpr int kWords = kCount / 4 + kGroups;
  static_assert(kEach == 1 || kEach == 4, "one load");
};
using FewBuckets = Buckets<9>;    // of images whose lists are in shared memory
using ManyBuckets = Buckets<11>;  // of longer ones
constexpr int kLog2Octaves = 4;

// Where a token is.
constexpr uint8_t kDropped = 0, kInA = 1, kInB = 2;

// Arrays that are always in shared memory.
struct Shared {
  uint32_t* counts;    // (kCount / 4) tokens per bucket, a byte each; zero outside of a round
  uint32_t* totals;    // (kGroups) tokens per group of buckets; the same
  uint32_t* earlier;   // (kGroup, kGroup / 4) 1 in the byte of each bucket before this one
  uint32_t* extremes;  // (2, 2) highest and lowest key: of the last round and of this one
  uint32_t* missing;   // (1) tokens of A that have no neighbour in B
  uint32_t* crowded;   // (1) whether a bucket has too many tokens
  uint8_t* where;      // (R) where each token is
  uint32_t* keep;      // (N / 32) which tokens are selected
};
constexpr int kFlags = 8;  // words: extremes, missing, crowded and two more
constexpr int kEarlier = kGroup * kGroup / 4;

template <typename B>
VP_HD int64_t keep_at(int residual) {
  return B::kWords + kEarlier + kFlags + words(8 * residual);
}
template <typename B>
VP_HD int64_t fixed_bytes(int tokens, int residual) {
  return round_up((keep_at<B>(residual) + words(tokens)) * 4, 16);
}

// The data of a token of A.
struct alignas(16) Token {
  uint32_t entry;  // of the list
  uint32_t key;    // of its redundancy
  uint32_t place;  // bucket and place in it, or kNoPlace
  uint32_t span;   // place of its bucket's first word, number of words
};
constexpr uint32_t kNoPlace = ~0u;

struct DedupState {  // the arrays of DedupLayout
  uint64_t* words;   // of A by bucket
  uint32_t* keys;    // of A, by position: of tokens that were scanned, or of all in a crowded round
  Token* tokens;     // of A, by position
  uint64_t* merged;  // words, once the tokens are not needed
  uint32_t* lists;
};

VP_HD int64_t list_bytes(int residual) { return int64_t{residual} * kNeighbours * 6; }

// Outputs of earlier stages that the rounds read.
struct Similarity {
  const uint16_t* ids;   // (R, 32) neighbour lists, best first (list_slot)
  const uint32_t* keys;  // (R, 32) ordered keys of the redundancies they give
  const float* matrix;   // (R, ld) for tokens none of whose neighbours is in B
  int ld;
  const float* inv;  // (R)
};

// An entry of the list: a token, and in the upper half a bit per group of eight of its neighbours
// that are not all dropped.
constexpr uint32_t kAllGroups = ((1u << kNeighbours / kProbes) - 1) << 16;
__device__ __forceinline__ int token_of(uint32_t entry) {
  return static_cast<int>(entry & 0xffffu);
}

struct Round {
  uint32_t* list;  // (n) entries: A at even positions, B at odd ones
  uint32_t* next;  // the list after this round
  uint32_t* extremes;
  uint32_t* next_extremes;
  int n, a_count, r;
  bool buckets;  // whether A is ranked by buckets
};

// The bucket of a key, by the key's distance from the highest key of the previous round, on a
// logarithmic scale (the bits of a float are its logarithm, linear between powers of two) that ends
// at twice the distance of the lowest key. Any monotone rule gives the same ranks; this one spreads
// the redundancies, which cluster near the highest.
template <typename B>
struct BucketRule {
  uint32_t high;
  int first;

  __device__ __forceinline__ explicit BucketRule(const uint32_t* extremes)
      : high(extremes[0]), first(distance(extremes[1]) - (((1 << kLog2Octaves) - 1) << 23)) {}

  __device__ __forceinline__ int operator()(uint32_t key) const {
    constexpr int kShift = 23 + kLog2Octaves - B::kLog2;  // bits of an octave, times octaves
    return min(max((distance(key) - first) >> kShift, 0), B::kCount - 1);
  }

  __device__ __forceinline__ int distance(uint32_t key) const {
    return static_cast<int>(float_bits(__uint2float_rn(high - min(key, high))));
  }
};

// Whether a warp has a token of A.
__device__ __forceinline__ bool any_token(int a_count) {
  return static_cast<int>(threadIdx.x & ~(kWarp - 1u)) < a_count;
}

// The tokens of A, each with the thread that works on it in every step. `make`, `change` and `read`
// call step(position, token) for those of a thread. `change_in_warps` calls step(position, token,
// inside) in all lanes of a warp that has a token.
template <bool kOneEach>
struct Tokens;

template <>
struct Tokens<true> {  // the block has a thread for each
  Token own;

  __device__ __forceinline__ explicit Tokens(Token*) : own() {}

  template <typename Step>
  __device__ __forceinline__ void make(int a_count, Step&& step) {
    change(a_count, step);
  }
  template <typename Step>
  __device__ __forceinline__ void change(int a_count, Step&& step) {
    if (static_cast<int>(threadIdx.x) < a_count) step(static_cast<int>(threadIdx.x), own);
  }
  template <typename Step>
  __device__ __forceinline__ void read(int a_count, Step&& step) const {
    if (static_cast<int>(threadIdx.x) < a_count) step(static_cast<int>(threadIdx.x), own);
  }
  template <typename Step>
  __device__ __forceinline__ void change_in_warps(int a_count, Step&& step) {
    const auto p = static_cast<int>(threadIdx.x);
    step(p, own, p < a_count);  // the warp has one: any_token()
  }
};

template <>
struct Tokens<false> {
  Token* all;

  __device__ __forceinline__ explicit Tokens(Token* tokens) : all(tokens) {}

  template <typename Step>
  __device__ __forceinline__ void make(int a_count, Step&& step) {
    for (int p = threadIdx.x; p < a_count; p += blockDim.x) {
      Token token{};
      step(p, token);
      all[p] = token;
    }
  }
  template <typename Step>
  __device__ __forceinline__ void change(int a_count, Step&& step) {
    for (int p = threadIdx.x; p < a_count; p += blockDim.x) {
      Token token = all[p];
      step(p, token);
      all[p] = token;
    }
  }
  template <typename Step>
  __device__ __forceinline__ void read(int a_count, Step&& step) const {
    for (int p = threadIdx.x; p < a_count; p += blockDim.x) step(p, all[p]);
  }
  template <typename Step>
  __device__ __forceinline__ void change_in_warps(int a_count, Step&& step) {
    for (int p = threadIdx.x; p - static_cast<int>(threadIdx.x % kWarp) < a_count;
         p += blockDim.x) {
      const bool inside = p < a_count;
      Token token{};
      if (inside) token = all[p];
      step(p, token, inside);
      if (inside) all[p] = token;
    }
  }
};

// The redundancy of a token of A is known. Returns whether its bucket is crowded.
template <typename B>
__device__ __forceinline__ bool store_key(const Shared& shared, const Round& round,
                                          const BucketRule<B>& bucket, Token& token, uint32_t key) {
  token.key = key;
  token.place = 0;  // not kNoPlace
  if (!round.buckets) return false;
  const auto b = static_cast<uint32_t>(bucket(key));
  const uint32_t shift = 8 * (b % 4);
  const uint32_t place = atomicAdd(&shared.counts[b / 4], 1u << shift) >> shift & 0xffu;
  atomicAdd(&shared.totals[b / kGroup], 1u);
  token.place = b * B::kMost + place;
  if (place < B::kMost) return false;
  atomicOr(shared.crowded, 1u);
  return true;
}

// The lowest byte that is not 0.
__device__ __forceinline__ int first_byte(uint32_t word) {
  return __clz(static_cast<int>(__brev(word))) / 8;
}

// Look up: the keys of A that the neighbour lists give; the other positions are written to `next`.
// Returns whether the buckets are not ready after it.
template <typename B, bool kOneEach>
__device__ __forceinline__ bool look_up(const Shared& shared, const Similarity& similarity,
                                        const Round& round, Tokens<kOneEach>& tokens) {
  struct alignas(16) Ids {
    uint32_t of[kProbes / 2];
  };
  constexpr uint32_t kFoundInB = kInB * 0x01010101u;
  if (!any_token(round.a_count)) return false;
  const BucketRule<B> bucket(round.extremes);
  bool left = false;
  tokens.make(round.a_count, [&](int p, Token& token) {
    const uint32_t entry = round.list[2 * p];
    const int row = list_slot(token_of(entry), 0);
    uint32_t groups = entry >> 16;
    uint32_t hits = 0;
    int at = 0;
    for (uint32_t open = groups; open; open &= open - 1) {
      const int group = __ffs(static_cast<int>(open)) - 1;
      at = row ^ (group * kProbes);
      const Ids ids = *reinterpret_cast<const Ids*>(similarity.ids + at);
      const auto four = [&](uint32_t left, uint32_t right) {  // one byte each
        const uint32_t first = shared.where[left & 0xffffu], second = shared.where[left >> 16];
        const uint32_t third = shared.where[right & 0xffffu], fourth = shared.where[right >> 16];
        return __byte_perm(__byte_perm(first, second, 0x0040), __byte_perm(third, fourth, 0x0040),
                           0x5410);
      };
      const uint32_t near = four(ids.of[0], ids.of[1]), far = four(ids.of[2], ids.of[3]);
      hits = near & kFoundInB;
      if (!hits) {
        hits = far & kFoundInB;
        at += 4;
      }
      if (hits) break;
      if (!(near | far)) groups ^= 1u << group;
    }
    token.entry = static_cast<uint32_t>(token_of(entry)) | groups << 16;
    if (hits) {
      const uint32_t key = similarity.keys[at + first_byte(hits)];
      left |= store_key(shared, round, bucket, token, key);
    } else {
      left = true;
      token.place = kNoPlace;
      round.next[atomicAdd(shared.missing, 1u)] = static_cast<uint32_t>(p);
    }
  });
  return left;
}

// The keys that look_up did not find, one warp per token.
__device__ __forceinline__ void scan_missing(const Shared& shared, const DedupState& state,
                                             const Similarity& similarity, const Round& round) {
  const int lane = threadIdx.x % kWarp;
  const auto missing = static_cast<int>(*shared.missing);
  for (int m = threadIdx.x / kWarp; m < missing; m += blockDim.x / kWarp) {
    const auto p = static_cast<int>(round.next[m]);
    const int token = token_of(round.list[2 * p]);
    const float* row = similarity.matrix + int64_t{token} * similarity.ld;
    uint32_t best = 0;
#pragma unroll 4
    for (int b = 2 * lane + 1; b < round.n; b += 2 * kWarp) {
      best = max(best, ordered_key(row[token_of(round.list[b])]));
    }
    best = __reduce_max_sync(kAllLanes, best);
    if (lane == 0) state.keys[p] = ordered_key(key_float(best) * similarity.inv[token]);
  }
}

// Writes the entry to this place of the next list.
__device__ __forceinline__ void put(const Shared& shared, const Round& round, int slot,
                                    uint32_t entry) {
  round.next[slot] = entry;
  shared.where[token_of(entry)] = static_cast<uint8_t>(kInA + (slot & 1));
}

// The token of B after A position p follows the remaining tokens of A in the next list.
__device__ __forceinline__ void move_b(const Shared& shared, const Round& round, int p) {
  if (2 * p + 1 < round.n) {
    put(shared, round, round.a_count - round.r + p, round.list[2 * p + 1]);
  }
}

// Drops the token of A that has this key and rank, or writes it to the next list.
__device__ __forceinline__ void place(const Shared& shared, const Round& round, uint32_t entry,
                                      uint32_t key, int rank) {
  if (rank == 0) round.next_extremes[0] = key;
  if (rank == round.a_count - 1) round.next_extremes[1] = key;
  if (rank >= round.r) {
    put(shared, round, rank - round.r, entry);
  } else {
    shared.where[token_of(entry)] = kDropped;
  }
}

// Beaten by a higher key, or by an equal one of a lower position (keys are below 2^32 - 1).
__device__ __forceinline__ bool beats(const DedupState& state, int other, uint32_t key, int p) {
  return state.keys[other] >= key + (other >= p ? 1u : 0u);
}

// Ascending order of these words is the stable order by redundancy, highest first.
__device__ __forceinline__ uint64_t sort_word(uint32_t key, int p) {
  return (uint64_t{~key} << 32) | static_cast<uint32_t>(p);
}

// Scatter: orders the words of A by bucket, in any order within each.
template <typename B, bool kOneEach>
__device__ __forceinline__ void scatter(const Shared& shared, const DedupState& state,
                                        const Round& round, Tokens<kOneEach>& tokens) {
  if (threadIdx.x < kSentinels) state.words[round.a_count + threadIdx.x] = ~uint64_t{0};
  if (!any_token(round.a_count)) return;
  // The number of tokens before each of the groups that this lane adds up.
  struct alignas(4 * B::kEach) Totals {
    uint32_t of[B::kEach];
  };
  Totals before = reinterpret_cast<const Totals*>(shared.totals)[threadIdx.x % kWarp];
  uint32_t all = 0;
#pragma unroll
  for (int e = 0; e < B::kEach; ++e) all += before.of[e];
  uint32_t sum = sum_before(all);
#pragma unroll
  for (int e = 0; e < B::kEach; ++e) {
    const uint32_t own = before.of[e];
    before.of[e] = sum;
    sum += own;
  }
  // In all lanes, because all take part in the shuffle.
  tokens.change_in_warps(round.a_count, [&](int p, Token& token, bool inside) {
    const uint32_t bucket = token.place / B::kMost, group = bucket / kGroup;
    uint32_t base = 0;
#pragma unroll
    for (uint32_t e = 0; e < B::kEach; ++e) {
      const uint32_t of = __shfl_sync(kAllLanes, before.of[e], static_cast<int>(group / B::kEach));
      if (group % B::kEach == e) base = of;
    }
    if (!inside) return;
    struct alignas(16) Counts {
      uint32_t of[kGroup / 4];
    };
    const Counts counts = *reinterpret_cast<const Counts*>(shared.counts + group * (kGroup / 4));
    const Counts earlier = reinterpret_cast<const Counts*>(shared.earlier)[bucket % kGroup];
#pragma unroll
    for (int w = 0; w < kGroup / 4; ++w) base = __dp4a(counts.of[w], earlier.of[w], base);
    const uint32_t count = reinterpret_cast<const uint8_t*>(shared.counts)[bucket];
    state.words[base + token.place % B::kMost] = sort_word(token.key, p);
    token.span = base * 256 + count;  // at most 16384 tokens, 128 in a bucket
    move_b(shared, round, p);
  });
}

// Rank: each token counts the words of its bucket that are less than its own. Words of earlier
// buckets are less and words of later buckets are not, so that whole vectors can be read.
template <typename B, bool kOneEach>
__device__ __forceinline__ void rank_in_buckets(const Shared& shared, const DedupState& state,
                                                const Round& round,
                                                const Tokens<kOneEach>& tokens) {
  tokens.read(round.a_count, [&](int p, const Token& token) {
    struct alignas(16) Words {
      uint64_t of[2];
    };
    const auto base = static_cast<int>(token.span / 256);
    const int end = base + static_cast<int>(token.span % 256);
    const uint64_t word = sort_word(token.key, p);
    int rank = base / kSentinels * kSentinels;
#pragma unroll 1
    for (int i = rank; i < end; i += kSentinels) {
#pragma unroll
      for (int pair = 0; pair < kSentinels; pair += 2) {
        const Words words = *reinterpret_cast<const Words*>(state.words + i + pair);
        rank += words.of[0] < word;
        rank += words.of[1] < word;
      }
    }
    place(shared, round, token.entry, token.key, rank);
  });
}

// Rank if a bucket is crowded: a group of lanes counts the keys ahead of a token's key.
__device__ __forceinline__ void sort_by_counting(const Shared& shared, const DedupState& state,
                                                 const Round& round) {
  int shift = 5;  // as many lanes per token as there are threads for
  while (shift > 0 && static_cast<int>(blockDim.x >> shift) < round.a_count) --shift;
  const int lanes = 1 << shift, groups = blockDim.x >> shift;
  const int lane = threadIdx.x & (lanes - 1);
  // All threads run every iteration, because all lanes of a warp take part in the shuffles.
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
    if (p < round.a_count && lane == 0) {
      place(shared, round, round.list[2 * p], state.keys[p], rank);
    }
  }
}

// Rank for a long A of crowded buckets: warps sort 32 words each, then sorted runs are merged in
// pairs; a word's place in the merged run is its own place plus the number of smaller words in the
// other run.
__device__ __forceinline__ void sort_by_merging(const Shared& shared, const DedupState& state,
                                                const Round& round) {
  const int a_count = round.a_count;
  const int lane = threadIdx.x % kWarp;
  uint64_t* from = state.merged;  // not `words`, which hold the keys
  uint64_t* to = state.words;
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
    const uint64_t word = from[rank];
    place(shared, round, round.list[2 * static_cast<uint32_t>(word)],
          ~static_cast<uint32_t>(word >> 32), rank);
  }
}

template <typename B>
__device__ __forceinline__ void clear_counts(const Shared& shared) {
  for (int v = threadIdx.x; v < B::kWords / 4; v += blockDim.x) {
    reinterpret_cast<uint4*>(shared.counts)[v] = uint4{};
  }
}

// All rounds; returns the remaining list.
template <typename B, bool kOneEach>
__device__ __forceinline__ const uint32_t* run_rounds(const Shared& shared, const DedupState& state,
                                                      const Similarity& similarity, int residual,
                                                      int diverse, int step, bool buckets) {
  for (int i = threadIdx.x; i < residual; i += blockDim.x) {
    state.lists[i] = static_cast<uint32_t>(i) | kAllGroups;
    shared.where[i] = static_cast<uint8_t>(kInA + i % 2);
  }
  clear_counts<B>(shared);
  for (int byte = threadIdx.x; byte < 4 * kEarlier; byte += blockDim.x) {
    reinterpret_cast<uint8_t*>(shared.earlier)[byte] = byte % kGroup < byte / kGroup;
  }
  if (threadIdx.x == 0) {
    *shared.missing = 0;
    *shared.crowded = 0;
    shared.extremes[0] = ordered_key(1.0f);
    shared.extremes[1] = ordered_key(1.0f) - (1u << 26);  // about 0.004: most keys are above it
  }
  __syncthreads();
  Tokens<kOneEach> tokens(state.tokens);
  Round round{};
  round.list = state.lists;
  round.next = state.lists + residual;
  round.extremes = shared.extremes;
  round.next_extremes = shared.extremes + 2;
  round.buckets = buckets;
  for (int n = residual; n > diverse; n -= round.r) {
    round.n = n;
    round.a_count = static_cast<int>((static_cast<unsigned>(n) + 1) / 2);
    round.r = min(min(step, n - diverse), round.a_count);

    const bool left = __syncthreads_or(look_up<B>(shared, similarity, round, tokens)) != 0;
    bool crowded = !buckets;
    if (left) {
      if (*shared.missing) {
        scan_missing(shared, state, similarity, round);
        __syncthreads();
        const BucketRule<B> bucket(round.extremes);
        tokens.change(round.a_count, [&](int p, Token& token) {
          if (token.place == kNoPlace) store_key(shared, round, bucket, token, state.keys[p]);
        });
        __syncthreads();
      }
      crowded |= *shared.crowded != 0;
    }
    if (!crowded) {
      scatter<B>(shared, state, round, tokens);
    } else {
      tokens.read(round.a_count, [&](int p, const Token& token) {
        round.list[2 * p] = token.entry;
        state.keys[p] = token.key;
        move_b(shared, round, p);
      });
    }
    __syncthreads();
    if (left && threadIdx.x == 0) *shared.missing = *shared.crowded = 0;
    clear_counts<B>(shared);
    if (!crowded) {
      rank_in_buckets<B>(shared, state, round, tokens);
    } else if (round.a_count <= kMostCounting) {
      sort_by_counting(shared, state, round);
    } else {
      sort_by_merging(shared, state, round);
    }
    __syncthreads();
    uint32_t* list = round.list;
    round.list = round.next;
    round.next = list;
    uint32_t* extremes = round.extremes;
    round.extremes = round.next_extremes;
    round.next_extremes = extremes;
  }
  return round.list;
}

template <bool kListsShared, bool kStateShared>
constexpr int kMostThreadsOf = kListsShared   ? kMostNearThreads
                               : kStateShared ? kMostThreads
                                              : kMostFarThreads;

template <bool kListsShared, bool kStateShared>
__global__ void __launch_bounds__(kMostThreadsOf<kListsShared, kStateShared>, 1)
    dedup_kernel(Batch batch, int64_t channels, int step, bool buckets, int64_t* indices,
                 unsigned char* workspace) {
  begin_dependent(batch.more);
  VP_SHARED_MEMORY(memory);
  __shared__ uint32_t warp_sums[kMostThreads / kWarp];

  const Image image = batch[blockIdx.x];
  const int residual = image.shape.residual();
  const WorkspaceLayout at = workspace_layout(image.shape.tokens, residual, channels);
  unsigned char* own = workspace + image.workspace;
  unsigned char* lists = own + at.method;
  const ListsLayout lists_at = lists_layout(residual);
  using B = std::conditional_t<kListsShared, FewBuckets, ManyBuckets>;
  auto* shared_words = reinterpret_cast<uint32_t*>(memory);
  uint32_t* flags = shared_words + B::kWords + kEarlier;
  const Shared shared{shared_words,
                      shared_words + B::kCount / 4,
                      shared_words + B::kWords,
                      flags,
                      flags + 4,
                      flags + 5,
                      reinterpret_cast<uint8_t*>(flags + kFlags),
                      shared_words + keep_at<B>(residual)};
  int64_t used = fixed_bytes<B>(image.shape.tokens, residual);

  const Marks marks{shared.keep, reinterpret_cast<const uint16_t*>(own + at.order)};
  marks.clear(image.shape.tokens);
  __syncthreads();
  for (int r = threadIdx.x; r < image.shape.important; r += blockDim.x) marks.set(r);

  if (residual > 0) {
    const DedupLayout state_at = dedup_layout(residual, kListsShared);
    unsigned char* base = kStateShared ? memory + used : lists + lists_at.state;
    const DedupState state{reinterpret_cast<uint64_t*>(base + state_at.words),
                           reinterpret_cast<uint32_t*>(base + state_at.words),
                           reinterpret_cast<Token*>(base + state_at.tokens),
                           reinterpret_cast<uint64_t*>(base + state_at.tokens),
                           reinterpret_cast<uint32_t*>(base + state_at.lists)};
    if (kStateShared) used += state_at.bytes;
    Similarity similarity{reinterpret_cast<const uint16_t*>(lists + lists_at.ids),
                          reinterpret_cast<const uint32_t*>(lists + lists_at.keys),
                          reinterpret_cast<const float*>(own + at.matrix), static_cast<int>(at.ld),
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
    const uint32_t* survivors = run_rounds<B, kListsShared>(shared, state, similarity, residual,
                                                            image.shape.diverse, step, buckets);
    for (int i = threadIdx.x; i < image.shape.diverse; i += blockDim.x) {
      marks.set(image.shape.important + token_of(survivors[i]));
    }
  }
  __syncthreads();
  // Reloaded: held during the rounds, these would take registers that the rounds need.
  int block = blockIdx.x;
  not_before(block);
  const Image out = batch[block];
  write_indices(shared.keep, out.shape.tokens, out.index_base, indices + out.first_kept, warp_sums);
}

plan::DedupBytes shared_bytes(const WaveSize& size) {
  const int64_t far = fixed_bytes<ManyBuckets>(size.tokens, size.residual);
  return {fixed_bytes<FewBuckets>(size.tokens, size.residual) +
              dedup_layout(size.residual, true).bytes + list_bytes(size.residual),
          far + dedup_layout(size.residual, false).bytes, far};
}

// One lane per token of A in the first round, if there are that many.
int threads_for(int residual, int most) {
  const auto threads = static_cast<int>(round_up(half_up(residual), kWarp));
  return threads < 128 ? 128 : threads < most ? threads : most;
}

int dedup_and_select(const Batch& batch, const WaveSize& size, int64_t channels, int step,
                     int64_t* indices, void* workspace, Stream stream) {
  int limit = 0;
  if (const int error = shared_memory_limit(stream.device, &limit)) return error;
  const plan::Plans asked = plan::current();
  plan::DedupBytes needed = shared_bytes(size);
  // With its lists in shared memory, A has a thread for each token. No current GPU has room for
  // longer ones.
  if (half_up(size.residual) > kMostNearThreads && needed.lists_shared <= limit) {
    needed.lists_shared = int64_t{limit} + 1;
  }
  const plan::Dedup plan = plan::choose(asked.dedup, needed, limit);
  const int64_t bytes = needed.of(plan);
  if (bytes > limit) {
    return refuse(
        "the plan for dedup takes %lld bytes of shared memory per "
        "block for %d residual tokens, "
        "and this GPU has %d: use dedup=auto",
        static_cast<long long>(bytes), size.residual, limit);
  }
  auto* ws = static_cast<unsigned char*>(workspace);
  const auto run = [&](auto lists_shared, auto state_shared) {
    const int threads = threads_for(size.residual, kMostThreadsOf<lists_shared(), state_shared()>);
    return launch_dependent<dedup_kernel<lists_shared(), state_shared()>>(
        size.images, threads, static_cast<int>(bytes), stream, batch, channels, step,
        plan::ranks_by_buckets(asked.sort), indices, ws);
  };
  switch (plan) {
    case plan::Dedup::kListsShared: return run(std::true_type{}, std::true_type{});
    case plan::Dedup::kStateShared: return run(std::false_type{}, std::true_type{});
    default: return run(std::false_type{}, std::false_type{});
  }
}

int64_t bytes(int residual) { return lists_layout(residual).bytes; }

int select(const Batch& batch, const WaveSize& size, int64_t channels, const Selection& selection,
           int64_t* indices, void* workspace, Stream stream) {
  if (size.residual > 0) {
    if (const int e = neighbours(followed(batch), size, channels, workspace, stream)) return e;
  }
  return dedup_and_select(batch, size, channels, selection.step, indices, workspace, stream);
}

}  // namespace

const MethodStages kVispruner{Order::kScore, false, Matrix::kSimilarity, bytes, select};

}  // namespace vispruner::cuda
