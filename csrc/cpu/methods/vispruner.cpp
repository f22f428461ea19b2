// The dedup loop of VisPruner on the CPU.
//
// Cost at R residual tokens: a few passes over R^2 floats for the neighbour lists, then (R - k) /
// step rounds that probe 4 to 10 list entries per token and sort half the list. The loop as
// published reads about 25 times as many similarities and multiplies matrices in every round.
#include <cstring>
#include <utility>

#include "stages.h"

namespace vispruner::cpu {
namespace {

struct DedupWorkspace {
  uint16_t* neighbours;  // (rows, kListStride)
  float* redundancy;     // (rows, kListStride)
  // Per thread, for the remaining tokens: similarities to one of them, and sort keys.
  float* gram_scratch;
  int32_t* key_scratch;
  float* left_inv;
  uint16_t* list[2];
  uint64_t* sort_keys;
  uint64_t* sort_scratch;
  uint8_t* in_b;

  DedupWorkspace(Arena& arena, const GramWorkspace& gram, int threads) {
    const int residual = gram.rows;
    neighbours = arena.take<uint16_t>(int64_t{residual} * kListStride);
    redundancy = arena.take<float>(int64_t{residual} * kListStride);
    gram_scratch = arena.take<float>(int64_t{threads} * gram.padded);
    key_scratch = arena.take<int32_t>(int64_t{threads} * gram.padded);
    left_inv = arena.take<float>(residual);
    list[0] = arena.take<uint16_t>(residual);
    list[1] = arena.take<uint16_t>(residual);
    sort_keys = arena.take<uint64_t>(residual);
    sort_scratch = arena.take<uint64_t>(residual);
    in_b = arena.take<uint8_t>(residual + 1);
  }
};

// Keys whose ascending order is the stable order of A by redundancy, highest first.
uint64_t redundancy_key(float redundancy, int position) {
  return (uint64_t{~ordered_key(redundancy)} << 32) | static_cast<uint32_t>(position);
}

int position_of(uint64_t key) { return static_cast<int>(static_cast<uint32_t>(key)); }

// Sorts keys that are in order where their high halves are equal: a scatter into buckets of equal
// width, again in crowded buckets, and then an insertion sort of the nearly sorted keys.
void sort_keys(uint64_t* keys, uint64_t* scratch, int count) {
  constexpr int kFew = 16, kMostBuckets = 2048;
  if (count > kFew) {
    const auto high_half = [](uint64_t key) { return static_cast<uint32_t>(key >> 32); };
    uint32_t low = UINT32_MAX, high = 0;
    for (int i = 0; i < count; ++i) {
      low = std::min(low, high_half(keys[i]));
      high = std::max(high, high_half(keys[i]));
    }
    if (low == high) return;
    int shift = 0;
    while ((high - low) >> shift >= static_cast<uint32_t>(std::min(2 * count, kMostBuckets)))
      ++shift;
    const int buckets = static_cast<int>((high - low) >> shift) + 1;
    const auto bucket = [&](uint64_t key) { return (high_half(key) - low) >> shift; };

    int ends[kMostBuckets];
    std::fill(ends, ends + buckets, 0);
    for (int i = 0; i < count; ++i) ++ends[bucket(keys[i])];
    int sum = 0, most = 0;
    for (int b = 0; b < buckets; ++b) {
      most = std::max(most, ends[b]);
      sum += std::exchange(ends[b], sum);
    }
    for (int i = 0; i < count; ++i) scratch[ends[bucket(keys[i])]++] = keys[i];
    std::copy_n(scratch, count, keys);
    for (int b = 0, begin = 0; b < buckets && most > kFew; begin = ends[b++]) {
      if (ends[b] - begin > kFew) sort_keys(keys + begin, scratch + begin, ends[b] - begin);
    }
  }
  for (int i = 1; i < count; ++i) {
    const uint64_t key = keys[i];
    int at = i;
    for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
}

// Makes the neighbour lists of the `n` remaining tokens among each other. `left` is 0, 1, 2, ... as
// long as all remain.
void list_neighbours(const Threads& threads, const Stages& stages, DedupWorkspace& ws,
                     const uint16_t* left, int n) {
  const GramWorkspace& gram = stages.gram;
  constexpr int kTokensPerTask = 32;
  for (int i = 0; i < n; ++i) ws.left_inv[i] = gram.inv[left[i]];
  for_each_task(threads, (n + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t t, int worker) {
    float* gathered = ws.gram_scratch + int64_t{worker} * gram.padded;
    int32_t* keys = ws.key_scratch + int64_t{worker} * gram.padded;
    const int begin = static_cast<int>(t) * kTokensPerTask;
    for (int i = begin; i < std::min(begin + kTokensPerTask, n); ++i) {
      const float* row = stages.matrix + int64_t{left[i]} * gram.padded;
      if (n < gram.rows) {
        for (int j = 0; j < n; ++j) gathered[j] = row[left[j]];
        row = gathered;
      }
      const int64_t at = int64_t{left[i]} * kListStride;
      uint16_t* ids = ws.neighbours + at;
      const int count = isa().neighbours(row, ws.left_inv, n, i, ids, ws.redundancy + at, keys);
      for (int e = 0; e < count; ++e) ids[e] = left[ids[e]];
      ids[count] = static_cast<uint16_t>(gram.rows);  // the sentinel
    }
  });
}

// The loop of the method on residual rows 0 ... R - 1, which are in ranking order. Returns the
// retained tokens.
const uint16_t* dedup_loop(const Threads& threads, const Stages& stages, DedupWorkspace& ws, int k,
                           int step) {
  const GramWorkspace& gram = stages.gram;
  // Lists are rebuilt when the number of tokens has fallen by this factor, since most of their
  // entries are dropped tokens then, unless so few tokens remain that scanning them costs less.
  constexpr int kListAgain = 4, kFewTokens = 150;
  const int rows = gram.rows;
  const int64_t ld = gram.padded;
  uint16_t* list = ws.list[0];
  uint16_t* next = ws.list[1];
  for (int i = 0; i < rows; ++i) {
    list[i] = static_cast<uint16_t>(i);
    ws.in_b[i] = i & 1;
  }
  ws.in_b[rows] = 1;  // the sentinel that ends every neighbour list
  list_neighbours(threads, stages, ws, list, rows);

  int listed = rows;
  for (int n = rows; n > k;) {
    if (n * kListAgain <= listed && n > kFewTokens) {
      list_neighbours(threads, stages, ws, list, n);
      listed = n;
    }
    const int a_count = (n + 1) / 2;
    for (int p = 0; p < a_count; ++p) {
      const int64_t token = list[2 * p];
      const uint16_t* ids = ws.neighbours + token * kListStride;
      int e = 0;
      while (!ws.in_b[ids[e]]) ++e;
      float redundancy;
      if (ids[e] != rows) {
        redundancy = ws.redundancy[token * kListStride + e];
      } else {  // none of the listed neighbours is in B: scan B
        const float* row = stages.matrix + token * ld;
        float best = similarity(row[list[1]], gram.inv[list[1]]);
        for (int b = 3; b < n; b += 2) {
          best = std::max(best, similarity(row[list[b]], gram.inv[list[b]]));
        }
        redundancy = best * gram.inv[token];
      }
      ws.sort_keys[p] = redundancy_key(redundancy, p);
    }
    const uint64_t* sorted = ws.sort_keys;
    sort_keys(ws.sort_keys, ws.sort_scratch, a_count);

    const int r = std::min({step, n - k, a_count});
    int length = 0;
    for (int s = 0; s < r; ++s) ws.in_b[list[2 * position_of(sorted[s])]] = 0;
    for (int s = r; s < a_count; ++s) next[length++] = list[2 * position_of(sorted[s])];
    for (int b = 1; b < n; b += 2) next[length++] = list[b];
    for (int i = 0; i < length; ++i) ws.in_b[next[i]] = i & 1;
    std::swap(list, next);
    n = length;
  }
  return list;
}

void reserve(Arena& arena, const GramWorkspace& gram, int threads) {
  DedupWorkspace(arena, gram, threads);
}

const uint16_t* select(Arena& arena, const Stages& stages, int picks, const Selection& selection,
                       const Threads& threads) {
  DedupWorkspace ws(arena, stages.gram, threads.count);
  return dedup_loop(threads, stages, ws, picks, selection.step);
}

}  // namespace

const MethodKernels kVispruner{Order::kScore, false, reserve, select};

}  // namespace vispruner::cpu
