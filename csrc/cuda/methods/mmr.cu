// Maximal marginal relevance: importance minus lambda times the largest cosine to a pick.
//
// Bytes: 4 N for each pick.
#include "methods/greedy.cuh"
#include "methods/methods.cuh"

namespace vispruner::cuda {
namespace {

template <int kValues_>
struct Mmr {
  static constexpr int kValues = kValues_;
  float lambda;
  OwnValues<float, kValues> importances;
  OwnValues<float, kValues> nearest;  // the largest cosine to a pick; 0 before the first
  uint32_t taken = 0;                 // one bit per token

  __device__ __forceinline__ Mmr(const GreedyImage& image, float lambda_, Candidate* slots)
      : lambda(lambda_),
        importances(image.own),
        nearest(image.own + round_up(int64_t{image.tokens} * 4, 256)) {
    const float highest = highest_score(image.scores, image.tokens, slots);
#pragma unroll kMostInRegisters
    for (int v = 0; v < kValues; ++v) {
      if (own_token(v) >= image.tokens) break;
      importances[v] = image.importance_of(own_token(v), highest);
      nearest[v] = 0.0f;
    }
  }
  __device__ __forceinline__ uint32_t key(int v) {
    return taken >> v & 1u ? kTaken : ordered_key(importances[v] - lambda * nearest[v]);
  }
  __device__ __forceinline__ void take(int v) { taken |= 1u << v; }
  __device__ __forceinline__ void see(int v, float cosine, bool first) {
    nearest[v] = first ? cosine : fmaxf(nearest[v], cosine);
  }
};

int64_t bytes(int residual) { return 2 * round_up(int64_t{residual} * 4, 256); }

int select(const Batch& batch, const WaveSize& size, int64_t channels, const Selection& selection,
           int64_t* indices, void* workspace, Stream stream) {
  return select_greedily<Mmr>(batch, size, channels, selection.mmr_lambda, indices, workspace,
                              stream);
}

}  // namespace

const MethodStages kMmr{Order::kIndex, true, Matrix::kSimilarity, bytes, select};

}  // namespace vispruner::cuda
