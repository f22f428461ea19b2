// The inner loops that are compiled once per instruction set (isa.cpp) and chosen at run time.
#pragma once
#include <cstdint>

#include "vispruner/numerics.h"

namespace vispruner::cpu {

// Quantized tokens are stored in panels of 16: panel[c / 2][token % 16][c % 2], int16. The same
// layout serves both sides of the Gram product: 16 tokens x 2 channels are one 64-byte vector, and
// one token's 2 channels are one 32-bit broadcast.
constexpr int kPanelTokens = 16;

// A Gram tile is kTileRows x kTileCols; matrices are padded to multiples of kTileCols.
constexpr int kTileRows = kPanelTokens;
constexpr int kTileCols = 32;

// Number of products of quantized values whose sum always fits int32: 512 * 2047^2 < 2^31.
constexpr int64_t kInt32Products = 512;

constexpr int kTransposedRows = 16;

// Neighbour lists: kListStride - 1 entries at most, best first, then the sentinel.
constexpr int kListStride = 32;

// Received attention: queries that are processed together, and keys per panel:
// panel[word][key % 16]. A word is a channel in float32, or two of them in bfloat16.
constexpr int kQueryTile = 8;
constexpr int kPanelKeys = 16;

struct IsaKernels {
  const char* name;

  // to[c][r] = from[r][c] of kTransposedRows rows, in elements of 32 bits of any type.
  void (*transpose)(const float* from, int64_t from_stride, int64_t columns, float* to,
                    int64_t to_stride);

  // Quantizes the C channels of one token and returns its squared norm. `scratch` holds C floats.
  int64_t (*quantize_token)(const void* row, DType dtype, int64_t channels, int16_t* quantized,
                            float* scratch);

  // tile[r][c] = fl32(q_(row0 + r) . q_(col0 + c)) of the exact product. Sums over `int32_pairs`
  // pairs of channels must fit int32. row0 % kTileRows == 0, col0 % kTileCols == 0.
  void (*gram_tile)(const int16_t* panels, int64_t panel_size, int64_t pairs, int64_t int32_pairs,
                    int row0, int col0, float* tile);

  // The most similar tokens of one token, best first, as (id, redundancy); every token that is
  // more similar than the last entry is in the list. Returns the number of entries.
  // similarity(gram[j], inv[j]) is ranked; `self` is skipped. `scratch` holds round_up(n, 32).
  int (*neighbours)(const float* gram, const float* inv, int n, int self, uint16_t* ids,
                    float* redundancy, int32_t* scratch);

  // The cosines of token `self` to the `n` tokens of its row of the Gram matrix, which is padded to
  // whole tiles. Returns the largest one to another token, and sets most[j] = max(most[j], cosine).
  float (*nearest)(const float* gram, const float* inv, int n, int self);
  void (*raise)(const float* gram, const float* inv, int n, int self, float* most);

  // Replaces row `self` of the Gram matrix, padded to whole tiles, by the coverage of each token
  // (numerics.h, of the pair's cosine with the later token's inverse norm first). Returns the sum.
  uint32_t (*cover)(float* gram, const float* inv, int n, int self);

  // gains[j] -= the part of row[j] between `before` and `after`.
  void (*lower_gains)(const uint32_t* row, uint32_t before, uint32_t after, int n, uint32_t* gains);

  // Upcasts `count` elements.
  void (*load)(const void* from, DType dtype, int64_t count, float* to);

  // out[t] = scale * (q . keys[t]) in float64, for rows of `dim` floats, dim % 16 == 0.
  void (*exact_logits)(const float* q, const float* keys, int tokens, int dim, double scale,
                       double* out);

  // columns[t] += sum over `queries` of softmax(scale * (q . k_t)), the softmax over all `tokens`
  // keys; with lse, of exp(scale * (q . k_t) - lse[query]). `q` has kQueryTile rows of `words`
  // words, `panels` and `columns` are padded to whole panels (with zeros, with anything), and
  // `scratch` holds kQueryTile such rows of columns.
  using AddWeights = void (*)(const float* q, int queries, const float* panels, int tokens,
                              int words, float scale, const float* lse, float* scratch,
                              float* columns);
  AddWeights add_weights;
  AddWeights add_weights_bfloat16;  // of words of two channels; null without such instructions
};

// The kernels for this processor.
const IsaKernels& isa();

}  // namespace vispruner::cpu
