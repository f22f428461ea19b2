// The arrays that the two kernels of VisPruner's loop share.
#pragma once
#include "batch.cuh"

namespace vispruner::cuda {

constexpr int kNeighbours = 32;  // entries of a neighbour list

// Index of entry `entry` of a token's neighbour list. Each row has a different permutation of its
// groups of eight entries, because the lanes of a warp read entries of different tokens and should
// access different banks.
constexpr int kProbes = 8;  // entries that are read together: 16 bytes of ids
VP_HD int list_slot(int token, int entry) {
  return token * kNeighbours + (entry ^ (token / 2 * kProbes % kNeighbours));
}

// Arrays of the dedup loop, in shared memory or in the workspace.
constexpr int kMostCounting = 512;  // tokens of A that are never ranked by merging
constexpr int kSentinels = 4;       // words after the last one that are greater than any
VP_HD int half_up(int n) { return (n + 1) / 2; }

struct DedupLayout {  // byte offsets
  int64_t words;      // uint64 (A + kSentinels) words by bucket; uint32 (A) keys until these exist
  int64_t tokens;     // Token (A), unless each has a thread; uint64 (A) words that are merged
  int64_t lists;      // uint32 (2, R) the list of this round and of the next
  int64_t bytes;
};

VP_HD DedupLayout dedup_layout(int residual, bool one_each) {
  const int64_t a = half_up(residual);
  DedupLayout at{};
  at.tokens = at.words + round_up((a + kSentinels) * 8, 16);
  at.lists = at.tokens + (one_each ? round_up((a > kMostCounting ? a : 0) * 8, 16) : a * 16);
  at.bytes = at.lists + round_up(int64_t{residual} * 8, 16);
  return at;
}

// The method's own arrays in the workspace.
struct ListsLayout {  // byte offsets from WorkspaceLayout::method
  int64_t ids;        // uint16 (R, 32): neighbour lists
  int64_t keys;       // uint32 (R, 32): ordered keys of their redundancies
  int64_t state;      // DedupLayout, where it does not fit into shared memory
  int64_t bytes;
};

VP_HD ListsLayout lists_layout(int residual) {
  constexpr int64_t kAlign = 256;
  ListsLayout at{};
  at.keys = round_up(int64_t{residual} * kNeighbours * 2, kAlign);
  at.state = at.keys + round_up(int64_t{residual} * kNeighbours * 4, kAlign);
  at.bytes = at.state + round_up(dedup_layout(residual, false).bytes, kAlign);
  return at;
}

int neighbours(const Batch& batch, const WaveSize& size, int64_t channels, void* workspace,
               Stream stream);

}  // namespace vispruner::cuda
