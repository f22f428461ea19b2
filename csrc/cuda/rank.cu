// Scores, ranking and quantization: one launch for the batch.
//
// A block takes 32 tokens of one image. Eight lanes per token count how many of the image's N
// scores beat it (rank by counting: N^2 compares over the whole grid, one barrier per tile, no
// sorting network), then each warp quantizes four tokens and writes their digits at their place in
// the ranking, so that all later kernels work on positions, not on tokens. If that leaves most of a
// GPU idle, four times as many blocks take 8 tokens each: each warp ranks and quantizes one.
//
// The chain of dependent accesses to global memory, for up to 1024 tokens and channels: the scores,
// 4 heads of up to 4 tokens at a time; a warp's first row of features is loaded at the same time.
// 1024 more tokens take another access, and so does each further row.
//
// Bytes: scores H N per image and block (from L2 after the first), features once up to 1024
// channels and twice beyond (the second time from L1 or L2), digits 2 C per token. Compares: N^2
// per image, about 0.3 us of one SM at N = 576, spread over the blocks.
#include <type_traits>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 1024;  // scores in shared memory at a time
constexpr int kVectorBytes = 16;
static_assert(kTile % 32 == 0, "the tokens of a block are in one tile");

struct alignas(kVectorBytes) Keys {
  uint32_t of[4];
};

// The keys of `count` tokens from `base` on: the heads' scores are added in their order.
template <int kHeadsAtOnce, bool kScored, typename T>
__device__ __forceinline__ void load_keys_of(const AttentionView& view, const Ranking& ranking,
                                             int64_t first, int base, int count, uint32_t* tile) {
  constexpr int kEach = kTile / kThreads;
  const T* scores[kEach];
  float sums[kEach] = {};  // -0 and +0 are equal
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int token = base + min(static_cast<int>(threadIdx.x) + i * kThreads, count - 1);
    scores[i] = static_cast<const T*>(view.data) + first + token * view.token_stride;
  }
  const auto add_heads = [&](auto heads) {
    constexpr int kHeads = decltype(heads)::value;
    T loaded[kEach][kHeads];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i * kThreads >= count) break;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        loaded[i][h] = *scores[i];
        scores[i] += view.head_stride;
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i * kThreads >= count) break;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) sums[i] += to_float(loaded[i][h]);
    }
  };
  auto left = static_cast<int>(view.heads);
  for (; left >= kHeadsAtOnce; left -= kHeadsAtOnce) {
    add_heads(std::integral_constant<int, kHeadsAtOnce>{});
  }
  for (; left >= 1; left -= 1) add_heads(std::integral_constant<int, 1>{});
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = threadIdx.x + i * kThreads;
    if (at >= count) continue;
    const uint32_t key = ordered_key(ranking_score(sums[i]));
    const bool random = !kScored && ranking.order == Order::kRandom;
    tile[at] = random ? random_key(ranking.seed, base + at, key) : key;
  }
  // Whole vectors are read; 0 is below every key.
  if (threadIdx.x < -count % 4u) tile[count + threadIdx.x] = 0;
}

template <int kHeadsAtOnce, bool kScored>
__device__ __forceinline__ void load_keys(const AttentionView& view, const Ranking& ranking,
                                          int64_t first, int base, int count, uint32_t* tile) {
  switch (view.dtype) {
    case DType::kFloat16:
      return load_keys_of<kHeadsAtOnce, kScored, Half>(view, ranking, first, base, count, tile);
    case DType::kBFloat16:
      return load_keys_of<kHeadsAtOnce, kScored, BFloat16>(view, ranking, first, base, count, tile);
    default:
      return load_keys_of<kHeadsAtOnce, kScored, float>(view, ranking, first, base, count, tile);
  }
}

// The sum over kLanes neighbouring lanes, for all of them.
template <int kLanes>
__device__ __forceinline__ int sum_of_lanes(int value) {
  if constexpr (kLanes == kWarp) {
    return __reduce_add_sync(kAllLanes, value);
  } else {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(kAllLanes, value, offset);
    }
    return value;
  }
}

template <typename T>
struct Row {
  const T* data;
  int channels;
  bool aligned;  // whole vectors can be loaded
};

// 1024 channels of a row, spread over a warp; zeros past the last one.
template <typename T>
struct RowPart {
  static constexpr int kChannels = 1024;
  static constexpr int kPer = kVectorBytes / sizeof(T);
  static constexpr int kVectors = kChannels / kPer / kWarp;
  struct alignas(kVectorBytes) Vector {
    T v[kPer];
  };
  Vector vectors[kVectors];

  __device__ __forceinline__ static int channel(int first, int vector) {
    return first + (vector * kWarp + threadIdx.x % kWarp) * kPer;
  }

  __device__ __forceinline__ void load(const Row<T>& row, int first) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = channel(first, i);
      vectors[i] = Vector{};
      if (row.aligned) {
        if (c < row.channels) vectors[i] = *reinterpret_cast<const Vector*>(row.data + c);
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          if (c + e < row.channels) vectors[i].v[e] = row.data[c + e];
        }
      }
    }
  }

  // The largest magnitude_bits of this lane's channels. The bits of 16-bit formats are in the same
  // order, so that two are compared in one word.
  __device__ __forceinline__ uint32_t peak() const {
    uint32_t most = 0, upper = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int e = 0; e < kPer; ++e) most = max(most, magnitude_bits(vectors[i].v[e]));
      } else {
        const Keys words = *reinterpret_cast<const Keys*>(&vectors[i]);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          most = max(most, words.of[w] & 0x7fffu);
          upper = max(upper, words.of[w] & 0x7fffffffu);
        }
      }
    }
    if constexpr (sizeof(T) == 4) {
      return most;
    } else {
      return float_bits(to_float(T{static_cast<uint16_t>(max(most, upper >> 16))}));
    }
  }
};

// The digits of four channels, one byte each.
struct Digits {
  uint32_t high, low;
};

template <typename T>
__device__ __forceinline__ Digits digits_of(const T* x, float scale) {
  // Both digits are consecutive bits of q + kDigitBias, so that two channels are processed in one
  // word.
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = quantize_bits(to_float(x[i]), scale, kDigitBias);
  const uint32_t first = __byte_perm(q[0], q[1], 0x5410), second = __byte_perm(q[2], q[3], 0x5410);
  return {__byte_perm(first >> 6, second >> 6, 0x6420),
          __byte_perm(first, second, 0x6420) & 0x3f3f3f3fu};
}

// One warp, one token, the first part of whose row is loaded: writes the digits to row `position`,
// their sum and the inverse norm.
template <typename T>
__device__ __forceinline__ void quantize_token(const Row<T>& row, RowPart<T>& part, int position,
                                               int padded_channels, unsigned char* digits,
                                               int* sums, float* inv) {
  using Part = RowPart<T>;
  uint32_t peak = part.peak();
  for (int first = Part::kChannels; first < padded_channels; first += Part::kChannels) {
    part.load(row, first);
    peak = max(peak, part.peak());
  }
  const float scale = quantization_scale(__reduce_max_sync(kAllLanes, peak));

  unsigned char* out = digits + int64_t{position} * (kDigitPlanes * padded_channels);
  uint32_t high_high = 0, both_both = 0, low_low = 0, biased = 0;
  for (int first = 0; first < padded_channels; first += Part::kChannels) {
    if (padded_channels > Part::kChannels) part.load(row, first);  // from L1 or L2 this time
#pragma unroll
    for (int i = 0; i < Part::kVectors; ++i) {
      const int c = Part::channel(first, i);
      if (c >= padded_channels) break;
      struct alignas(Part::kPer) Plane {
        uint32_t of[Part::kPer / 4];
      } high, low;
#pragma unroll
      for (int w = 0; w < Part::kPer / 4; ++w) {
        Digits q{0x20202020u, 0x20202020u};  // of zeros
        if (scale != 0.0f) q = digits_of(part.vectors[i].v + 4 * w, scale);
        const uint32_t both = q.high + q.low;
        high_high = __dp4a(q.high, q.high, high_high);
        both_both = __dp4a(both, both, both_both);
        low_low = __dp4a(q.low, q.low, low_low);
        biased = __dp4a(q.high, 0x40404040u, biased);
        biased = __dp4a(q.low, 0x01010101u, biased);
        high.of[w] = q.high;
        low.of[w] = q.low;
      }
      unsigned char* to =
          out + (c / kChannelAlign * (kDigitPlanes * kChannelAlign) + c % kChannelAlign);
      *reinterpret_cast<Plane*>(to) = high;
      *reinterpret_cast<Plane*>(to + kChannelAlign) = low;
    }
  }
  high_high = __reduce_add_sync(kAllLanes, high_high);
  both_both = __reduce_add_sync(kAllLanes, both_both);
  low_low = __reduce_add_sync(kAllLanes, low_low);
  biased = __reduce_add_sync(kAllLanes, biased);
  if (threadIdx.x % kWarp == 0) {
    const int sum = digit_sum(static_cast<int>(biased), padded_channels);
    sums[position] = sum;
    inv[position] = inverse_norm(gram_from_digits(high_high, both_both, low_low, sum, sum));
  }
}

// kTokens: per block. kScored: positions are ranks by score, and no scores are stored.
template <typename T, int kTokens, bool kScored>
__device__ __forceinline__ void rank_tokens(const Batch& batch, const FeatureView& feats,
                                            const AttentionView& attention, const Ranking& ranking,
                                            const RankOutput& topk, unsigned char* workspace) {
  constexpr int kLanes = kThreads / kTokens;  // per token
  alignas(kVectorBytes) __shared__ uint32_t tile[kTile];
  __shared__ int ranks[kTokens];

  const Image image = batch[blockIdx.y];
  const int tokens = image.shape.tokens;
  const int first = blockIdx.x * kTokens;
  if (first >= tokens) return;

  // The first row that this warp quantizes is loaded while the scores are.
  const int residual = workspace ? image.shape.residual() : 0;
  const int first_row = first + static_cast<int>(threadIdx.x) / kWarp;
  const auto row_of = [&](int token) {
    constexpr int kPer = RowPart<T>::kPer;
    const T* data =
        static_cast<const T*>(feats.data) + image.first_feature + token * feats.token_stride;
    const bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
                         feats.token_stride % kPer == 0 && feats.channels % kPer == 0;
    return Row<T>{data, static_cast<int>(feats.channels), aligned};
  };
  RowPart<T> part;
  if (residual > 0 && first_row < tokens) part.load(row_of(first_row), 0);

  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int token = first + slot;
  int rank = token;
  uint32_t key = 0;
  if (attention.data) {
    rank = 0;
    // A block reads the tile of its tokens first, and no other if the order is given.
    const bool given = !kScored && ranking.order == Order::kIndex;
    const int tiles = given ? 1 : (tokens + kTile - 1) / kTile, own_tile = first / kTile;
    for (int t = 0; t < tiles; ++t) {
      const int base =
          (given || own_tile + t < tiles ? own_tile + t : own_tile + t - tiles) * kTile;
      const int count = min(kTile, tokens - base);
      if (t > 0) __syncthreads();  // the tile before this one has been read
      load_keys<kTokens == 8 ? 4 : 2, kScored>(attention, ranking, image.first_attention, base,
                                               count, tile);
      __syncthreads();
      if (token >= tokens) continue;
      const auto* vectors = reinterpret_cast<const Keys*>(tile);
      // Beaten by a higher key, or by an equal one of a lower token.
      if (t == 0) {
        key = tile[token - base];
        if (given) break;
        const Keys own = vectors[(token - base) / 4];
#pragma unroll
        for (int e = 0; e < 3; ++e) rank += lane == 0 && e < token % 4 && own.of[e] == key;
      }
      for (int i = lane; i < (count + 3) / 4; i += kLanes) {
        const uint32_t least = key + (base + 4 * i + 3 >= token ? 1u : 0u);
        const Keys keys = vectors[i];
#pragma unroll
        for (int e = 0; e < 4; ++e) rank += keys.of[e] >= least;
      }
    }
    rank = given ? token : sum_of_lanes<kLanes>(rank);
  }
  if (lane == 0) {
    ranks[slot] = rank;
    if (token < tokens) {
      if (workspace) {
        // The layout always begins with the order.
        reinterpret_cast<uint16_t*>(workspace + image.workspace)[rank] =
            static_cast<uint16_t>(token);
        if (!kScored && ranking.scores &&
            residual > 0) {  // the order is given: no token is important
          const int64_t at = workspace_layout(tokens, residual, feats.channels).scores;
          reinterpret_cast<uint32_t*>(workspace + image.workspace + at)[token] = key;
        }
      }
      if (topk.indices && rank < topk.k) {
        const int64_t at = image.first_kept + rank;
        topk.indices[at] = token;
        if (topk.scores) topk.scores[at] = key_float(key);
      }
    }
  }

  if (residual == 0) return;
  __syncthreads();
  const WorkspaceLayout at = workspace_layout(tokens, residual, feats.channels);
  unsigned char* own = workspace + image.workspace;
  for (int row = first_row; row < min(first + kTokens, tokens); row += kThreads / kWarp) {
    const int position = ranks[row - first] - image.shape.important;
    if (position < 0) continue;
    if (row != first_row) part.load(row_of(row), 0);
    quantize_token(row_of(row), part, position, static_cast<int>(at.padded_channels),
                   own + at.digits, reinterpret_cast<int*>(own + at.sums),
                   reinterpret_cast<float*>(own + at.inv));
  }
}

template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens == 8 || sizeof(T) == 4 ? 2 : 3)
    rank_kernel(Batch batch, FeatureView feats, AttentionView attention, RankOutput topk,
                unsigned char* workspace) {
  begin_dependent(batch.more);
  rank_tokens<T, kTokens, true>(batch, feats, attention, {}, topk, workspace);
}

// The same for the orders of other methods. A second block per multiprocessor would need spills on
// sm_90 and sm_100.
template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    order_kernel(Batch batch, FeatureView feats, AttentionView attention, Ranking ranking,
                 unsigned char* workspace) {
  begin_dependent(batch.more);
  rank_tokens<T, kTokens, false>(batch, feats, attention, ranking, {}, workspace);
}

}  // namespace

int rank_and_quantize(const Batch& batch, const WaveSize& size, const FeatureView& feats,
                      const AttentionView& attention, const Ranking& ranking,
                      const RankOutput& topk, void* workspace, Stream stream) {
  const auto blocks = [&](int tokens) { return (size.tokens + tokens - 1) / tokens; };
  auto* ws = static_cast<unsigned char*>(workspace);
  const auto run = [&](auto element, auto tokens) {
    const dim3 grid(blocks(tokens()), size.images);
    if (ranking.order == Order::kScore && !ranking.scores) {
      return launch_dependent<rank_kernel<decltype(element), tokens()>>(
          grid, kThreads, 0, stream, batch, feats, attention, topk, ws);
    }
    return launch_dependent<order_kernel<decltype(element), tokens()>>(
        grid, kThreads, 0, stream, batch, feats, attention, ranking, ws);
  };
  const auto sized = [&](auto element) {
    const plan::Rank plan = plan::choose(plan::current().rank, int64_t{blocks(32)} * size.images);
    return plan == plan::Rank::kTokens8 ? run(element, std::integral_constant<int, 8>{})
                                        : run(element, std::integral_constant<int, 32>{});
  };
  switch (feats.dtype) {
    case DType::kFloat16: return sized(Half{});
    case DType::kBFloat16: return sized(BFloat16{});
    default: return sized(float{});
  }
}

int topk(const AttentionView& attention, int64_t images, int tokens, int k, int64_t* indices,
         float* scores, Stream stream) {
  const int kept = k < tokens ? k : tokens;
  if (images == 0 || kept == 0) return 0;
  Batch batch{};
  batch.first.shape = {tokens, kept, 0};
  batch.attention_stride = attention.image_stride;
  batch.kept_stride = kept;
  constexpr int64_t kMostImages = 32768;  // grid.y
  for (int64_t done = 0; done < images; done += kMostImages) {
    const auto now = static_cast<int>(images - done < kMostImages ? images - done : kMostImages);
    batch.first.first_attention = done * attention.image_stride;
    batch.first.first_kept = done * kept;
    const int error = rank_and_quantize(batch, {now, tokens, 0, kept}, FeatureView{}, attention,
                                        Ranking{}, {indices, scores, kept}, nullptr, stream);
    if (error) return error;
  }
  return 0;
}

}  // namespace vispruner::cuda
