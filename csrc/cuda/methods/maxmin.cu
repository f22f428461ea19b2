// Farthest-point selection (DivPrune): the next pick is the token whose nearest pick is farthest.
//
// Bytes: 4 N^2 read for the first pick by many blocks, 4 N for each of the others.
#include "methods/greedy.cuh"
#include "methods/methods.cuh"

namespace vispruner::cuda {
namespace {

constexpr int kRowThreads = 128, kRows = kRowThreads / kWarp;  // per block: one warp per row

// The ordered key of each token's largest cosine to another one.
__global__ void __launch_bounds__(kRowThreads)
    nearest_kernel(Batch batch, int64_t channels, unsigned char* workspace) {
  begin_dependent(batch.more);
  const Image image = batch[blockIdx.y];
  const int tokens = image.shape.residual();
  const int row = blockIdx.x * kRows + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= tokens) return;
  const WorkspaceLayout at = workspace_layout(image.shape.tokens, tokens, channels);
  unsigned char* own = workspace + image.workspace;
  const auto* similarities = reinterpret_cast<const float*>(own + at.matrix) + row * at.ld;
  uint32_t most = 0;
#pragma unroll 4
  for (int j = threadIdx.x % kWarp; j < tokens; j += kWarp) {
    if (j != row) most = max(most, ordered_key(similarities[j]));
  }
  most = __reduce_max_sync(kAllLanes, most);
  if (threadIdx.x % kWarp != 0) return;
  const float cosine = key_float(most) * reinterpret_cast<const float*>(own + at.inv)[row];
  reinterpret_cast<uint32_t*>(own + at.method)[row] = ordered_key(cosine);
}

template <int kValues_>
struct Maxmin {
  static constexpr int kValues = kValues_;
  OwnValues<uint32_t, kValues> nearest;  // ordered key of the largest cosine to a pick

  __device__ __forceinline__ Maxmin(const GreedyImage& image, float /*parameter*/,
                                    Candidate* /*slots*/)
      : nearest(image.own) {
#pragma unroll kMostInRegisters
    for (int v = 0; v < kValues; ++v) {
      if (own_token(v) >= image.tokens) break;
      nearest[v] = reinterpret_cast<const uint32_t*>(image.own)[own_token(v)];
    }
  }
  __device__ __forceinline__ uint32_t key(int v) { return ~nearest[v]; }
  __device__ __forceinline__ void take(int v) { nearest[v] = ~kTaken; }
  __device__ __forceinline__ void see(int v, float cosine, bool first) {
    const uint32_t key = ordered_key(cosine);
    nearest[v] = first ? key : max(nearest[v], key);
  }
};

int64_t bytes(int residual) { return round_up(int64_t{residual} * 4, 256); }

int select(const Batch& batch, const WaveSize& size, int64_t channels,
           const Selection& /*selection*/, int64_t* indices, void* workspace, Stream stream) {
  if (size.residual > 0) {
    const dim3 grid((size.residual + kRows - 1) / kRows, size.images);
    if (const int e =
            launch_dependent<nearest_kernel>(grid, kRowThreads, 0, stream, followed(batch),
                                             channels, static_cast<unsigned char*>(workspace))) {
      return e;
    }
  }
  return select_greedily<Maxmin>(batch, size, channels, 0.0f, indices, workspace, stream);
}

}  // namespace

const MethodStages kMaxmin{Order::kIndex, false, Matrix::kSimilarity, bytes, select};

}  // namespace vispruner::cuda
