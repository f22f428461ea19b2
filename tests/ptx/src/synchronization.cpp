// Synchronization of the lanes of a warp and of the warps of a block.
#include <algorithm>
#include <cstdio>
#include <map>

#include "execution.h"

namespace ptx {
namespace {

bool needs_whole_warp(const Instruction& i) {
  return i.kind == Kind::kMultiplyMatrix || i.kind == Kind::kLoadMatrix;
}

}  // namespace

// ---- within a warp
void Execution::arrive_at_warp_sync(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes) {
  const bool whole = needs_whole_warp(i);
  const uint32_t* members = whole ? nullptr : source<uint32_t>(warp, i.e);
  for_each_lane(lanes, [&](uint32_t l) {
    warp.pc[l] = pc;
    warp.members[l] = whole ? kAllLanes : members[l];
    if (warp.members[l] >> l & 1) return;
    report("synccheck", pc, warp.index * kLanes + l,
           [] { return "the lane is not in its own member mask"; });
    warp.members[l] |= 1u << l;
  });
  warp.at_warp_sync |= lanes;
  if (lanes) release_warp(warp);
}

// Releases the lanes whose members have all arrived.
void Execution::release_warp(Warp& warp) {
  uint32_t tried = 0;
  while (const uint32_t open = warp.at_warp_sync & ~tried) {
    const auto lane = static_cast<uint32_t>(__builtin_ctz(open));
    const uint32_t set = warp.members[lane] & warp.alive;
    if (set & ~warp.at_warp_sync) {  // some have not arrived
      tried |= 1u << lane;
      continue;
    }
    check_meeting(warp, lane, set);
    const uint32_t pc = warp.pc[lane];
    meet(warp, kernel_.code[pc], pc, set);
    warp.at_warp_sync &= ~set;
    tried &= ~set;
    // Lanes may reach a warp barrier from different places.
    for (uint32_t rest = set; rest;) {
      const uint32_t at = warp.pc[__builtin_ctz(rest)];
      uint32_t same = 0;
      for_each_lane(rest, [&](uint32_t l) { same |= uint32_t{warp.pc[l] == at} << l; });
      make_ready(warp, at + 1, same);
      rest &= ~same;
    }
  }
}

void Execution::check_meeting(const Warp& warp, uint32_t lane, uint32_t set) {
  const uint32_t pc = warp.pc[lane], thread = warp.index * kLanes + lane;
  const Instruction& i = kernel_.code[pc];
  for_each_lane(set, [&](uint32_t l) {
    if (warp.members[l] != warp.members[lane]) {
      abort("synccheck", pc, thread, [&] {
        return "lanes meet with different member masks, lane " + std::to_string(l) + " too";
      });
    }
    const bool barriers =
        i.kind == Kind::kWarpBarrier && kernel_.code[warp.pc[l]].kind == Kind::kWarpBarrier;
    if (warp.pc[l] != pc && !barriers) {
      abort("synccheck", pc, thread, [&] {
        return "lanes wait for each other at different instructions: lane " + std::to_string(l) +
               " at " + kernel_.where(warp.pc[l]);
      });
    }
  });
  if (needs_whole_warp(i) && set != kAllLanes) {
    abort("synccheck", pc, thread, [] {
      return "an .aligned instruction without all 32 lanes: some have ended or never were";
    });
  }
}

void Execution::meet(Warp& warp, const Instruction& i, uint32_t pc, uint32_t set) {
  if (options_.profile) ++counters_.warp_syncs;
  if (i.kind == Kind::kWarpBarrier || !options_.strict) races_.order(warp.index, set, warp.alive);
  switch (i.kind) {
    case Kind::kShuffle: shuffle(warp, i, pc, set); break;
    case Kind::kVote: vote(warp, i, set); break;
    case Kind::kReduce: reduce(warp, i, set); break;
    case Kind::kLoadMatrix: load_matrix(warp, i, pc); break;
    case Kind::kMultiplyMatrix: multiply_matrix(warp, i); break;
    default: break;
  }
}

void Execution::shuffle(Warp& warp, const Instruction& i, uint32_t pc, uint32_t set) {
  const uint32_t *b = source<uint32_t>(warp, i.b), *c = source<uint32_t>(warp, i.c);
  uint32_t from[kLanes], in_range = 0;
  std::copy_n(source<uint32_t>(warp, i.a), kLanes, from);
  uint32_t* d = destination<uint32_t>(warp, i.d);
  for_each_lane(set, [&](uint32_t l) {
    // As in the PTX manual.
    const int lane = static_cast<int>(l), distance = static_cast<int>(b[l] & 31);
    const int clamp = static_cast<int>(c[l] & 31), segment = static_cast<int>(c[l] >> 8 & 31);
    const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
    int other = lane;
    bool inside = false;
    switch (static_cast<Shuffle>(i.operation)) {
      case Shuffle::kUp:
        other = lane - distance;
        inside = other >= highest;
        break;
      case Shuffle::kDown:
        other = lane + distance;
        inside = other <= highest;
        break;
      case Shuffle::kButterfly:
        other = lane ^ distance;
        inside = other <= highest;
        break;
      case Shuffle::kIndex:
        other = lowest | (distance & ~segment);
        inside = other <= highest;
        break;
    }
    if (!inside) other = lane;
    if (!(set >> other & 1)) {
      report("synccheck", pc, warp.index * kLanes + l, [&] {
        return "shuffle from lane " + std::to_string(other) + ", which does not take part";
      });
    }
    d[l] = from[other];
    in_range |= uint32_t{inside} << l;
  });
  if (i.d2 != kNoRegister) set_predicate(warp, i.d2, set, in_range);
}

void Execution::vote(Warp& warp, const Instruction& i, uint32_t set) {
  const uint32_t votes = (i.negate_source ? ~predicate(warp, i.a) : predicate(warp, i.a)) & set;
  bool result = false;
  switch (static_cast<Vote>(i.operation)) {
    case Vote::kBallot:
      write_lanes(destination<uint32_t>(warp, i.d), set, [=](uint32_t) { return votes; });
      return;
    case Vote::kAny: result = votes != 0; break;
    case Vote::kAll: result = votes == set; break;
    case Vote::kUniform: result = votes == 0 || votes == set; break;
  }
  set_predicate(warp, i.d, set, result ? kAllLanes : 0);
}

void Execution::reduce(Warp& warp, const Instruction& i, uint32_t set) {
  const uint32_t* a = source<uint32_t>(warp, i.a);
  const uint32_t flip = i.type == Type::kS32 ? 0x80000000u : 0u;  // signed order as unsigned
  uint32_t result = a[__builtin_ctz(set)];
  for_each_lane(set & (set - 1), [&](uint32_t l) {
    const uint32_t x = a[l];
    switch (static_cast<Reduction>(i.operation)) {
      case Reduction::kAdd: result += x; break;
      case Reduction::kMin: result = std::min(result ^ flip, x ^ flip) ^ flip; break;
      case Reduction::kMax: result = std::max(result ^ flip, x ^ flip) ^ flip; break;
      case Reduction::kAnd: result &= x; break;
      case Reduction::kOr: result |= x; break;
      case Reduction::kXor: result ^= x; break;
    }
  });
  write_lanes(destination<uint32_t>(warp, i.d), set, [=](uint32_t) { return result; });
}

// ---- within a block
void Execution::arrive_at_barrier(Warp& warp, uint32_t pc, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t l) { warp.pc[l] = pc; });
  warp.at_block_barrier |= lanes;
  at_barrier_ += static_cast<uint32_t>(__builtin_popcount(lanes));
  release_block();
}

// Releases the block if all threads that have not exited have arrived.
bool Execution::release_block() {
  if (at_barrier_ == 0 || at_barrier_ != alive_) return false;
  check_barrier();
  uint32_t votes = 0;
  for (const Warp& warp : warps_) {
    if (!warp.alive) continue;
    const Instruction& i = kernel_.code[warp.pc[__builtin_ctz(warp.alive)]];
    if (i.kind != Kind::kBarrierReduce) break;
    const uint32_t p = i.negate_source ? ~predicate(warp, i.a) : predicate(warp, i.a);
    votes += static_cast<uint32_t>(__builtin_popcount(p & warp.alive));
  }
  for (Warp& warp : warps_) {
    if (!warp.alive) continue;
    const uint32_t pc = warp.pc[__builtin_ctz(warp.alive)];
    const Instruction& i = kernel_.code[pc];
    if (i.kind == Kind::kBarrierReduce) {
      const auto operation = static_cast<BarrierReduction>(i.operation);
      if (operation == BarrierReduction::kCount) {
        write_lanes(destination<uint32_t>(warp, i.d), warp.alive, [=](uint32_t) { return votes; });
      } else {
        const bool result = operation == BarrierReduction::kOr ? votes > 0 : votes == alive_;
        set_predicate(warp, i.d, warp.alive, result ? kAllLanes : 0);
      }
    }
    warp.at_block_barrier = 0;
    make_ready(warp, pc + 1, warp.alive);
  }
  at_barrier_ = 0;
  races_.block_barrier();
  if (options_.profile) ++counters_.barriers;
  return true;
}

void Execution::check_barrier() {
  const Instruction* first = nullptr;
  uint32_t first_pc = 0;
  for (const Warp& warp : warps_) {
    if (!warp.alive) continue;
    const auto lane = static_cast<uint32_t>(__builtin_ctz(warp.alive));
    const uint32_t pc = warp.pc[lane];
    for_each_lane(warp.alive, [&](uint32_t l) {
      if (warp.pc[l] == pc) return;
      abort("synccheck", pc, warp.index * kLanes + l, [&] {
        return "divergent barrier: lanes of one warp wait at different barriers, this one at " +
               kernel_.where(warp.pc[l]);
      });
    });
    const Instruction& i = kernel_.code[pc];
    if (!first) {
      first = &i;
      first_pc = pc;
    }
    if (i.kind != first->kind || i.operation != first->operation) {
      abort("synccheck", pc, warp.index * kLanes,
            [] { return "barriers of different kinds meet"; });
    }
    if (pc != first_pc) {
      report("synccheck", pc, warp.index * kLanes, [&] {
        return "warps meet at different barriers, another one is at " + kernel_.where(first_pc);
      });
    }
    const uint32_t lanes = std::min(kLanes, threads_ - warp.index * kLanes);
    if (warp.alive != kAllLanes >> (kLanes - lanes)) {
      report("synccheck", pc, warp.index * kLanes,
             [] { return "lanes of this warp have ended and do not come to the barrier"; });
    }
  }
}

void Execution::deadlock() {
  constexpr int kMostShown = 6;
  std::string text = "deadlock:";
  int shown = 0;
  uint32_t last = 0;
  for (const Warp& warp : warps_) {
    std::map<uint32_t, uint32_t> waiting;  // lanes by pc
    for_each_lane(warp.at_warp_sync | warp.at_block_barrier,
                  [&](uint32_t l) { waiting[warp.pc[l]] |= 1u << l; });
    for (const auto& [pc, lanes] : waiting) {
      last = pc;
      if (shown++ >= kMostShown) continue;
      char mask[16];
      std::snprintf(mask, sizeof mask, "%08x", lanes);
      text += " warp " + std::to_string(warp.index) + " lanes " + mask + " wait at " +
              kernel_.where(pc) + ";";
    }
  }
  abort("synccheck", last, 0, [&] { return text; });
}

}  // namespace ptx
