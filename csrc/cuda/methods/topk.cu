// Methods without a loop: the ranking is the selection.
#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "methods/methods.cuh"
#include "methods/select.cuh"

namespace vispruner::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    topk_kernel(Batch batch, int64_t* indices, unsigned char* workspace) {
  begin_dependent(batch.more);
  VP_SHARED_MEMORY(memory);
  __shared__ uint32_t warp_sums[kThreads / kWarp];
  const Image image = batch[blockIdx.x];
  const WorkspaceLayout at = workspace_layout(image.shape.tokens, 0, 1);
  const Marks marks{reinterpret_cast<uint32_t*>(memory),
                    reinterpret_cast<const uint16_t*>(workspace + image.workspace + at.order)};
  marks.clear(image.shape.tokens);
  __syncthreads();
  for (int r = threadIdx.x; r < image.shape.important; r += kThreads) marks.set(r);
  __syncthreads();
  write_indices(marks.bits, image.shape.tokens, image.index_base, indices + image.first_kept,
                warp_sums);
}

int select(const Batch& batch, const WaveSize& size, int64_t /*channels*/,
           const Selection& /*selection*/, int64_t* indices, void* workspace, Stream stream) {
  return launch_dependent<topk_kernel>(size.images, kThreads, words(size.tokens) * 4, stream, batch,
                                       indices, static_cast<unsigned char*>(workspace));
}

}  // namespace

const MethodStages kTopk{Order::kScore, false, Matrix::kSimilarity, nullptr, select};
const MethodStages kRandom{Order::kRandom, false, Matrix::kSimilarity, nullptr, select};

}  // namespace vispruner::cuda
