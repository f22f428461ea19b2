// The methods: what each needs of the stages before, and its own launches. A file per method.
#pragma once
#include "batch.cuh"
#include "vispruner/method.h"

namespace vispruner::cuda {

struct MethodStages {
  Order order;
  bool scores;    // it reads them
  Matrix matrix;  // what the Gram stage is to write
  // Bytes of the method's own arrays (WorkspaceLayout::method) of an image.
  int64_t (*bytes)(int residual);
  // Enqueues what selects: the retained tokens of every image, ascending, into `indices`. `more`
  // (Batch) is set if another kernel follows.
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
