// The methods: the outputs of earlier stages that each needs, and its launches. One file per
// method.
#pragma once
#include "batch.cuh"
#include "vispruner/method.h"

namespace vispruner::cuda {

struct MethodStages {
  Order order;
  bool scores;    // whether it reads them
  Matrix matrix;  // output of the Gram stage
  // Bytes of the method's arrays (WorkspaceLayout::method) per image; null without a loop.
  int64_t (*bytes)(int residual);
  // Enqueues the selection, which writes the retained tokens of every image, ascending, to
  // `indices`. `more` (Batch) is set if another kernel follows.
  int (*select)(const Batch& batch, const WaveSize& size, int64_t channels,
                const Selection& selection, int64_t* indices, void* workspace, Stream stream);
};

extern const MethodStages kVispruner, kTopk, kRandom, kMaxmin, kScope, kMmr;

inline const MethodStages& stages_of(Method method) {
  switch (method) {
    case Method::kTopk: return kTopk;
    case Method::kRandom: return kRandom;
    case Method::kMaxmin: return kMaxmin;
    case Method::kScope: return kScope;
    case Method::kMmr: return kMmr;
    default: return kVispruner;
  }
}

}  // namespace vispruner::cuda
