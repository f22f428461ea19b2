// SCOPE: the next pick is the token with the largest importance times coverage gain.
//
// The gain of a token is the coverage that it would add to that of the picks: the sum over all
// tokens of max(0, cover(token, other) - covered(other)), in integers. Once some are picked, a pick
// changes `covered` of few tokens, and each change lowers every gain by a part of one row.
//
// Cost at N tokens: one pass over N^2 for the first gains, then one over N for each change; a token
// changes about log(k) times.
#include "greedy.h"
#include "stages.h"

namespace vispruner::cpu {
namespace {

struct Workspace {
  float* weight;      // (padded) importance^alpha
  uint32_t* gain;     // (padded)
  uint32_t* covered;  // (padded)
  uint32_t* taken;    // (rows)
  uint16_t* picks;    // (rows)

  Workspace(Arena& arena, const GramWorkspace& gram)
      : weight(arena.take<float>(gram.padded)),
        gain(arena.take<uint32_t>(gram.padded)),
        covered(arena.take<uint32_t>(gram.padded)),
        taken(arena.take<uint32_t>(gram.rows)),
        picks(arena.take<uint16_t>(gram.rows)) {}
};

void reserve(Arena& arena, const GramWorkspace& gram, int /*threads*/) { Workspace(arena, gram); }

const uint16_t* select(Arena& arena, const Stages& stages, int picks, const Selection& selection,
                       const Threads& threads) {
  const GramWorkspace& gram = stages.gram;
  const Workspace ws(arena, gram);
  auto* covers = reinterpret_cast<uint32_t*>(stages.matrix);
  importances(stages.scores, gram.rows, ws.weight);
  for (int i = 0; i < gram.rows; ++i) {
    ws.weight[i] = power_of_quarters(ws.weight[i], selection.scope_quarters);
  }
  std::fill_n(ws.gain, gram.padded, 0u);
  std::fill_n(ws.covered, gram.padded, 0u);
  std::fill_n(ws.taken, gram.rows, 0u);
  for_each_rows(threads, gram.rows, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      ws.gain[i] = isa().cover(stages.matrix + int64_t{i} * gram.padded, gram.inv, gram.rows, i);
    }
  });
  for (int p = 0; p < picks; ++p) {
    const int pick = highest(gram.rows, [&](int i) {
      return ws.taken[i] ? kTaken : ordered_key(static_cast<float>(ws.gain[i]) * ws.weight[i]);
    });
    ws.picks[p] = static_cast<uint16_t>(pick);
    ws.taken[pick] = 1;
    const uint32_t* row = covers + int64_t{pick} * gram.padded;
    for (int i = 0; i < gram.rows; ++i) {
      if (row[i] <= ws.covered[i]) continue;
      isa().lower_gains(covers + int64_t{i} * gram.padded, ws.covered[i], row[i], gram.rows,
                        ws.gain);
      ws.covered[i] = row[i];
    }
  }
  return ws.picks;
}

}  // namespace

const MethodKernels kScope{Order::kIndex, true, reserve, select};

}  // namespace vispruner::cpu
