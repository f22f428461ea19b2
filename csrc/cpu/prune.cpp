// Ranking, exact Gram matrix, a method's selection and gather of one image on the CPU.
//
// Cost at R residual tokens: Gram R^2 C / 2 multiply-adds (int16, two per lane and instruction),
// plus the cost of the method (csrc/cpu/methods).
#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "stages.h"
#include "vispruner/cpu.h"

namespace vispruner::cpu {
namespace {

struct PruneWorkspace {
  uint64_t* ranked;  // sort keys, then (in the low half) tokens in the method's order
  float* scores;     // of all tokens
  uint8_t* keep;

  PruneWorkspace(Arena& arena, const ImageShape& shape)
      : ranked(arena.take<uint64_t>(shape.tokens)),
        scores(arena.take<float>(shape.tokens)),
        keep(arena.take<uint8_t>(shape.tokens)) {}
};

// Arrays for the method's loop, which reuses the memory of the quantized tokens.
struct LoopWorkspace {
  float* scores;  // (R)
  float* matrix;  // (padded, padded)
  GramWorkspace gram;

  LoopWorkspace(Arena& arena, int residual, int64_t channels, int threads)
      : scores(arena.take<float>(residual)),
        matrix(arena.take<float>(round_up(residual, kTileCols) * round_up(residual, kTileCols))),
        gram(arena, residual, channels, threads) {
    arena.rewind(gram.only_for_gram);
  }
};

const MethodKernels& kernels_of(Method method) {
  switch (method) {
    case Method::kTopk: return kTopk;
    case Method::kRandom: return kRandom;
    case Method::kMaxmin: return kMaxmin;
    case Method::kScope: return kScope;
    case Method::kMmr: return kMmr;
    default: return kVispruner;
  }
}

template <typename T>
float element(const void* data, int64_t at) {
  return to_float(static_cast<const T*>(data)[at]);
}

float attention_at(const AttentionView& view, const void* data, int64_t at) {
  switch (view.dtype) {
    case DType::kFloat16: return element<Half>(data, at);
    case DType::kBFloat16: return element<BFloat16>(data, at);
    default: return element<float>(data, at);
  }
}

int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The scores of all tokens: their heads' scores are added in their order.
void add_heads(const AttentionView& view, const void* data, int tokens, float* scores) {
  constexpr int kTogether = 256;
  float row[kTogether];
  for (int first = 0; first < tokens; first += kTogether) {
    const int count = std::min(kTogether, tokens - first);
    float* sums = scores + first;
    for (int64_t h = 0; h < view.heads; ++h) {
      const int64_t at = h * view.head_stride + first * view.token_stride;
      if (view.token_stride == 1) {
        isa().load(static_cast<const char*>(data) + at * dtype_bytes(view.dtype), view.dtype, count,
                   row);
      } else {
        for (int i = 0; i < count; ++i)
          row[i] = attention_at(view, data, at + i * view.token_stride);
      }
      if (h == 0) {
        std::copy_n(row, count, sums);
      } else {
        for (int i = 0; i < count; ++i) sums[i] += row[i];
      }
    }
    for (int i = 0; i < count; ++i) sums[i] = ranking_score(sums[i]);
  }
}

// Ascending order of these keys is ranking order: key descending, then token ascending.
uint64_t rank_key(uint32_t key, int token) {
  return (uint64_t{~key} << 32) | static_cast<uint32_t>(token);
}

// The keys of all tokens, the first k of them in order. Without scores that is the order of tokens.
void rank_keys(const float* scores, Order order, uint32_t seed, int tokens, int k, uint64_t* keys) {
  if (!scores || order == Order::kIndex) {
    for (int t = 0; t < tokens; ++t) keys[t] = static_cast<uint64_t>(t);
    return;
  }
  for (int t = 0; t < tokens; ++t) {
    const uint32_t key = ordered_key(scores[t]);
    keys[t] = rank_key(
        order == Order::kRandom ? random_key(seed, static_cast<uint32_t>(t), key) : key, t);
  }
  if (k < tokens) std::nth_element(keys, keys + k, keys + tokens);
  std::sort(keys, keys + std::min(k, tokens));
}

int key_token(uint64_t key) { return static_cast<int>(static_cast<uint32_t>(key)); }

// Quantizes rows `token_of(0) ... token_of(rows - 1)` into panels, with their inverse norms.
template <typename TokenOf>
void quantize_rows(const FeatureView& feats, const void* first, const TokenOf& token_of,
                   const Threads& threads, GramWorkspace& ws) {
  const int64_t bytes = dtype_bytes(feats.dtype);
  for_each_task(threads, ws.padded / kPanelTokens, [&](int64_t p, int worker) {
    float* scratch = ws.row_scratch + worker * ws.row_stride;
    int16_t* tokens = ws.token_scratch + worker * kPanelTokens * ws.row_stride;
    for (int slot = 0; slot < kPanelTokens; ++slot) {
      const auto row = static_cast<int>(p) * kPanelTokens + slot;
      int16_t* token = tokens + slot * ws.row_stride;
      token[2 * ws.pairs - 1] = 0;  // the last channel may be without a pair
      if (row >= ws.rows) {         // padding
        std::fill(token, token + 2 * ws.pairs, int16_t{0});
        ws.inv[row] = 0.0f;
        continue;
      }
      const char* x = static_cast<const char*>(first) + token_of(row) * feats.token_stride * bytes;
      ws.inv[row] =
          inverse_norm(isa().quantize_token(x, feats.dtype, feats.channels, token, scratch));
    }
    static_assert(kPanelTokens == kTransposedRows);
    isa().transpose(reinterpret_cast<const float*>(tokens), ws.row_stride / 2, ws.pairs,
                    reinterpret_cast<float*>(ws.panels + p * ws.panel_size), kPanelTokens);
  });
}

// Pairs of channels whose products int32 can sum. No sum of products of two tokens exceeds the
// product of their norms (Cauchy-Schwarz), so all pairs can be summed if squared norms are below
// 2^31, which rounded norms of at most 2^15 imply.
int64_t int32_pairs(const GramWorkspace& ws) {
  const bool small = std::all_of(ws.inv, ws.inv + ws.rows,
                                 [](float inv) { return inv == 0.0f || inv >= 0x1p-15f; });
  return small ? ws.pairs : kInt32Products / 2;
}

// Calls emit(row, col, gram_tile) for every tile on or above the diagonal, in parallel.
template <typename Emit>
void for_each_tile(const Threads& threads, const GramWorkspace& ws, const Emit& emit) {
  const int64_t columns = ws.padded / kTileCols;
  const int64_t int32_sums = int32_pairs(ws);
  for_each_task(threads, columns, [&](int64_t task, int) {
    const auto col0 = static_cast<int>(columns - 1 - task) * kTileCols;  // the longest first
    float tile[kTileRows * kTileCols];
    for (int row0 = 0; row0 < std::min(col0 + kTileCols, ws.rows); row0 += kTileRows) {
      isa().gram_tile(ws.panels, ws.panel_size, ws.pairs, int32_sums, row0, col0, tile);
      emit(row0, col0, tile);
    }
  });
}

void gram_matrix(const Threads& threads, const GramWorkspace& ws, float* matrix) {
  const int64_t ld = ws.padded;
  for_each_tile(threads, ws, [&](int row0, int col0, const float* tile) {
    for (int r = 0; r < kTileRows; ++r) {
      std::copy_n(tile + r * kTileCols, kTileCols, matrix + (row0 + r) * ld + col0);
    }
    if (row0 >= col0) return;  // a tile on the diagonal holds both halves
    static_assert(kTileRows == kTransposedRows);
    isa().transpose(tile, kTileCols, kTileCols, matrix + col0 * ld + row0, ld);
  });
}

}  // namespace

void topk(const AttentionView& attention, int64_t image, int tokens, int k, int64_t* order,
          float* scores) {
  const void* first = static_cast<const char*>(attention.data) +
                      image * attention.image_stride * dtype_bytes(attention.dtype);
  std::vector<float> sums(static_cast<size_t>(tokens));
  std::vector<uint64_t> keys(static_cast<size_t>(tokens));
  add_heads(attention, first, tokens, sums.data());
  rank_keys(sums.data(), Order::kScore, 0, tokens, k, keys.data());
  for (int r = 0; r < std::min(k, tokens); ++r) {
    order[r] = key_token(keys[static_cast<size_t>(r)]);
    if (scores) scores[r] = key_float(~static_cast<uint32_t>(keys[static_cast<size_t>(r)] >> 32));
  }
}

int64_t prune_workspace_bytes(const ImageShape& shape, int64_t channels, const Selection& selection,
                              int threads) {
  Arena arena(nullptr);
  PruneWorkspace prune(arena, shape);
  if (shape.residual() > 0) {
    LoopWorkspace loop(arena, shape.residual(), channels, threads);
    kernels_of(selection.method).reserve(arena, loop.gram, threads);
  }
  return arena.bytes();
}

void prune_image(const FeatureView& feats, const AttentionView& attention, const PruneImage& image,
                 const Selection& selection, const Threads& threads, void* workspace) {
  Arena arena(workspace);
  const ImageShape& shape = image.shape;
  const MethodKernels& method = kernels_of(selection.method);
  PruneWorkspace ws(arena, shape);
  const bool scored = image.attention && (method.order != Order::kIndex || method.scores);
  if (scored) add_heads(attention, image.attention, shape.tokens, ws.scores);
  rank_keys(scored ? ws.scores : nullptr, method.order, selection.seed, shape.tokens,
            shape.residual() > 0 ? shape.tokens : shape.kept(), ws.ranked);
  std::fill(ws.keep, ws.keep + shape.tokens, uint8_t{0});
  for (int r = 0; r < shape.important; ++r) ws.keep[key_token(ws.ranked[r])] = 1;

  if (const int residual = shape.residual(); residual > 0) {
    const uint64_t* order = ws.ranked + shape.important;
    LoopWorkspace loop(arena, residual, feats.channels, threads.count);
    if (method.scores) {
      for (int i = 0; i < residual; ++i) {
        loop.scores[i] = ws.scores[key_token(order[i])];
      }
    }
    quantize_rows(
        feats, image.feats, [&](int row) { return key_token(order[row]); }, threads, loop.gram);
    gram_matrix(threads, loop.gram, loop.matrix);
    const uint16_t* picks = method.select(arena, {loop.gram, loop.matrix, loop.scores},
                                          shape.diverse, selection, threads);
    for (int i = 0; i < shape.diverse; ++i) ws.keep[key_token(order[picks[i]])] = 1;
  }

  int64_t* indices = image.indices;
  const int64_t row_bytes = feats.channels * dtype_bytes(feats.dtype);
  char* out = static_cast<char*>(image.kept_feats);
  for (int t = 0; t < shape.tokens; ++t) {
    if (!ws.keep[t]) continue;
    *indices++ = image.index_base + t;
    if (!out) continue;
    const int64_t from = t * feats.token_stride * dtype_bytes(feats.dtype);
    std::memcpy(out, static_cast<const char*>(image.feats) + from, static_cast<size_t>(row_bytes));
    out += row_bytes;
  }
}

int64_t cosine_workspace_bytes(int tokens, int64_t channels, int threads) {
  Arena arena(nullptr);
  GramWorkspace ws(arena, tokens, channels, threads);
  return arena.bytes();
}

void pairwise_cosine(const FeatureView& feats, const void* first_token, int tokens, float* out,
                     const Threads& threads, void* workspace) {
  Arena arena(workspace);
  GramWorkspace ws(arena, tokens, feats.channels, threads.count);
  quantize_rows(feats, first_token, [](int row) { return row; }, threads, ws);
  for_each_tile(threads, ws, [&](int row0, int col0, const float* tile) {
    for (int r = 0; r < kTileRows && row0 + r < tokens; ++r) {
      for (int c = 0; c < kTileCols && col0 + c < tokens; ++c) {
        const int i = row0 + r, j = col0 + c;
        const float gram = tile[r * kTileCols + c];
        out[int64_t{i} * tokens + j] = similarity(gram, ws.inv[j]) * ws.inv[i];
        out[int64_t{j} * tokens + i] = similarity(gram, ws.inv[i]) * ws.inv[j];
      }
    }
  });
}

}  // namespace vispruner::cpu
