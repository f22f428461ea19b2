// Copies the retained rows: one warp per row, 16 bytes per lane if alignment allows.
//
// Bytes: k C read and written once per image.
#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = kThreads / kWarp;  // per block

struct alignas(16) Vector {
  uint32_t v[4];
};

template <typename Word>
__device__ __forceinline__ void copy_row(const void* from, void* to, int64_t bytes) {
  const auto* in = static_cast<const Word*>(from);
  auto* out = static_cast<Word*>(to);
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t w = threadIdx.x % kWarp; w < words; w += kWarp) out[w] = in[w];
}

__global__ void __launch_bounds__(kThreads, 8)
    gather_kernel(Batch batch, const unsigned char* feats, int64_t token_stride, int64_t channels,
                  int element_bytes, const int64_t* indices, unsigned char* kept_feats) {
  begin_dependent(batch.more);
  const Image image = batch[blockIdx.y];
  const int row = blockIdx.x * kRows + threadIdx.x / kWarp;
  if (row >= image.shape.kept()) return;
  const int64_t at = image.first_kept + row;
  const int64_t token = indices[at] - image.index_base;
  const int64_t bytes = channels * element_bytes;
  const unsigned char* from = feats + (image.first_feature + token * token_stride) * element_bytes;
  unsigned char* to = kept_feats + at * bytes;
  const auto misaligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) |
                           static_cast<uintptr_t>(bytes)) %
                          sizeof(Vector);
  if (misaligned == 0) {
    copy_row<Vector>(from, to, bytes);
  } else if (misaligned % 4 == 0) {
    copy_row<uint32_t>(from, to, bytes);
  } else {
    copy_row<uint16_t>(from, to, bytes);
  }
}

}  // namespace

int gather(const Batch& batch, const WaveSize& size, const FeatureView& feats,
           const int64_t* indices, void* kept_feats, Stream stream) {
  const dim3 grid((size.kept + kRows - 1) / kRows, size.images);
  return launch_dependent<gather_kernel>(
      grid, kThreads, 0, stream, batch, static_cast<const unsigned char*>(feats.data),
      feats.token_stride, feats.channels, feats.dtype == DType::kFloat32 ? 4 : 2, indices,
      static_cast<unsigned char*>(kept_feats));
}

}  // namespace vispruner::cuda
