// CUDA kernels: interface between the torch-free code in csrc/cuda and the bindings.
//
// All functions enqueue work on `stream`, whose device is current. They return 0, a cudaError_t, or
// kRefused for work that the device or an explicit plan cannot do; error_string() gives the reason.
// They neither wait for the device nor allocate.
#pragma once
#include <cstdint>
#include <string>

#include "vispruner/method.h"
#include "vispruner/shape.h"

namespace vispruner::cuda {

struct Stream {
  void* handle;
  int device;
};

std::string error_string(int error);  // of the latest error of this thread
int set_device(int device);

// (images, min(k, tokens)) indices in ranking order, and their scores if not null.
int topk(const AttentionView& attention, int64_t images, int tokens, int k, int64_t* indices,
         float* scores, Stream stream);

// One image of a ragged batch, on the host.
struct RaggedImage {
  int64_t first_token;  // row of the packed input
  int64_t first_kept;   // row of the packed output
  ImageShape shape;
};

struct PruneArgs {
  FeatureView feats;
  AttentionView attention;  // data == null: tokens are in ranking order already
  int64_t images;
  ImageShape shape;           // of every image, unless ragged
  const RaggedImage* ragged;  // (images) on the host, or null
  Selection selection;
  int64_t* indices;         // (rows), ascending within an image
  void* kept_feats;         // (rows, C) contiguous, or null
  int64_t workspace_limit;  // bytes; images run in waves that fit, at least one at a time
};

// Bytes of device workspace for `prune`: an image of N tokens with R residual ones takes about
// 4 R^2 (Gram) + 2 R C (digits) + 2 N, and VisPruner 192 R more (neighbour lists).
int64_t prune_workspace_bytes(const PruneArgs& args);
int prune(const PruneArgs& args, void* workspace, Stream stream);

// (images, tokens, tokens) float32 cosines.
int64_t cosine_workspace_bytes(const FeatureView& feats, int64_t images, int tokens,
                               int64_t workspace_limit);
int pairwise_cosine(const FeatureView& feats, int64_t images, int tokens, float* out,
                    int64_t workspace_limit, void* workspace, Stream stream);

// [CLS] attention: (images, tokens - 1) float32 into `out`.
struct ClsAttentionLayout {
  bool far;              // the logits are in the workspace, not in shared memory
  int64_t shared_bytes;  // per block
  int64_t dots;          // byte offset of the logits in the workspace
  int64_t workspace_bytes;
};
ClsAttentionLayout cls_attention_layout(const ClsAttentionArgs& args);
int cls_attention(const ClsAttentionArgs& args, const ClsAttentionLayout& layout, float* out,
                  void* workspace, Stream stream);

// Received attention: (rows) float32 into `out`; `bounds` are images + 1 host integers.
int64_t received_attention_workspace_bytes(const ReceivedAttentionArgs& args);
int received_attention(const ReceivedAttentionArgs& args, float* out, void* workspace,
                       Stream stream);

}  // namespace vispruner::cuda
