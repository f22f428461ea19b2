// Locations of the images of a batch: in the inputs, in the outputs and in the workspace.
#pragma once
#include "vispruner/cuda.h"
#include "vispruner/method.h"
#include "vispruner/plan.h"
#include "vispruner/shape.h"

namespace vispruner::cuda {

constexpr int kDigitPlanes = 2;    // high, low
constexpr int kChannelAlign = 64;  // digit rows are padded with q = 0 to whole Gram k-steps

// Byte offsets of one image's arrays in its workspace. Positions are in the method's order.
struct WorkspaceLayout {
  int64_t order;   // uint16 (N): token of each position
  int64_t scores;  // uint32 (R): ordered keys of the scores, for methods that read them
  int64_t inv;     // float (R): inverse norms
  int64_t sums;    // int (R): digit_sum
  int64_t digits;  // int8 (R, padded C / 64, 2, 64): 64 high digits, 64 low ones
  int64_t matrix;  // (R, ld), 4 bytes each: Matrix
  int64_t method;  // arrays that only the method uses
  int64_t padded_channels;
  int64_t ld;
};

VP_HD WorkspaceLayout workspace_layout(int tokens, int residual, int64_t channels,
                                       bool own_matrix = true) {
  constexpr int64_t kAlign = 256;
  WorkspaceLayout w{};
  w.padded_channels = round_up(channels, kChannelAlign);
  w.ld = round_up(residual, 32);
  w.order = 0;
  w.scores = w.order + round_up(int64_t{tokens} * 2, kAlign);
  w.inv = w.scores + round_up(int64_t{residual} * 4, kAlign);
  w.sums = w.inv + round_up(int64_t{residual} * 4, kAlign);
  w.digits = w.sums + round_up(int64_t{residual} * 4, kAlign);
  w.matrix = w.digits + round_up(kDigitPlanes * residual * w.padded_channels, kAlign);
  w.method = w.matrix + (own_matrix ? round_up(residual * w.ld * 4, kAlign) : 0);
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

// The images of one wave: all of one shape and evenly spaced, or listed in a table on the device.
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

// The same for a kernel that is not the last of its call.
inline Batch followed(Batch batch) {
  batch.more = plan::overlaps(plan::current().launch);
  return batch;
}

// The largest image of a wave, which determines the grid size.
struct WaveSize {
  int images, tokens, residual, kept;
};

// Copies `count` images from the host to `table` on the device.
int write_table(const Image* images, int count, Image* table, Stream stream);

// ---- the stages, one file each ----------------------------------------------------------------
struct RankOutput {  // of the topk op
  int64_t* indices;
  float* scores;
  int k;
};
// The order of the positions, and whether scores are written to the workspace.
struct Ranking {
  Order order;
  uint32_t seed;  // of Order::kRandom
  bool scores;
};
int rank_and_quantize(const Batch& batch, const WaveSize& size, const FeatureView& feats,
                      const AttentionView& attention, const Ranking& ranking,
                      const RankOutput& topk, void* workspace, Stream stream);
// Writes to the workspace, and cosines to `out` (images, R, R) if not null.
int gram(const Batch& batch, const WaveSize& size, int64_t channels, Matrix matrix, float* out,
         void* workspace, Stream stream);
int gather(const Batch& batch, const WaveSize& size, const FeatureView& feats,
           const int64_t* indices, void* kept_feats, Stream stream);

}  // namespace vispruner::cuda
