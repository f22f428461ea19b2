// Scores, ranking and quantization: one launch for the batch.
//
// A block takes 32 tokens of one image. Eight lanes a token count how many of the image's N scores
// beat it (rank by counting: N^2 compares over the whole grid, one barrier a tile, no sorting
// network), then each warp quantizes four tokens and writes their digits at their place in the
// ranking, so that everything after this kernel works on positions, not on tokens. Where that
// leaves most of a GPU idle, four times as many blocks take 8 tokens each: a warp quantizes one.
//
// Bytes: scores H N an image and block (from L2 after the first), features once, digits 2 C a
// token. Compares: N^2 an image, about 0.3 us of one SM at N = 576, spread over the blocks.
#include <type_traits>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 1024;  // scores in shared memory at a time

template <typename T>
__device__ __forceinline__ float element(const void* data, int64_t at) {
  return to_float(static_cast<const T*>(data)[at]);
}

__device__ __forceinline__ float attention_at(const AttentionView& view, int64_t at) {
  switch (view.dtype) {
    case DType::kFloat16: return element<Half>(view.data, at);
    case DType::kBFloat16: return element<BFloat16>(view.data, at);
    default: return element<float>(view.data, at);
  }
}

__device__ __forceinline__ uint32_t score_key(const AttentionView& view, int64_t first, int token) {
  const int64_t at = first + token * view.token_stride;
  float sum = attention_at(view, at);
  for (int64_t h = 1; h < view.heads; ++h) sum += attention_at(view, at + h * view.head_stride);
  return ordered_key(ranking_score(sum));
}

// Four channels from `c` on, zeros past the last one. `aligned`: the row allows vector loads.
template <typename T>
__device__ __forceinline__ void load4(const T* row, int64_t c, int64_t channels, bool aligned,
                                      float (&x)[4]) {
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  if (aligned && c + 4 <= channels) {
    const Four four = *reinterpret_cast<const Four*>(row + c);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(four.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = c + i < channels ? to_float(row[c + i]) : 0.0f;
  }
}

// The digits of four channels, a byte each.
struct Digits {
  uint32_t high, low;
};

__device__ __forceinline__ Digits digits_of(const float (&x)[4], float scale) {
  // Both digits are runs of the bits of q + kDigitBias, so that two channels go through in one
  // word.
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = quantize_bits(x[i], scale, kDigitBias);
  const uint32_t first = __byte_perm(q[0], q[1], 0x5410), second = __byte_perm(q[2], q[3], 0x5410);
  return {__byte_perm(first >> 6, second >> 6, 0x6420),
          __byte_perm(first, second, 0x6420) & 0x3f3f3f3fu};
}

// One warp, one token: digits to row `position`, their sum and the inverse norm.
template <typename T>
__device__ __forceinline__ void quantize_token(const T* row, int64_t channels, bool aligned,
                                               int position, int64_t padded_channels,
                                               unsigned char* digits, int* sums, float* inv) {
  const int lane = threadIdx.x % kWarp;
  uint32_t peak = 0;
  float x[4];
  for (int64_t c = 4 * lane; c < channels; c += 4 * kWarp) {
    load4(row, c, channels, aligned, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t m = magnitude_bits(x[i]);
      peak = m > peak ? m : peak;
    }
  }
  peak = __reduce_max_sync(kAllLanes, peak);
  const float scale = quantization_scale(peak);

  unsigned char* out = digits + position * kDigitPlanes * padded_channels;
  uint32_t high_high = 0, both_both = 0, low_low = 0, biased = 0;
  for (int64_t c = 4 * lane; c < padded_channels; c += 4 * kWarp) {
    Digits q{0x20202020u, 0x20202020u};  // of zeros
    if (scale != 0.0f) {
      load4(row, c, channels, aligned, x);  // from L1 this time
      q = digits_of(x, scale);
    }
    const uint32_t both = q.high + q.low;
    high_high = __dp4a(q.high, q.high, high_high);
    both_both = __dp4a(both, both, both_both);
    low_low = __dp4a(q.low, q.low, low_low);
    biased = __dp4a(q.high, 0x40404040u, biased);
    biased = __dp4a(q.low, 0x01010101u, biased);
    unsigned char* to =
        out + c / kChannelAlign * (kDigitPlanes * kChannelAlign) + c % kChannelAlign;
    *reinterpret_cast<uint32_t*>(to) = q.high;
    *reinterpret_cast<uint32_t*>(to + kChannelAlign) = q.low;
  }
  high_high = __reduce_add_sync(kAllLanes, high_high);
  both_both = __reduce_add_sync(kAllLanes, both_both);
  low_low = __reduce_add_sync(kAllLanes, low_low);
  biased = __reduce_add_sync(kAllLanes, biased);
  if (lane == 0) {
    const int sum = digit_sum(static_cast<int>(biased), padded_channels);
    sums[position] = sum;
    inv[position] = inverse_norm(gram_from_digits(high_high, both_both, low_low, sum, sum));
  }
}

// kTokens: of a block.
template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads)
    rank_kernel(Batch batch, FeatureView feats, AttentionView attention, RankOutput topk,
                unsigned char* workspace) {
  begin_dependent(batch.more);
  constexpr int kLanes = kThreads / kTokens;  // a token
  __shared__ uint32_t own_keys[kTokens];
  __shared__ uint32_t tile[kTile];
  __shared__ int ranks[kTokens];

  const Image image = batch[blockIdx.y];
  const int tokens = image.shape.tokens;
  const int first = blockIdx.x * kTokens;
  if (first >= tokens) return;
  const int slot = threadIdx.x / kLanes;
  const int token = first + slot;

  int rank = token;
  if (attention.data) {
    if (threadIdx.x < kTokens && first + static_cast<int>(threadIdx.x) < tokens) {
      own_keys[threadIdx.x] = score_key(attention, image.first_attention, first + threadIdx.x);
    }
    rank = 0;
    for (int base = 0; base < tokens; base += kTile) {
      const int count = min(kTile, tokens - base);
      __syncthreads();  // the tile before this one has been read
      for (int i = threadIdx.x; i < count; i += kThreads) {
        tile[i] = score_key(attention, image.first_attention, base + i);
      }
      __syncthreads();
      if (token < tokens) {
        // Beaten by a higher key, or by an equal one of a lower token.
        const uint32_t key = own_keys[slot];
        for (int i = threadIdx.x % kLanes; i < count; i += kLanes) {
          rank += tile[i] >= key + (base + i >= token ? 1u : 0u);
        }
      }
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      rank += __shfl_xor_sync(kAllLanes, rank, offset);
    }
  }
  if (threadIdx.x % kLanes == 0) {
    ranks[slot] = rank;
    if (token < tokens) {
      if (workspace) {
        // The layout begins with the order, whatever the rest is.
        reinterpret_cast<uint16_t*>(workspace + image.workspace)[rank] =
            static_cast<uint16_t>(token);
      }
      if (topk.indices && rank < topk.k) {
        const int64_t at = image.first_kept + rank;
        topk.indices[at] = token;
        if (topk.scores) topk.scores[at] = key_float(own_keys[slot]);
      }
    }
  }

  const int residual = image.shape.residual();
  if (residual == 0 || !workspace) return;
  __syncthreads();
  const WorkspaceLayout at = workspace_layout(tokens, residual, feats.channels);
  unsigned char* own = workspace + image.workspace;
  const T* rows = static_cast<const T*>(feats.data) + image.first_feature;
  const bool aligned =
      reinterpret_cast<uintptr_t>(rows) % (4 * sizeof(T)) == 0 && feats.token_stride % 4 == 0;
  for (int t = threadIdx.x / kWarp; t < kTokens && first + t < tokens; t += kThreads / kWarp) {
    const int position = ranks[t] - image.shape.important;
    if (position < 0) continue;
    quantize_token(rows + (first + t) * feats.token_stride, feats.channels, aligned, position,
                   at.padded_channels, own + at.digits, reinterpret_cast<int*>(own + at.sums),
                   reinterpret_cast<float*>(own + at.inv));
  }
}

}  // namespace

int rank_and_quantize(const Batch& batch, const WaveSize& size, const FeatureView& feats,
                      const AttentionView& attention, const RankOutput& topk, void* workspace,
                      void* stream) {
  const auto blocks = [&](int tokens) { return (size.tokens + tokens - 1) / tokens; };
  const auto run = [&](auto element, auto tokens) {
    return launch_dependent<rank_kernel<decltype(element), tokens()>>(
        dim3(blocks(tokens()), size.images), kThreads, 0, stream, batch, feats, attention, topk,
        static_cast<unsigned char*>(workspace));
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
         float* scores, void* stream) {
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
                                        {indices, scores, kept}, nullptr, stream);
    if (error) return error;
  }
  return 0;
}

}  // namespace vispruner::cuda
