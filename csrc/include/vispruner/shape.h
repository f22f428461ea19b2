// The sizes of pruning one image, and views of its inputs. Shared by the CPU and the CUDA path.
#pragma once
#include <cstdint>

#include "vispruner/numerics.h"

namespace vispruner {

constexpr int kMaxTokens = 32768;  // per image; token positions are 16-bit inside the kernels
constexpr int64_t kMaxChannels = (int64_t{1} << 18) - 1;  // 32-bit sums of digit products
constexpr int64_t kMaxHeads = 65535;                      // blocks of a grid's second dimension

struct ImageShape {
  int tokens;     // N
  int important;  // kept by score
  int diverse;    // kept by the dedup loop
  VP_HD int kept() const { return important + diverse; }
  // Tokens that enter the dedup loop; 0 if it has nothing to do.
  VP_HD int residual() const { return diverse > 0 ? tokens - important : 0; }
};

inline ImageShape image_shape(int64_t tokens, int64_t k, double important_ratio) {
  if (k >= tokens) return {static_cast<int>(tokens), static_cast<int>(tokens), 0};
  const auto important = static_cast<int64_t>(static_cast<double>(k) * important_ratio);
  return {static_cast<int>(tokens), static_cast<int>(important), static_cast<int>(k - important)};
}

// (H, N) attention of one image or of all: strides are in elements and arbitrary.
struct AttentionView {
  const void* data;  // null: no scores, tokens are in ranking order already
  DType dtype;
  int64_t heads;
  int64_t image_stride, head_stride, token_stride;
};

// Features: channels are contiguous, tokens and images are strided.
struct FeatureView {
  const void* data;
  DType dtype;
  int64_t channels;
  int64_t image_stride, token_stride;
};

// Queries or keys of attention heads: channels are contiguous, everything else is strided.
struct HeadsView {
  const void* data;
  int64_t image_stride, head_stride, token_stride;
};

struct ClsAttentionArgs {
  HeadsView q;  // one query per image and head
  HeadsView k;  // `tokens` keys, the first is [CLS]
  DType dtype;
  int64_t images;
  int heads, tokens, head_dim;
  double scale;
};

struct ReceivedAttentionArgs {
  HeadsView q, k;  // packed images: image_stride is not used
  DType dtype;
  int heads, head_dim;
  float scale;
  const float* lse;  // (heads, rows) log-sum-exp of each query's logits, or null
  int64_t lse_head_stride, lse_token_stride;
  int64_t images;
  const int64_t* bounds;  // (images + 1) first rows, on the host
  int64_t rows() const { return bounds[images]; }
};

VP_HD int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace vispruner
