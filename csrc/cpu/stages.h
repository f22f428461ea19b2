// Shared by the stages of the CPU path: the memory of a call, threads, and the Gram matrix.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "isa.h"
#include "vispruner/cpu.h"
#include "vispruner/method.h"

namespace vispruner::cpu {

constexpr int64_t kAlign = 64;

// Allocates aligned pieces of the caller's workspace; with base = nullptr it only counts bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
    bytes_ = std::max(bytes_, used_);
    return p;
  }
  // Releases the memory that was taken since a mark.
  int64_t mark() const { return used_; }
  void rewind(int64_t mark) { used_ = mark; }
  int64_t bytes() const { return bytes_; }  // the maximum

 private:
  char* base_;
  int64_t used_ = 0, bytes_ = 0;
};

struct GramWorkspace {
  int rows;  // R, padded to whole tiles: `padded`
  int padded;
  int64_t pairs, panel_size, row_stride;
  float* inv;
  int64_t only_for_gram;  // a mark: the memory after it is not used after the Gram matrix
  int16_t* panels;
  // Per thread: the channels of one token, and the quantized tokens of a panel.
  float* row_scratch;
  int16_t* token_scratch;

  GramWorkspace(Arena& arena, int tokens, int64_t channels, int threads)
      : rows(tokens),
        padded(static_cast<int>(round_up(tokens, kTileCols))),
        pairs((channels + 1) / 2),
        panel_size(pairs * 2 * kPanelTokens),
        row_stride(round_up(channels, 64) + 32),  // neighbouring rows use different cache sets
        inv(arena.take<float>(padded)),
        only_for_gram(arena.mark()),
        panels(arena.take<int16_t>(padded / kPanelTokens * panel_size)),
        row_scratch(arena.take<float>(row_stride * threads)),
        token_scratch(arena.take<int16_t>(row_stride * kPanelTokens * threads)) {}
};

// Workers pull tasks of unequal size from one counter.
template <typename Body>
void for_each_task(const Threads& threads, int64_t tasks, const Body& body) {
  if (threads.count == 1 || tasks == 1) {
    for (int64_t t = 0; t < tasks; ++t) body(t, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  threads.run(threads.count, [&](int64_t worker) {
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(t, static_cast<int>(worker));
    }
  });
}

// Calls body(begin, end) for blocks of rows of a matrix.
template <typename Body>
void for_each_rows(const Threads& threads, int rows, const Body& body) {
  constexpr int kTogether = 32;
  for_each_task(threads, (rows + kTogether - 1) / kTogether, [&](int64_t task, int) {
    const int begin = static_cast<int>(task) * kTogether;
    body(begin, std::min(begin + kTogether, rows));
  });
}

// ---- methods ------------------------------------------------------------------------------------
// Outputs of the stages before a method's loop, by position, in the method's order.
struct Stages {
  const GramWorkspace& gram;
  float* matrix;        // (padded, padded) fl32(G_ij); a method may write to it
  const float* scores;  // (rows) if the method reads them
};

// One method: csrc/cpu/methods has one file per method. The functions are null in methods without a
// loop.
struct MethodKernels {
  Order order;
  bool scores;  // whether it reads them
  // Takes the memory of `select` from the arena.
  void (*reserve)(Arena& arena, const GramWorkspace& gram, int threads);
  // The positions of `picks` tokens, in the arena's memory.
  const uint16_t* (*select)(Arena& arena, const Stages& stages, int picks,
                            const Selection& selection, const Threads& threads);
};

extern const MethodKernels kVispruner, kTopk, kRandom, kMaxmin, kScope, kMmr;

}  // namespace vispruner::cpu
