// CPU kernels: interface between the torch-free code in csrc/cpu and the bindings.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "vispruner/method.h"
#include "vispruner/plan.h"
#include "vispruner/shape.h"

namespace vispruner::cpu {

// The caller provides the threads (torch's own pool): run(tasks, body) calls body(i) for i in
// [0, tasks), on as many threads as there are.
struct Threads {
  int count;
  std::function<void(int64_t tasks, const std::function<void(int64_t)>& body)> run;
};

// The instruction set in use: the best one of this processor, unless a plan selects another.
const char* isa_name();
bool isa_supported(plan::Cpu asked);  // by this build and this processor
// Comma-separated, lowest first: the instruction sets that were built, and those of this processor.
std::string isa_built();
std::string isa_usable();

// Ranking of one image: `order[r]` is the token of rank r; `scores`, if not null, in that order.
void topk(const AttentionView& attention, int64_t image, int tokens, int k, int64_t* order,
          float* scores);

struct PruneImage {
  const void* feats;      // the first token of the image
  const void* attention;  // the first token and head of the image; null: already ranked
  ImageShape shape;
  int64_t index_base;  // added to the indices that are written
  int64_t* indices;    // (kept), ascending
  void* kept_feats;    // (kept, C) contiguous; null: indices only
};

// Bytes of scratch memory that `prune_image` needs: mostly the Gram matrix (4 R^2) and the
// quantized residual tokens (2 R C).
int64_t prune_workspace_bytes(const ImageShape& shape, int64_t channels, const Selection& selection,
                              int threads);

// Prunes one image. `feats` and `attention` give layout and dtype. Data pointers are taken from
// `image`.
void prune_image(const FeatureView& feats, const AttentionView& attention, const PruneImage& image,
                 const Selection& selection, const Threads& threads, void* workspace);

// (N, N) float32 cosines of one image, row stride N.
int64_t cosine_workspace_bytes(int tokens, int64_t channels, int threads);
void pairwise_cosine(const FeatureView& feats, const void* first_token, int tokens, float* out,
                     const Threads& threads, void* workspace);

// Scores for encoders: see vispruner_cuda.cls_attention and received_attention.
void cls_attention(const ClsAttentionArgs& args, float* out, const Threads& threads);
void received_attention(const ReceivedAttentionArgs& args, float* out, const Threads& threads);

}  // namespace vispruner::cpu
