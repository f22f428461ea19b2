// Where the images of a batch lie: in the inputs, in the outputs and in the workspace.
#pragma once
#include "device.cuh"
#include "vispruner/shape.h"

namespace vispruner::cuda {

constexpr int kNeighbours = 32;    // entries of a neighbour list: one a lane
constexpr int kDigitPlanes = 3;    // high, low, high + low
constexpr int kChannelAlign = 64;  // digit rows are padded with zeros to whole Gram k-steps

// Byte offsets of one image's arrays in its workspace.
struct WorkspaceLayout {
  int64_t order;   // uint16 (N): token of each rank
  int64_t inv;     // float (R): inverse norms
  int64_t digits;  // int8 (3, R, padded C), in ranking order
  int64_t gram;    // float (R, ld): similarities G_ij * inv_j
  int64_t ids;     // uint16 (R, 32): neighbour lists
  int64_t keys;    // uint32 (R, 32): ordered keys of their redundancies
  int64_t state;   // the dedup loop's lists, where they do not fit into shared memory
  int64_t bytes;
  int64_t padded_channels;
  int64_t ld;
};

// Arrays of the dedup loop. They live in shared memory, or else in the workspace.
constexpr int kMostCounting = 512;  // tokens of A that are ranked by counting, not by merging
VP_HD int half_up(int n) { return (n + 1) / 2; }

struct DedupState {
  uint64_t* sorted[2];  // (A) for merging
  uint32_t* keys;       // (A) ordered keys of the redundancies
  uint16_t* list[2];    // (R) the list of this round and of the next
  uint8_t* in_b;        // (R)
};

VP_HD int64_t carve(DedupState* state, unsigned char* base, int residual) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    unsigned char* p = base ? base + used : nullptr;
    used += round_up(bytes, 16);
    return p;
  };
  const int a = half_up(residual);
  const int merged = a > kMostCounting ? a : 0;
  for (int i = 0; i < 2; ++i) {
    state->sorted[i] = reinterpret_cast<uint64_t*>(take(int64_t{merged} * 8));
  }
  state->keys = reinterpret_cast<uint32_t*>(take(int64_t{a} * 4));
  for (int i = 0; i < 2; ++i) {
    state->list[i] = reinterpret_cast<uint16_t*>(take(int64_t{residual} * 2));
  }
  state->in_b = take(residual);
  return used;
}

VP_HD int64_t dedup_state_bytes(int residual) {
  DedupState state{};
  return carve(&state, nullptr, residual);
}

VP_HD WorkspaceLayout workspace_layout(int tokens, int residual, int64_t channels,
                                       bool own_gram = true) {
  constexpr int64_t kAlign = 256;
  WorkspaceLayout w{};
  w.padded_channels = round_up(channels, kChannelAlign);
  w.ld = round_up(residual, 32);
  w.order = 0;
  w.inv = w.order + round_up(int64_t{tokens} * 2, kAlign);
  w.digits = w.inv + round_up(int64_t{residual} * 4, kAlign);
  w.gram = w.digits + round_up(kDigitPlanes * residual * w.padded_channels, kAlign);
  w.ids = w.gram + (own_gram ? round_up(residual * w.ld * 4, kAlign) : 0);
  w.keys = w.ids + round_up(int64_t{own_gram ? residual : 0} * kNeighbours * 2, kAlign);
  w.state = w.keys + round_up(int64_t{own_gram ? residual : 0} * kNeighbours * 4, kAlign);
  w.bytes = w.state + (own_gram ? round_up(dedup_state_bytes(residual), kAlign) : 0);
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
int write_table(const Image* images, int count, Image* table, void* stream);

// ---- the stages, one file each ----------------------------------------------------------------
struct RankOutput {  // of the topk op
  int64_t* indices;
  float* scores;
  int k;
};
int rank_and_quantize(const Batch& batch, const WaveSize& size, const FeatureView& feats,
                      const AttentionView& attention, const RankOutput& topk, void* workspace,
                      void* stream);
// `out` null: similarities into the workspace. Else cosines into (images, R, R).
int gram(const Batch& batch, const WaveSize& size, int64_t channels, float* out, void* workspace,
         void* stream);
int neighbours(const Batch& batch, const WaveSize& size, int64_t channels, void* workspace,
               void* stream);
int dedup_and_select(const Batch& batch, const WaveSize& size, int64_t channels, int step,
                     int64_t* indices, void* workspace, void* stream);
int gather(const Batch& batch, const WaveSize& size, const FeatureView& feats,
           const int64_t* indices, void* kept_feats, void* stream);

}  // namespace vispruner::cuda
