// Maximal marginal relevance: importance minus lambda times the largest cosine to a pick.
//
// Cost at N tokens: a pass over N floats for each pick.
#include "greedy.h"
#include "stages.h"

namespace vispruner::cpu {
namespace {

struct Workspace {
  float* importance;  // (padded)
  float* nearest;     // (padded) largest cosine to a pick
  uint32_t* taken;    // (rows)
  uint16_t* picks;    // (rows)

  Workspace(Arena& arena, const GramWorkspace& gram)
      : importance(arena.take<float>(gram.padded)),
        nearest(arena.take<float>(gram.padded)),
        taken(arena.take<uint32_t>(gram.rows)),
        picks(arena.take<uint16_t>(gram.rows)) {}
};

void reserve(Arena& arena, const GramWorkspace& gram, int /*threads*/) { Workspace(arena, gram); }

const uint16_t* select(Arena& arena, const Stages& stages, int picks, const Selection& selection,
                       const Threads& /*threads*/) {
  const GramWorkspace& gram = stages.gram;
  const Workspace ws(arena, gram);
  importances(stages.scores, gram.rows, ws.importance);
  std::fill_n(ws.taken, gram.rows, 0u);
  std::fill_n(ws.nearest, gram.padded, -std::numeric_limits<float>::infinity());
  for (int p = 0; p < picks; ++p) {
    const int pick = highest(gram.rows, [&](int i) {
      if (ws.taken[i]) return kTaken;
      const float redundancy = p == 0 ? 0.0f : selection.mmr_lambda * ws.nearest[i];
      return ordered_key(ws.importance[i] - redundancy);
    });
    ws.picks[p] = static_cast<uint16_t>(pick);
    ws.taken[pick] = 1;
    isa().raise(stages.matrix + int64_t{pick} * gram.padded, gram.inv, gram.rows, pick, ws.nearest);
  }
  return ws.picks;
}

}  // namespace

const MethodKernels kMmr{Order::kIndex, true, reserve, select};

}  // namespace vispruner::cpu
