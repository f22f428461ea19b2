// Attention scores on the CPU: products of the inputs summed in float32, memory linear in tokens.
// The one row of [CLS] is computed in float64, because one weight can dominate its softmax.
//
// Every image and head is computed separately and sums run in a fixed order, so that results do not
// depend on the batch or the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "vispruner/cpu.h"

namespace vispruner::cpu {
namespace {

constexpr int kDimAlign = 16;

const void* element_at(const void* data, DType dtype, int64_t element) {
  return static_cast<const char*>(data) + element * (dtype == DType::kFloat32 ? 4 : 2);
}

// `tokens` rows of one head as float32, channels padded with zeros to a multiple of 16.
std::vector<float> load_rows(const HeadsView& view, DType dtype, int64_t image, int64_t first_token,
                             int head, int tokens, int dim) {
  const int padded = static_cast<int>(round_up(dim, kDimAlign));
  std::vector<float> rows(static_cast<size_t>(tokens) * static_cast<size_t>(padded));
  for (int t = 0; t < tokens; ++t) {
    const int64_t at =
        image * view.image_stride + head * view.head_stride + (first_token + t) * view.token_stride;
    isa().load(element_at(view.data, dtype, at), dtype, dim, rows.data() + int64_t{t} * padded);
  }
  return rows;
}

// `tokens` rows of one head as words of two bfloat16 channels, padded with zeros as above.
std::vector<float> load_bfloat16_rows(const HeadsView& view, int64_t first_token, int head,
                                      int tokens, int dim) {
  const auto words = static_cast<int>(round_up(dim, kDimAlign)) / 2;
  std::vector<float> rows(static_cast<size_t>(tokens) * static_cast<size_t>(words));
  for (int t = 0; t < tokens; ++t) {
    const int64_t at = head * view.head_stride + (first_token + t) * view.token_stride;
    std::memcpy(rows.data() + int64_t{t} * words, element_at(view.data, DType::kBFloat16, at),
                static_cast<size_t>(dim) * sizeof(BFloat16));
  }
  return rows;
}

// Converts rows of `words` words, a multiple of kPanelKeys, to panels of kPanelKeys keys (isa.h).
std::vector<float> to_panels(const std::vector<float>& rows, int words) {
  static_assert(kPanelKeys == kTransposedRows);
  std::vector<float> panels(rows.size());
  for (size_t at = 0; at < rows.size(); at += static_cast<size_t>(kPanelKeys) * words) {
    isa().transpose(rows.data() + at, words, words, panels.data() + at, kPanelKeys);
  }
  return panels;
}

// weights = exp(logits - max); returns their sum.
double exponentials(const double* logits, int count, float* weights) {
  const double highest = *std::max_element(logits, logits + count);
  double sum = 0.0;  // thousands of terms
  for (int t = 0; t < count; ++t) {
    weights[t] = std::exp(static_cast<float>(logits[t] - highest));
    sum += static_cast<double>(weights[t]);
  }
  return sum;
}

// Runs body(task) for every task, on the available threads.
void for_each(const Threads& threads, int64_t tasks, const std::function<void(int64_t)>& body) {
  if (tasks > 0) threads.run(tasks, body);
}

}  // namespace

void cls_attention(const ClsAttentionArgs& args, float* out, const Threads& threads) {
  const int patches = args.tokens - 1;
  for_each(threads, args.images, [&](int64_t image) {
    std::vector<double> logits(static_cast<size_t>(args.tokens));
    std::vector<float> weights(logits.size());
    float* mean = out + image * patches;
    std::fill(mean, mean + patches, 0.0f);
    for (int head = 0; head < args.heads; ++head) {
      const auto q = load_rows(args.q, args.dtype, image, 0, head, 1, args.head_dim);
      const auto k = load_rows(args.k, args.dtype, image, 0, head, args.tokens, args.head_dim);
      isa().exact_logits(q.data(), k.data(), args.tokens, static_cast<int>(q.size()), args.scale,
                         logits.data());
      const auto sum = static_cast<float>(exponentials(logits.data(), args.tokens, weights.data()));
      for (int t = 0; t < patches; ++t) mean[t] += weights[static_cast<size_t>(t) + 1] / sum;
    }
    for (int t = 0; t < patches; ++t) mean[t] /= static_cast<float>(args.heads);
  });
}

void received_attention(const ReceivedAttentionArgs& args, float* out, const Threads& threads) {
  constexpr int kBlock = 32;  // queries per float32 sum; blocks are added in float64
  const int64_t rows = args.rows();
  const bool in_bfloat16 = args.dtype == DType::kBFloat16 && isa().add_weights_bfloat16;
  const auto add_weights = in_bfloat16 ? isa().add_weights_bfloat16 : isa().add_weights;
  std::vector<double> sums(static_cast<size_t>(args.heads * rows));  // (heads, rows)
  for_each(threads, args.images * args.heads, [&](int64_t task) {
    const int64_t image = task / args.heads;
    const int head = static_cast<int>(task % args.heads);
    const int64_t first = args.bounds[image];
    const auto tokens = static_cast<int>(args.bounds[image + 1] - first);
    if (tokens == 0) return;
    const auto load = [&](const HeadsView& view) {
      return in_bfloat16 ? load_bfloat16_rows(view, first, head, tokens, args.head_dim)
                         : load_rows(view, args.dtype, 0, first, head, tokens, args.head_dim);
    };
    auto q = load(args.q), k = load(args.k);
    const auto words = static_cast<int>(q.size() / static_cast<size_t>(tokens));
    q.resize(static_cast<size_t>(round_up(tokens, kQueryTile) * words));
    k.resize(static_cast<size_t>(round_up(tokens, kPanelKeys) * words));
    k = to_panels(k, words);
    double* total = sums.data() + head * rows + first;
    const auto width = static_cast<size_t>(round_up(tokens, kPanelKeys));
    std::vector<float> block(width), scratch(kQueryTile * width);
    for (int begin = 0; begin < tokens; begin += kBlock) {
      std::fill(block.begin(), block.end(), 0.0f);
      for (int i = begin; i < std::min(begin + kBlock, tokens); i += kQueryTile) {
        const int queries = std::min(kQueryTile, tokens - i);
        float lse[kQueryTile];
        for (int j = 0; args.lse && j < queries; ++j) {
          lse[j] = args.lse[head * args.lse_head_stride + (first + i + j) * args.lse_token_stride];
        }
        add_weights(q.data() + int64_t{i} * words, queries, k.data(), tokens, words, args.scale,
                    args.lse ? lse : nullptr, scratch.data(), block.data());
      }
      for (int t = 0; t < tokens; ++t)
        total[t] += static_cast<double>(block[static_cast<size_t>(t)]);
    }
  });
  for (int64_t image = 0; image < args.images; ++image) {
    const int64_t first = args.bounds[image], last = args.bounds[image + 1];
    const double count = static_cast<double>(args.heads) * static_cast<double>(last - first);
    for (int64_t t = first; t < last; ++t) {
      double sum = 0.0;
      for (int head = 0; head < args.heads; ++head)
        sum += sums[static_cast<size_t>(head * rows + t)];
      out[t] = static_cast<float>(sum / count);
    }
  }
}

}  // namespace vispruner::cpu
