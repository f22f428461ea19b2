// Ranking, exact Gram matrix, dedup loop and gather of one image on the CPU.
//
// Cost at R residual tokens: Gram R^2 C / 2 multiply-adds (int16, two a lane and instruction),
// neighbour lists a few passes over R^2 floats, and then (R - k) / step rounds that probe 4 to 10
// list entries a token and sort half the list. The method's own loop reads about 25 times as many
// similarities and multiplies matrices inside it.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "isa.h"
#include "vispruner/cpu.h"

namespace vispruner::cpu {
namespace {

constexpr int64_t kAlign = 64;

// Hands out aligned pieces of the caller's workspace; with base = nullptr it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
    bytes_ = std::max(bytes_, used_);
    return p;
  }
  // What was taken since a mark may be given out again.
  int64_t mark() const { return used_; }
  void rewind(int64_t mark) { used_ = mark; }
  int64_t bytes() const { return bytes_; }  // at the most

 private:
  char* base_;
  int64_t used_ = 0, bytes_ = 0;
};

struct GramWorkspace {
  int rows;  // R, padded to whole tiles: `padded`
  int padded;
  int64_t pairs, panel_size, row_stride;
  float* inv;
  int64_t only_for_gram;  // a mark: what follows is of no use after the Gram matrix
  int16_t* panels;
  // For each thread: the channels of one token, and the quantized tokens of a panel.
  float* row_scratch;
  int16_t* token_scratch;

  GramWorkspace(Arena& arena, int tokens, int64_t channels, int threads)
      : rows(tokens),
        padded(static_cast<int>(round_up(tokens, kTileCols))),
        pairs((channels + 1) / 2),
        panel_size(pairs * 2 * kPanelTokens),
        row_stride(round_up(channels, 64) + 32),  // rows side by side fall into different sets
        inv(arena.take<float>(padded)),
        only_for_gram(arena.mark()),
        panels(arena.take<int16_t>(padded / kPanelTokens * panel_size)),
        row_scratch(arena.take<float>(row_stride * threads)),
        token_scratch(arena.take<int16_t>(row_stride * kPanelTokens * threads)) {}
};

struct DedupWorkspace {
  float* matrix;  // (padded, padded)
  GramWorkspace gram;
  // Used after the Gram matrix, in the memory of the quantized tokens.
  uint16_t* neighbours;  // (rows, kListStride)
  float* redundancy;     // (rows, kListStride)
  // For each thread, of the tokens that are left: similarities to one of them, and sort keys.
  float* gram_scratch;
  int32_t* key_scratch;
  float* left_inv;
  uint16_t* list[2];
  uint64_t* sort_keys;
  uint64_t* sort_scratch;
  uint8_t* in_b;

  DedupWorkspace(Arena& arena, int residual, int64_t channels, int threads)
      : matrix(arena.take<float>(round_up(residual, kTileCols) * round_up(residual, kTileCols))),
        gram(arena, residual, channels, threads) {
    arena.rewind(gram.only_for_gram);
    neighbours = arena.take<uint16_t>(int64_t{residual} * kListStride);
    redundancy = arena.take<float>(int64_t{residual} * kListStride);
    gram_scratch = arena.take<float>(int64_t{threads} * gram.padded);
    key_scratch = arena.take<int32_t>(int64_t{threads} * gram.padded);
    left_inv = arena.take<float>(residual);
    list[0] = arena.take<uint16_t>(residual);
    list[1] = arena.take<uint16_t>(residual);
    sort_keys = arena.take<uint64_t>(residual);
    sort_scratch = arena.take<uint64_t>(residual);
    in_b = arena.take<uint8_t>(residual + 1);
  }
};

struct PruneWorkspace {
  uint64_t* ranked;  // sort keys, then (in the low half) tokens in ranking order
  uint8_t* keep;

  PruneWorkspace(Arena& arena, const ImageShape& shape)
      : ranked(arena.take<uint64_t>(shape.tokens)), keep(arena.take<uint8_t>(shape.tokens)) {}
};

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

// Ascending order of these keys is ranking order: score descending, then token ascending.
uint64_t rank_key(float score, int token) {
  return (uint64_t{~ordered_key(score)} << 32) | static_cast<uint32_t>(token);
}

// The keys of all tokens, the first k of them in ranking order.
void rank_keys(const AttentionView& view, const void* data, int tokens, int k, uint64_t* keys) {
  for (int t = 0; t < tokens; ++t) {
    if (!data) {
      keys[t] = static_cast<uint64_t>(t);
      continue;
    }
    float sum = attention_at(view, data, t * view.token_stride);
    for (int64_t h = 1; h < view.heads; ++h) {
      sum += attention_at(view, data, h * view.head_stride + t * view.token_stride);
    }
    keys[t] = rank_key(ranking_score(sum), t);
  }
  if (!data) return;
  if (k < tokens) std::nth_element(keys, keys + k, keys + tokens);
  std::sort(keys, keys + std::min(k, tokens));
}

int key_token(uint64_t key) { return static_cast<int>(static_cast<uint32_t>(key)); }

// Workers pull tasks of unequal size from one counter.
template <typename Body>
void for_each_task(const Threads& threads, int64_t tasks, const Body& body) {
  if (threads.count == 1 || tasks == 1) {
    for (int64_t t = 0; t < tasks; ++t) body(t, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  threads.run(threads.count, [&](int64_t worker) {
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(t, static_cast<int>(worker));
    }
  });
}

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
      token[2 * ws.pairs - 1] = 0;  // the last channel may have no other to pair with
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
// product of their norms (Cauchy-Schwarz), so that it is all of them if squared norms are below
// 2^31, as norms of at most 2^15, rounded, imply.
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

// Stable sort of the A half of the list by redundancy, highest first: ascending order of these.
uint64_t redundancy_key(float redundancy, int position) {
  return (uint64_t{~ordered_key(redundancy)} << 32) | static_cast<uint32_t>(position);
}

// Sorts keys that are in order where their high halves are equal: a scatter into buckets of equal
// width, the same again in crowded ones, and an insertion sort of what is nearly in order then.
void sort_keys(uint64_t* keys, uint64_t* scratch, int count) {
  constexpr int kFew = 16, kMostBuckets = 2048;
  if (count > kFew) {
    const auto high_half = [](uint64_t key) { return static_cast<uint32_t>(key >> 32); };
    uint32_t low = UINT32_MAX, high = 0;
    for (int i = 0; i < count; ++i) {
      low = std::min(low, high_half(keys[i]));
      high = std::max(high, high_half(keys[i]));
    }
    if (low == high) return;
    int shift = 0;
    while ((high - low) >> shift >= static_cast<uint32_t>(std::min(2 * count, kMostBuckets)))
      ++shift;
    const int buckets = static_cast<int>((high - low) >> shift) + 1;
    const auto bucket = [&](uint64_t key) { return (high_half(key) - low) >> shift; };

    int ends[kMostBuckets];
    std::fill(ends, ends + buckets, 0);
    for (int i = 0; i < count; ++i) ++ends[bucket(keys[i])];
    int sum = 0, most = 0;
    for (int b = 0; b < buckets; ++b) {
      most = std::max(most, ends[b]);
      sum += std::exchange(ends[b], sum);
    }
    for (int i = 0; i < count; ++i) scratch[ends[bucket(keys[i])]++] = keys[i];
    std::copy_n(scratch, count, keys);
    for (int b = 0, begin = 0; b < buckets && most > kFew; begin = ends[b++]) {
      if (ends[b] - begin > kFew) sort_keys(keys + begin, scratch + begin, ends[b] - begin);
    }
  }
  for (int i = 1; i < count; ++i) {
    const uint64_t key = keys[i];
    int at = i;
    for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
}

// Makes the neighbour lists of the `n` tokens that are left, of each other. As long as all are,
// `left` is 0, 1, 2, ...
void list_neighbours(const Threads& threads, DedupWorkspace& ws, const uint16_t* left, int n) {
  constexpr int kTokensPerTask = 32;
  for (int i = 0; i < n; ++i) ws.left_inv[i] = ws.gram.inv[left[i]];
  for_each_task(threads, (n + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t t, int worker) {
    float* gathered = ws.gram_scratch + int64_t{worker} * ws.gram.padded;
    int32_t* keys = ws.key_scratch + int64_t{worker} * ws.gram.padded;
    const int begin = static_cast<int>(t) * kTokensPerTask;
    for (int i = begin; i < std::min(begin + kTokensPerTask, n); ++i) {
      const float* row = ws.matrix + int64_t{left[i]} * ws.gram.padded;
      if (n < ws.gram.rows) {
        for (int j = 0; j < n; ++j) gathered[j] = row[left[j]];
        row = gathered;
      }
      const int64_t at = int64_t{left[i]} * kListStride;
      uint16_t* ids = ws.neighbours + at;
      const int count = isa().neighbours(row, ws.left_inv, n, i, ids, ws.redundancy + at, keys);
      for (int e = 0; e < count; ++e) ids[e] = left[ids[e]];
      ids[count] = static_cast<uint16_t>(ws.gram.rows);  // the sentinel
    }
  });
}

// The loop of the method on residual rows 0 ... R - 1, which are in ranking order. Leaves the
// survivors in ws.list[0].
void dedup_loop(const Threads& threads, DedupWorkspace& ws, int k, int step) {
  // Lists are made again when so many times fewer tokens are left that most of their entries are
  // gone, unless these are so few that scanning them costs less.
  constexpr int kListAgain = 4, kFewTokens = 150;
  const int rows = ws.gram.rows;
  const int64_t ld = ws.gram.padded;
  uint16_t* list = ws.list[0];
  uint16_t* next = ws.list[1];
  for (int i = 0; i < rows; ++i) {
    list[i] = static_cast<uint16_t>(i);
    ws.in_b[i] = i & 1;
  }
  ws.in_b[rows] = 1;  // the sentinel that ends every neighbour list
  list_neighbours(threads, ws, list, rows);

  int listed = rows;
  for (int n = rows; n > k;) {
    if (n * kListAgain <= listed && n > kFewTokens) {
      list_neighbours(threads, ws, list, n);
      listed = n;
    }
    const int a_count = (n + 1) / 2;
    for (int p = 0; p < a_count; ++p) {
      const int64_t token = list[2 * p];
      const uint16_t* ids = ws.neighbours + token * kListStride;
      int e = 0;
      while (!ws.in_b[ids[e]]) ++e;
      float redundancy;
      if (ids[e] != rows) {
        redundancy = ws.redundancy[token * kListStride + e];
      } else {  // none of the listed neighbours is in B: scan it
        const float* gram = ws.matrix + token * ld;
        float best = similarity(gram[list[1]], ws.gram.inv[list[1]]);
        for (int b = 3; b < n; b += 2) {
          best = std::max(best, similarity(gram[list[b]], ws.gram.inv[list[b]]));
        }
        redundancy = best * ws.gram.inv[token];
      }
      ws.sort_keys[p] = redundancy_key(redundancy, p);
    }
    const uint64_t* sorted = ws.sort_keys;
    sort_keys(ws.sort_keys, ws.sort_scratch, a_count);

    const int r = std::min({step, n - k, a_count});
    int length = 0;
    for (int s = 0; s < r; ++s) ws.in_b[list[2 * key_token(sorted[s])]] = 0;
    for (int s = r; s < a_count; ++s) next[length++] = list[2 * key_token(sorted[s])];
    for (int b = 1; b < n; b += 2) next[length++] = list[b];
    for (int i = 0; i < length; ++i) ws.in_b[next[i]] = i & 1;
    std::swap(list, next);
    n = length;
  }
  ws.list[0] = list;
}

}  // namespace

void topk(const AttentionView& attention, int64_t image, int tokens, int k, int64_t* order,
          float* scores) {
  const void* first = static_cast<const char*>(attention.data) +
                      image * attention.image_stride * dtype_bytes(attention.dtype);
  std::vector<uint64_t> keys(static_cast<size_t>(tokens));
  rank_keys(attention, first, tokens, k, keys.data());
  for (int r = 0; r < std::min(k, tokens); ++r) {
    order[r] = key_token(keys[static_cast<size_t>(r)]);
    if (scores) scores[r] = key_float(~static_cast<uint32_t>(keys[static_cast<size_t>(r)] >> 32));
  }
}

int64_t prune_workspace_bytes(const ImageShape& shape, int64_t channels, int threads) {
  Arena arena(nullptr);
  PruneWorkspace prune(arena, shape);
  if (shape.residual() > 0) DedupWorkspace dedup(arena, shape.residual(), channels, threads);
  return arena.bytes();
}

void prune_image(const FeatureView& feats, const AttentionView& attention, const PruneImage& image,
                 int step, const Threads& threads, void* workspace) {
  Arena arena(workspace);
  const ImageShape& shape = image.shape;
  PruneWorkspace ws(arena, shape);
  rank_keys(attention, image.attention, shape.tokens,
            shape.residual() > 0 ? shape.tokens : shape.kept(), ws.ranked);
  std::fill(ws.keep, ws.keep + shape.tokens, uint8_t{0});
  for (int r = 0; r < shape.important; ++r) ws.keep[key_token(ws.ranked[r])] = 1;

  if (const int residual = shape.residual(); residual > 0) {
    const uint64_t* order = ws.ranked + shape.important;
    DedupWorkspace dedup(arena, residual, feats.channels, threads.count);
    quantize_rows(
        feats, image.feats, [&](int row) { return key_token(order[row]); }, threads, dedup.gram);
    gram_matrix(threads, dedup.gram, dedup.matrix);
    dedup_loop(threads, dedup, shape.diverse, step);
    for (int i = 0; i < shape.diverse; ++i) ws.keep[key_token(order[dedup.list[0][i]])] = 1;
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
