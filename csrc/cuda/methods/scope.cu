// SCOPE: the next pick is the token with the largest importance times coverage gain.
//
// The gain of a token is the coverage that it would add to that of the picks: the sum over all
// tokens u of max(0, cover(token, u) - covered(u)). Once some are picked, a pick raises `covered`
// of few tokens; each such change lowers the gains of all tokens by a part of one row of the
// matrix, which is symmetric. Gains are integers, so that the order of the changes does not matter.
//
// The first pick covers something of most tokens, and the second raises the coverage of about half:
// the gains after them are sums over the whole matrix, by many blocks. Each further pick has three
// steps, with a barrier after the first two: find the best token; list the changes; lower the
// gains. A thread has four consecutive tokens, or several such vectors; then the changes of one
// vector of all threads at a time are listed.
//
// Bytes: 12 N^2 read by many blocks; 4 N for each change, of which a token has about log(k).
#include "methods/greedy.cuh"
#include "methods/methods.cuh"

namespace vispruner::cuda {
namespace {

constexpr int kVector = 4;  // tokens
// Changes whose rows are loaded at a time; more would take too many registers.
template <int kVectors>
constexpr int kTogetherOf = kVectors == 1 ? 8 : 4;

struct alignas(16) Words {
  uint32_t of[kVector];
};
__device__ __forceinline__ Words load_words(const void* at, uint32_t bytes = 0) {
  return *reinterpret_cast<const Words*>(static_cast<const char*>(at) + bytes);
}

constexpr int kFirstPicks = 2;  // by many blocks: scope_first_kernel<0> and <1>

struct ScopeLayout {            // byte offsets from WorkspaceLayout::method
  int64_t weights;              // float (N) importance^alpha
  int64_t wanted[kFirstPicks];  // uint32 (N) ordered keys of a first pick
  int64_t gains;                // uint32 (N) after the first picks
  int64_t covered;              // uint32 (N) after the first picks
  int64_t picked;               // int (kFirstPicks)
  int64_t bytes;
};

VP_HD ScopeLayout scope_layout(int tokens) {
  const int64_t each = round_up(int64_t{tokens} * 4, 256);
  return {0, {each, 2 * each}, 3 * each, 4 * each, 5 * each, 5 * each + 256};
}

struct ScopeImage {
  int tokens;
  int picks;
  const uint32_t* scores;
  const uint32_t* matrix;  // (N, ld)
  int64_t ld;
  float* weights;
  uint32_t* wanted[kFirstPicks];
  uint32_t* gains;
  uint32_t* covered;
  int* picked;

  __device__ __forceinline__ ScopeImage(const Image& image, int64_t channels,
                                        unsigned char* workspace)
      : tokens(image.shape.residual()), picks(image.shape.diverse) {
    const WorkspaceLayout at = workspace_layout(image.shape.tokens, tokens, channels);
    const ScopeLayout own_at = scope_layout(tokens);
    unsigned char* own = workspace + image.workspace;
    scores = reinterpret_cast<const uint32_t*>(own + at.scores);
    matrix = reinterpret_cast<const uint32_t*>(own + at.matrix);
    ld = at.ld;
    weights = reinterpret_cast<float*>(own + at.method + own_at.weights);
    for (int p = 0; p < kFirstPicks; ++p) {
      wanted[p] = reinterpret_cast<uint32_t*>(own + at.method + own_at.wanted[p]);
    }
    gains = reinterpret_cast<uint32_t*>(own + at.method + own_at.gains);
    covered = reinterpret_cast<uint32_t*>(own + at.method + own_at.covered);
    picked = reinterpret_cast<int*>(own + at.method + own_at.picked);
  }

  // The ordered_key of a value that is not negative. With weight kPicked, a key below all of those.
  static constexpr float kPicked = -1.0f;
  __device__ __forceinline__ static uint32_t key(uint32_t gain, float weight) {
    return float_bits(__uint2float_rn(gain) * weight) ^ 0x80000000u;
  }
};

constexpr int kRowThreads = 128, kRows = kRowThreads / kWarp;  // per block: one warp per row

// The tokens' weights, and their keys while nothing is covered.
__global__ void __launch_bounds__(kRowThreads)
    scope_weights_kernel(Batch batch, int64_t channels, int quarters, unsigned char* workspace) {
  begin_dependent(batch.more);
  __shared__ Candidate slots[kRowThreads / kWarp];
  const ScopeImage image(batch[blockIdx.y], channels, workspace);
  const float highest = highest_score(image.scores, image.tokens, slots);
  const int row = blockIdx.x * kRows + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= image.tokens) return;
  const uint32_t* covers = image.matrix + row * image.ld;
  uint32_t gain = 0;
#pragma unroll 4
  for (int u = kVector * (threadIdx.x % kWarp); u < image.ld; u += kVector * kWarp) {
    const Words words = load_words(covers + u);
#pragma unroll
    for (int e = 0; e < kVector; ++e) gain += words.of[e];
  }
  gain = __reduce_add_sync(kAllLanes, gain);
  if (threadIdx.x % kWarp != 0) return;
  const float share = importance(positive_score(key_float(image.scores[row])), highest);
  const float weight = power_of_quarters(share, quarters);
  image.weights[row] = weight;
  image.wanted[0][row] = ScopeImage::key(gain, weight);
}

// A first pick, and the gains after it.
template <int kPick>
__global__ void __launch_bounds__(kRowThreads)
    scope_first_kernel(Batch batch, int64_t channels, unsigned char* workspace) {
  begin_dependent(batch.more);
  __shared__ Candidate slots[kRowThreads / kWarp];
  const ScopeImage image(batch[blockIdx.y], channels, workspace);
  if (kPick >= image.picks) return;
  const int pick = best_of(image.wanted[kPick], image.tokens, slots).token;
  if (blockIdx.x == 0 && threadIdx.x == 0) image.picked[kPick] = pick;
  const int row = blockIdx.x * kRows + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= image.tokens) return;
  const uint32_t* covers = image.matrix + row * image.ld;
  const uint32_t* latest = image.matrix + pick * image.ld;
  const uint32_t* earlier = kPick > 0 ? image.matrix + image.picked[0] * image.ld : latest;
  uint32_t gain = 0;
#pragma unroll 4
  for (int u = kVector * (threadIdx.x % kWarp); u < image.ld; u += kVector * kWarp) {
    const Words cover = load_words(covers + u), one = load_words(latest + u);
    const Words other = kPick > 0 ? load_words(earlier + u) : one;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const uint32_t covered = max(one.of[e], other.of[e]);
      gain += max(cover.of[e], covered) - covered;
    }
  }
  gain = __reduce_add_sync(kAllLanes, gain);
  if (threadIdx.x % kWarp != 0) return;
  if (kPick + 1 < kFirstPicks) {
    image.wanted[kPick + 1][row] = row == pick ? kTaken : ScopeImage::key(gain, image.weights[row]);
  } else {
    image.gains[row] = gain;
    image.covered[row] = max(latest[row], earlier[row]);
  }
}

// State of the list of changes. Two alternate.
struct Listed {
  int count;
  uint32_t before;  // the sum
};

// A token whose coverage rose with the latest pick.
struct alignas(16) Change {
  uint32_t row;  // where its row of the matrix begins, in bytes: below 2^32
  uint32_t before, after, unused;
};

constexpr int kScopeThreads = 512;  // at most: more would leave too few registers

// One value per token of a thread's vectors: in registers, or for many tokens in an array.
template <typename T, int kVectors>
struct OwnVectors {
  static constexpr bool kInRegisters = kVectors <= 2;
  T values[kInRegisters ? kVectors : 1][kVector];
  T* far;  // (N)

  __device__ __forceinline__ explicit OwnVectors(T* array) : far(array) {}
  __device__ __forceinline__ T& at(int q, int e, int token) {
    return kInRegisters ? values[q][e] : far[token];
  }
};

template <int kVectors>
__global__ void __launch_bounds__(kScopeThreads, 1)
    scope_kernel(Batch batch, int64_t channels, int64_t* indices, unsigned char* workspace) {
  begin_dependent(batch.more);
  VP_SHARED_MEMORY(memory);
  __shared__ Candidate slots[kScopeThreads / kWarp];  // a list is made between two uses
  __shared__ uint32_t warp_sums[kScopeThreads / kWarp];
  __shared__ Listed listed[2];

  const Image image = batch[blockIdx.x];
  const ScopeImage scope(image, channels, workspace);
  const int tokens = scope.tokens;  // all tokens of the image, or none
  const Marks marks{reinterpret_cast<uint32_t*>(memory),
                    reinterpret_cast<const uint16_t*>(workspace + image.workspace)};
  marks.clear(image.shape.tokens);
  if (threadIdx.x < 2) listed[threadIdx.x] = {0, 0};
  __syncthreads();
  for (int r = threadIdx.x; r < image.shape.important; r += blockDim.x) marks.set(r);

  if (tokens > 0) {
    const auto threads = static_cast<int>(blockDim.x);
    const auto row_bytes = static_cast<uint32_t>(scope.ld * 4);
    int thread = threadIdx.x;
    not_before(thread);  // or it would be read again for each use
    const int lane = thread % kWarp;
    const unsigned lanes_below = (1u << lane) - 1;
    auto* changes = reinterpret_cast<Change*>(memory + round_up(words(image.shape.tokens) * 4, 16));
    // Vector q of a thread: tokens first_of(q) to first_of(q) + 3.
    const auto first_of = [&](int q) { return kVector * (thread + q * threads); };
    constexpr int kTogether = kTogetherOf<kVectors>;
    constexpr int kUnrolled = kVectors <= 2 ? kVectors : 1;
    OwnVectors<uint32_t, kVectors> gains(scope.gains);
    OwnVectors<float, kVectors> weights(scope.weights);
    OwnVectors<uint32_t, kVectors> covered(scope.covered);
    const auto take = [&](int picked) {
      if (thread == 0) marks.set(picked);
#pragma unroll kUnrolled
      for (int q = 0; q < kVectors; ++q) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if (first_of(q) + e == picked) weights.at(q, e, picked) = ScopeImage::kPicked;
        }
      }
    };
#pragma unroll kUnrolled
    for (int q = 0; q < (gains.kInRegisters ? kVectors : 0); ++q) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const int token = first_of(q) + e;
        const bool exists = token < tokens;
        weights.at(q, e, token) = exists ? scope.weights[token] : ScopeImage::kPicked;
        gains.at(q, e, token) = exists && scope.picks > 1 ? scope.gains[token] : 0;
        covered.at(q, e, token) = exists && scope.picks > 1 ? scope.covered[token] : 0;
      }
    }
    for (int p = 0; p < min(scope.picks, kFirstPicks); ++p) take(scope.picked[p]);

    // Lists the changes in vector q.
    const auto list_changes = [&](int q, int picked, Listed* list) {
      const int first = first_of(q);
      uint32_t before[kVector], after[kVector], sum = 0;
      unsigned changed[kVector];
      int count = 0;
      // Past the row there is nothing to load; the zeros after the last token cover nothing.
      const Words covers =
          first < scope.ld ? load_words(scope.matrix + first, picked * row_bytes) : Words{};
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const bool exists = covered.kInRegisters || first + e < tokens;
        before[e] = exists ? covered.at(q, e, first + e) : 0;
        after[e] = covers.of[e];
        changed[e] = __ballot_sync(kAllLanes, after[e] > before[e]);
        count += __popc(changed[e]);
        sum += after[e] > before[e] ? before[e] : 0;
      }
      if (count == 0) return;  // the whole warp
      sum = __reduce_add_sync(kAllLanes, sum);
      int slot = 0;
      if (lane == 0) {
        slot = atomicAdd(&list->count, count);
        atomicAdd(&list->before, sum);
      }
      slot = __shfl_sync(kAllLanes, slot, 0);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (after[e] > before[e]) {
          covered.at(q, e, first + e) = after[e];
          changes[slot + __popc(changed[e] & lanes_below)] = {(first + e) * row_bytes, before[e],
                                                              after[e], 0};
        }
        slot += __popc(changed[e]);
      }
    };
    // Lowers the gains of vector q by what is listed.
    const auto lower_gains = [&](int q, const Listed& list) {
      const int first = first_of(q);
      if (first >= scope.ld) return;
      uint32_t lost[kVector] = {};  // the loss plus the sum of `before`
      const auto lower = [&](int begin, auto count) {
        constexpr int kCount = decltype(count)::value;
        Change change[kCount];
        Words covers[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          change[i] = changes[begin + i];
          covers[i] = load_words(scope.matrix + first, change[i].row);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            lost[e] += min(max(covers[i].of[e], change[i].before), change[i].after);
          }
        }
      };
      int c = 0;
      for (; c <= list.count - kTogether; c += kTogether) {
        lower(c, std::integral_constant<int, kTogether>{});
      }
      // The rest: in halves, because a condition for each change would take registers.
      if (kTogether > 4 && (list.count & 4) != 0) {
        lower(c, std::integral_constant<int, 4>{});
        c += 4;
      }
      if ((list.count & 2) != 0) {
        lower(c, std::integral_constant<int, 2>{});
        c += 2;
      }
      if ((list.count & 1) != 0) lower(c, std::integral_constant<int, 1>{});
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (gains.kInRegisters || first + e < tokens) {
          gains.at(q, e, first + e) -= lost[e] - list.before;
        }
      }
    };

    Candidate best = no_candidate();
    int turn = 0;
    for (int pick = kFirstPicks; pick < scope.picks; ++pick) {
#pragma unroll kUnrolled
      for (int q = 0; q < kVectors; ++q, ++turn) {
        if (pick == kFirstPicks) break;  // these gains are computed already
        if (q * kVector * threads >= tokens) break;
        list_changes(q, best.token, &listed[turn & 1]);
        __syncthreads();
        const Listed list = listed[turn & 1];
        if (thread == 0) listed[(turn + 1) & 1] = {0, 0};
#pragma unroll kUnrolled
        for (int p = 0; p < kVectors; ++p) lower_gains(p, list);
        if (kVectors > 1) __syncthreads();  // the next list may follow at once
      }

      best = no_candidate();
#pragma unroll kUnrolled
      for (int q = 0; q < kVectors; ++q) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const int token = first_of(q) + e;
          if (!gains.kInRegisters && token >= tokens) continue;
          best.raise(ScopeImage::key(gains.at(q, e, token), weights.at(q, e, token)), token);
        }
      }
      best = best_of_block(best, slots);
      take(best.token);
    }
  }
  __syncthreads();
  write_indices(marks.bits, image.shape.tokens, image.index_base, indices + image.first_kept,
                warp_sums);
}

int64_t bytes(int residual) { return scope_layout(residual).bytes; }

int select(const Batch& batch, const WaveSize& size, int64_t channels, const Selection& selection,
           int64_t* indices, void* workspace, Stream stream) {
  auto* ws = static_cast<unsigned char*>(workspace);
  if (size.residual > 0) {
    const dim3 grid((size.residual + kRows - 1) / kRows, size.images);
    if (const int e =
            launch_dependent<scope_weights_kernel>(grid, kRowThreads, 0, stream, followed(batch),
                                                   channels, selection.scope_quarters, ws)) {
      return e;
    }
    if (const int e = launch_dependent<scope_first_kernel<0>>(grid, kRowThreads, 0, stream,
                                                              followed(batch), channels, ws)) {
      return e;
    }
    if (const int e = launch_dependent<scope_first_kernel<1>>(grid, kRowThreads, 0, stream,
                                                              followed(batch), channels, ws)) {
      return e;
    }
  }
  const auto run = [&](auto vectors) {
    constexpr int kTokens = kVector * vectors();
    const int needed = size.residual > 0 ? (size.residual + kTokens - 1) / kTokens : 1;
    // With many vectors, each of all threads has a list: few threads would mean more lists.
    const auto threads = vectors() > 2 ? kScopeThreads : static_cast<int>(round_up(needed, kWarp));
    const int64_t shared = round_up(words(size.tokens) * 4, 16) +
                           int64_t{kVector} * threads * static_cast<int64_t>(sizeof(Change));
    return launch_dependent<scope_kernel<vectors()>>(size.images, threads, static_cast<int>(shared),
                                                     stream, batch, channels, indices, ws);
  };
  if (size.residual <= kVector * kScopeThreads) return run(std::integral_constant<int, 1>{});
  if (size.residual <= 2 * kVector * kScopeThreads) return run(std::integral_constant<int, 2>{});
  return run(std::integral_constant<int, kMaxTokens / (kVector * kScopeThreads)>{});
}

}  // namespace

const MethodStages kScope{Order::kIndex, true, Matrix::kCoverage, bytes, select};

}  // namespace vispruner::cuda
