// SCOPE: the next pick is the token with the largest importance times coverage gain.
//
// The gain of a token is the coverage that it would add to that of the picks: the sum over all
// tokens u of max(0, cover(token, u) - covered(u)). Once some are picked, a pick raises `covered`
// of few tokens; each such change lowers the gains of all tokens by a part of one row of the
// matrix, which is symmetric. Gains are integers, so that the order of the changes does not matter.
//
// The first pick covers something of every token, and the gains after it are sums over the whole
// matrix: two kernels of many blocks compute them. Each further pick has three steps, with a
// barrier after each: find the best token; list the changes; lower the gains, four tokens per
// thread.
//
// Bytes: 8 N^2 read by many blocks; 4 N for each change, of which a token has about log(k).
#include "methods/greedy.cuh"
#include "methods/methods.cuh"

namespace vispruner::cuda {
namespace {

constexpr int kVector = 4;  // tokens
constexpr int kSlots = 4;   // tokens per thread that are checked for changes at a time
// Changes whose rows are loaded at a time.
template <int kVectors>
constexpr int kTogetherOf = kVectors <= 2 ? 6 : 1;

struct alignas(16) Words {
  uint32_t of[kVector];
};

struct ScopeLayout {  // byte offsets from WorkspaceLayout::method
  int64_t weights;    // float (N) importance^alpha
  int64_t wanted;     // uint32 (N) ordered keys of the first pick
  int64_t gains;      // uint32 (N) after the first pick
  int64_t covered;    // uint32 (N)
  int64_t bytes;
};

VP_HD ScopeLayout scope_layout(int tokens) {
  const int64_t each = round_up(int64_t{tokens} * 4, 256);
  return {0, each, 2 * each, 3 * each, 4 * each};
}

struct ScopeImage {
  int tokens;
  const uint32_t* scores;
  const uint32_t* matrix;  // (N, ld)
  int64_t ld;
  float* weights;
  uint32_t* wanted;
  uint32_t* gains;
  uint32_t* covered;

  __device__ __forceinline__ ScopeImage(const Image& image, int64_t channels,
                                        unsigned char* workspace)
      : tokens(image.shape.residual()) {
    const WorkspaceLayout at = workspace_layout(image.shape.tokens, tokens, channels);
    const ScopeLayout own_at = scope_layout(tokens);
    unsigned char* own = workspace + image.workspace;
    scores = reinterpret_cast<const uint32_t*>(own + at.scores);
    matrix = reinterpret_cast<const uint32_t*>(own + at.matrix);
    ld = at.ld;
    weights = reinterpret_cast<float*>(own + at.method + own_at.weights);
    wanted = reinterpret_cast<uint32_t*>(own + at.method + own_at.wanted);
    gains = reinterpret_cast<uint32_t*>(own + at.method + own_at.gains);
    covered = reinterpret_cast<uint32_t*>(own + at.method + own_at.covered);
  }

  // An ordered_key: the value is not negative.
  __device__ __forceinline__ static uint32_t key(uint32_t gain, float weight) {
    return float_bits(__uint2float_rn(gain) * weight) | 0x80000000u;
  }
};

constexpr int kRowThreads = 128, kRows = kRowThreads / kWarp;  // per block: one warp per row

// The tokens' weights, and their keys while nothing is covered.
__global__ void __launch_bounds__(kRowThreads)
    scope_weights_kernel(Batch batch, int64_t channels, int quarters, unsigned char* workspace) {
  begin_dependent(batch.more);
  const ScopeImage image(batch[blockIdx.y], channels, workspace);
  const int row = blockIdx.x * kRows + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= image.tokens) return;
  const uint32_t* covers = image.matrix + row * image.ld;
  uint32_t gain = 0, highest = 0;
#pragma unroll 4
  for (int u = threadIdx.x % kWarp; u < image.tokens; u += kWarp) {
    gain += covers[u];
    highest = max(highest, image.scores[u]);
  }
  gain = __reduce_add_sync(kAllLanes, gain);
  highest = __reduce_max_sync(kAllLanes, highest);
  if (threadIdx.x % kWarp != 0) return;
  const float share =
      importance(positive_score(key_float(image.scores[row])), positive_score(key_float(highest)));
  const float weight = power_of_quarters(share, quarters);
  image.weights[row] = weight;
  image.wanted[row] = ScopeImage::key(gain, weight);
}

// The coverage of the first pick, and the gains after it.
__global__ void __launch_bounds__(kRowThreads)
    scope_gains_kernel(Batch batch, int64_t channels, unsigned char* workspace) {
  begin_dependent(batch.more);
  const ScopeImage image(batch[blockIdx.y], channels, workspace);
  const int row = blockIdx.x * kRows + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= image.tokens) return;
  Candidate best = no_candidate();
#pragma unroll 4
  for (int t = threadIdx.x % kWarp; t < image.tokens; t += kWarp) best.raise(image.wanted[t], t);
  const int pick = best_of_warp(best).token;
  const uint32_t* covers = image.matrix + row * image.ld;
  const uint32_t* covered = image.matrix + pick * image.ld;
  uint32_t gain = 0;
#pragma unroll 4
  for (int u = threadIdx.x % kWarp; u < image.tokens; u += kWarp) {
    gain += max(covers[u], covered[u]) - covered[u];
  }
  gain = __reduce_add_sync(kAllLanes, gain);
  if (threadIdx.x % kWarp != 0) return;
  image.gains[row] = gain;
  image.covered[row] = covered[row];
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
  __shared__ Candidate slots[2][kScopeThreads / kWarp];
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
    auto* changes = reinterpret_cast<Change*>(memory + round_up(words(image.shape.tokens) * 4, 16));
    // Vector q of a thread: tokens first_of(q) to first_of(q) + 3.
    const auto first_of = [&](int q) {
      return kVector * (static_cast<int>(threadIdx.x) + q * threads);
    };
    constexpr int kTogether = kTogetherOf<kVectors>;
    constexpr int kUnrolled = kVectors <= 2 ? kVectors : 1;
    OwnVectors<uint32_t, kVectors> gains(scope.gains);
    OwnVectors<float, kVectors> weights(scope.weights);
    std::conditional_t<kVectors * kVector <= 32, uint32_t, uint64_t> left = 0;  // bits: not picked
    using Bits = decltype(left);
    Candidate best = no_candidate();
#pragma unroll kUnrolled
    for (int q = 0; q < kVectors; ++q) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const int token = first_of(q) + e;
        if (token >= tokens) continue;
        left |= Bits{1} << (q * kVector + e);
        gains.at(q, e, token) = scope.gains[token];
        weights.at(q, e, token) = scope.weights[token];
        best.raise(scope.wanted[token], token);
      }
    }
    for (int c = threadIdx.x; c < kSlots * threads + kTogether; c += threads) changes[c] = Change{};
    best = best_of_block(best, slots[1]);

    int turn = 0;
    for (int pick = 0;; ++pick) {
      if (threadIdx.x == 0) marks.set(best.token);
      if (pick == image.shape.diverse - 1) break;
#pragma unroll kUnrolled
      for (int q = 0; q < kVectors; ++q) {
        const int e = best.token - first_of(q);
        if (e >= 0 && e < kVector) left &= ~(Bits{1} << (q * kVector + e));
      }
      const uint32_t* row = scope.matrix + best.token * scope.ld;
      // The gains after the first pick are computed already.
      for (int begin = pick == 0 ? tokens : 0; begin < tokens; begin += kSlots * threads, ++turn) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const int token = begin + s * threads + static_cast<int>(threadIdx.x);
          const int lane = threadIdx.x % kWarp;
          if (token - lane >= tokens) break;  // the whole warp
          uint32_t before = 0, after = 0;
          if (token < tokens) {
            before = scope.covered[token];
            after = row[token];
          }
          const unsigned changed = __ballot_sync(kAllLanes, after > before);
          if (!changed) continue;
          const uint32_t sum = __reduce_add_sync(kAllLanes, after > before ? before : 0u);
          int slot = 0;
          if (lane == 0) {
            slot = atomicAdd(&listed[turn & 1].count, __popc(changed));
            atomicAdd(&listed[turn & 1].before, sum);
          }
          slot = __shfl_sync(kAllLanes, slot, 0) + __popc(changed & ((1u << lane) - 1));
          if (after > before) {
            scope.covered[token] = after;
            changes[slot] = {static_cast<uint32_t>(token) * row_bytes, before, after, 0};
          }
        }
        __syncthreads();
        const Listed now = listed[turn & 1];
        if (threadIdx.x == 0) listed[(turn + 1) & 1] = {0, 0};
#pragma unroll kUnrolled
        for (int q = 0; q < kVectors; ++q) {
          if (first_of(q) >= scope.ld) break;
          // The amount to subtract from the gains, plus the sum of `before`. Entries that change
          // nothing pad the list after the last change.
          const auto* columns = reinterpret_cast<const char*>(scope.matrix + first_of(q));
          uint32_t lost[kVector] = {};
          for (int c = 0; c < now.count; c += kTogether) {
            Change change[kTogether];
            Words covers[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              change[i] = changes[c + i];
              covers[i] = *reinterpret_cast<const Words*>(columns + change[i].row);
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
#pragma unroll
              for (int e = 0; e < kVector; ++e) {
                lost[e] += min(max(covers[i].of[e], change[i].before), change[i].after);
              }
            }
          }
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            const int token = first_of(q) + e;
            if (kVectors <= 2 || token < tokens) gains.at(q, e, token) -= lost[e] - now.before;
          }
        }
        __syncthreads();
        for (int c = threadIdx.x; c < now.count; c += threads) changes[c] = Change{};
        if (kVectors > 1) __syncthreads();  // the next list may follow at once
      }

      best = no_candidate();
#pragma unroll kUnrolled
      for (int q = 0; q < kVectors; ++q) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if (!(left & Bits{1} << (q * kVector + e))) continue;
          const int token = first_of(q) + e;
          best.raise(ScopeImage::key(gains.at(q, e, token), weights.at(q, e, token)), token);
        }
      }
      best = best_of_block(best, slots[pick & 1]);
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
    if (const int e = launch_dependent<scope_gains_kernel>(grid, kRowThreads, 0, stream,
                                                           followed(batch), channels, ws)) {
      return e;
    }
  }
  const auto run = [&](auto vectors) {
    constexpr int kTokens = kVector * vectors();
    const int needed = size.residual > 0 ? (size.residual + kTokens - 1) / kTokens : 1;
    const auto threads = static_cast<int>(round_up(needed, kWarp));
    const int64_t shared =
        round_up(words(size.tokens) * 4, 16) +
        int64_t{kSlots * threads + kTogetherOf<vectors()>} * static_cast<int64_t>(sizeof(Change));
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
