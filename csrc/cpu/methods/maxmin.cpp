// Farthest-point selection (DivPrune): the next pick is the token whose nearest pick is farthest.
//
// Cost at N tokens: one pass over N^2 floats for the first pick, then one over N for each.
#include "greedy.h"
#include "stages.h"

namespace vispruner::cpu {
namespace {

struct Workspace {
  float* nearest;   // (padded) largest cosine to another token, then to a pick
  uint32_t* taken;  // (rows)
  uint16_t* picks;  // (rows)

  Workspace(Arena& arena, const GramWorkspace& gram)
      : nearest(arena.take<float>(gram.padded)),
        taken(arena.take<uint32_t>(gram.rows)),
        picks(arena.take<uint16_t>(gram.rows)) {}
};

void reserve(Arena& arena, const GramWorkspace& gram, int /*threads*/) { Workspace(arena, gram); }

const uint16_t* select(Arena& arena, const Stages& stages, int picks,
                       const Selection& /*selection*/, const Threads& threads) {
  const GramWorkspace& gram = stages.gram;
  const Workspace ws(arena, gram);
  const auto row = [&](int i) { return stages.matrix + int64_t{i} * gram.padded; };
  std::fill_n(ws.taken, gram.rows, 0u);
  for_each_rows(threads, gram.rows, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      ws.nearest[i] = isa().nearest(row(i), gram.inv, gram.rows, i);
    }
  });
  for (int p = 0; p < picks; ++p) {
    const int pick = highest(
        gram.rows, [&](int i) { return ws.taken[i] ? kTaken : ~ordered_key(ws.nearest[i]); });
    ws.picks[p] = static_cast<uint16_t>(pick);
    ws.taken[pick] = 1;
    if (p == 0) std::fill_n(ws.nearest, gram.padded, -std::numeric_limits<float>::infinity());
    isa().raise(row(pick), gram.inv, gram.rows, pick, ws.nearest);
  }
  return ws.picks;
}

}  // namespace

const MethodKernels kMaxmin{Order::kIndex, false, reserve, select};

}  // namespace vispruner::cpu
