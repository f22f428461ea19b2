// Where the images of a batch lie: in the inputs, in the outputs and in the workspace.
#pragma once
#include "vispruner/cuda.h"
#include "vispruner/shape.h"

namespace vispruner::cuda {

constexpr int kNeighbours = 32;    // entries of a neighbour list
constexpr int kDigitPlanes = 2;    // high, low
constexpr int kChannelAlign = 64;  // digit rows are padded with q = 0 to whole Gram k-steps

// Byte offsets of one image's arrays in its workspace.
struct WorkspaceLayout {
  int64_t order;   // uint16 (N): token of each rank
  int64_t inv;     // float (R): inverse norms
  int64_t sums;    // int (R): digit_sum
  int64_t digits;  // int8 (R, padded C / 64, 2, 64), in ranking order: 64 high digits, 64 low ones
  int64_t gram;    // float (R, ld): similarities G_ij * inv_j
  int64_t ids;     // uint16 (R, 32): neighbour lists
  int64_t keys;    // uint32 (R, 32): ordered keys of their redundancies
  int64_t state;   // the dedup loop's lists, where they do not fit into shared memory
  int64_t bytes;
  int64_t padded_channels;
  int64_t ld;
};

// Where entry `entry` of a token's neighbour list lies. Rows are permuted by groups of eight
// entries, each row in its own way, because the lanes of a warp read entries of different tokens
// and should meet different banks.
constexpr int kProbes = 8;  // entries that are looked at together: 16 bytes of ids
VP_HD int list_slot(int token, int entry) {
  return token * kNeighbours + (entry ^ (token / 2 * kProbes % kNeighbours));
}

// Arrays of the dedup loop. They live in shared memory, or else in the workspace.
constexpr int kMostCounting = 512;  // tokens of A that are never ranked by merging
constexpr int kSentinels = 4;       // words after the last one that are greater than any
VP_HD int half_up(int n) { return (n + 1) / 2; }

struct DedupLayout {  // byte offsets
  int64_t sorted[2];  // uint64 (A + kSentinels) words by bucket; uint64 (A) for merging
  int64_t keys;       // uint32 (A) ordered keys of the redundancies
  int64_t places;     // uint16 (A) bucket and place in it
  int64_t lists;      // uint32 (2, R) the list of this round and of the next
  int64_t bytes;
};

VP_HD DedupLayout dedup_layout(int residual) {
  const int64_t a = half_up(residual);
  DedupLayout at{};
  at.sorted[0] = 0;
  at.sorted[1] = at.sorted[0] + round_up((a + kSentinels) * 8, 16);
  at.keys = at.sorted[1] + round_up((a > kMostCounting ? a : 0) * 8, 16);
  at.places = at.keys + round_up(a * 4, 16);
  at.lists = at.places + round_up(a * 2, 16);
  at.bytes = at.lists + round_up(int64_t{residual} * 8, 16);
  return at;
}

VP_HD WorkspaceLayout workspace_layout(int tokens, int residual, int64_t channels,
                                       bool own_gram = true) {
  constexpr int64_t kAlign = 256;
  WorkspaceLayout w{};
  w.padded_channels = round_up(channels, kChannelAlign);
  w.ld = round_up(residual, 32);
  w.order = 0;
  w.inv = w.order + round_up(int64_t{tokens} * 2, kAlign);
  w.sums = w.inv + round_up(int64_t{residual} * 4, kAlign);
  w.digits = w.sums + round_up(int64_t{residual} * 4, kAlign);
  w.gram = w.digits + round_up(kDigitPlanes * residual * w.padded_channels, kAlign);
  w.ids = w.gram + (own_gram ? round_up(residual * w.ld * 4, kAlign) : 0);
  w.keys = w.ids + round_up(int64_t{own_gram ? residual : 0} * kNeighbours * 2, kAlign);
  w.state = w.keys + round_up(int64_t{own_gram ? residual : 0} * kNeighbours * 4, kAlign);
  w.bytes = w.state + (own_gram ? round_up(dedup_layout(residual).bytes, kAlign) : 0);
  return w;
}

struct Image {
  ImageShape shape;
  int64_t first_feature;    // element offset of its first token
  int64_t first_attention;  // element offset of its first token
  int64_t first_kept;       // output row
  int64_t index_base;       // added to token numbers in the output
  int64_t workspace;        // byte offset
};

// The images of one wave: all alike and evenly spaced, or listed in a table on the device.
struct Batch {
  const Image* table;  // null: image b is `first` plus b strides
  Image first;
  int64_t feature_stride, attention_stride, kept_stride, workspace_stride;
  bool more;  // with dependent launches: another kernel of this call follows (begin_dependent)

  VP_HD Image operator[](int b) const {
    if (table) return table[b];
    Image image = first;
    image.first_feature += b * feature_stride;
    image.first_attention += b * attention_stride;
    image.first_kept += b * kept_stride;
    image.workspace += b * workspace_stride;
    return image;
  }
};

// The largest image of a wave: what grids are sized by.
struct WaveSize {
  int images, tokens, residual, kept;
};

// Brings `count` images from the host to `table` on the device.
int write_table(const Image* images, int count, Image* table, Stream stream);

// ---- the stages, one file each ----------------------------------------------------------------
struct RankOutput {  // of the topk op
  int64_t* indices;
  float* scores;
  int k;
};
int rank_and_quantize(const Batch& batch, const WaveSize& size, const FeatureView& feats,
                      const AttentionView& attention, const RankOutput& topk, void* workspace,
                      Stream stream);
// `out` null: similarities into the workspace. Else cosines into (images, R, R).
int gram(const Batch& batch, const WaveSize& size, int64_t channels, float* out, void* workspace,
         Stream stream);
int neighbours(const Batch& batch, const WaveSize& size, int64_t channels, void* workspace,
               Stream stream);
int dedup_and_select(const Batch& batch, const WaveSize& size, int64_t channels, int step,
                     int64_t* indices, void* workspace, Stream stream);
int gather(const Batch& batch, const WaveSize& size, const FeatureView& feats,
           const int64_t* indices, void* kept_feats, Stream stream);

}  // namespace vispruner::cuda
