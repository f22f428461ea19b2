#include "executor.h"

#include <algorithm>

#include "execution.h"

namespace ptx {

Machine& machine() {
  static Machine one;
  return one;
}

bool Machine::run(const Kernel& kernel, const LaunchShape& shape, const uint8_t* parameters) {
  for (const std::string& text : kernel.static_findings) {
    findings.add("static", kernel.pretty_name + ": " + text);
  }
  // A kernel of the same name from other PTX has other instructions to count.
  const Kernel*& last = kernels[kernel.pretty_name];
  if (last != &kernel) counters.erase(kernel.pretty_name);
  last = &kernel;
  return Execution(*this, kernel, shape, parameters).run();
}

Execution::Execution(Machine& machine, const Kernel& kernel, const LaunchShape& shape,
                     const uint8_t* parameters)
    : machine_(machine),
      options_(machine.options),
      kernel_(kernel),
      shape_(shape),
      parameters_(parameters),
      threads_(static_cast<uint32_t>(shape.threads())),
      reporter_(machine.findings, kernel),
      races_(reporter_, machine.era, threads_),
      counters_(machine.counters[kernel.pretty_name]),
      random_(options_.seed * 2654435761u + 12345u),
      warps_((threads_ + kLanes - 1) / kLanes),
      async_(threads_),
      executed_(kernel.code.size()) {
  for (size_t n = 0; n < warps_.size(); ++n) {
    registers32_.emplace_back(size_t{kernel.registers32} * kLanes, 0xdeadbeefu);
    registers64_.emplace_back(size_t{kernel.registers64} * kLanes, 0xdeadbeefdeadbeefull);
    predicates_.emplace_back(kernel.predicates, 0u);
  }
  uint64_t end = 0;
  const auto bytes_of_variable = [&](const SharedVariable& variable) {
    return variable.dynamic ? shape.shared_bytes : variable.bytes;
  };
  for (const SharedVariable& variable : kernel.shared) {
    end = std::max(end, uint64_t{variable.address} + bytes_of_variable(variable));
  }
  shared_data_.resize(end);
  bool has_dynamic = false;
  for (const SharedVariable& variable : kernel.shared) {
    if (bytes_of_variable(variable) == 0 || (variable.dynamic && has_dynamic)) continue;
    has_dynamic = has_dynamic || variable.dynamic;
    shared_.add(variable.dynamic ? "dynamic shared memory" : "a shared variable", variable.address,
                &shared_data_[variable.address], bytes_of_variable(variable), true, false);
  }
}

bool Execution::run() {
  std::vector<uint32_t> order(shape_.blocks());
  for (uint32_t b = 0; b < order.size(); ++b) order[b] = b;
  if (options_.seed) std::shuffle(order.begin(), order.end(), random_);
  bool completed = true;
  try {
    for (const uint32_t b : order) run_block(b);
  } catch (const Aborted&) {
    completed = false;
  }
  ++machine_.era;
  count();
  return completed;
}

void Execution::count() {
  counters_.launches += 1;
  counters_.blocks += shape_.blocks();
  counters_.threads = threads_;
  counters_.static_shared = kernel_.static_shared_bytes;
  counters_.dynamic_shared = std::max(counters_.dynamic_shared, shape_.shared_bytes);
  counters_.longest_block = std::max(counters_.longest_block, longest_block_);
  counters_.executed.resize(executed_.size());
  for (size_t pc = 0; pc < executed_.size(); ++pc) {
    counters_.executed[pc].warps += executed_[pc].warps;
    counters_.executed[pc].threads += executed_[pc].threads;
  }
}

void Execution::run_block(uint32_t number) {
  block_number_ = number;
  block_index_[0] = number % shape_.grid[0];
  block_index_[1] = number / shape_.grid[0] % shape_.grid[1];
  block_index_[2] = number / shape_.grid[0] / shape_.grid[1];
  reporter_.begin_block(number);
  races_.begin_block();
  for (const auto& variable : shared_.allocations()) {
    std::fill(variable->state.begin(), variable->state.end(),
              options_.initialized ? uint8_t{0} : kWritten);
  }
  // The content left by the previous block serves as garbage.
  if (options_.seed % 2) std::fill(shared_data_.begin(), shared_data_.end(), 0xa5);
  for (AsyncCopies& copies : async_) copies.clear();
  start_warps();

  const uint64_t steps_before = steps_;
  std::vector<uint32_t> order(warps_.size());
  for (uint32_t n = 0; n < order.size(); ++n) order[n] = n;
  while (alive_) {
    bool progress = false;
    if (options_.seed) std::shuffle(order.begin(), order.end(), random_);
    for (const uint32_t n : order) {
      Warp& warp = warps_[n];
      while (!warp.ready.empty()) {
        progress = true;
        run_group(warp, next_group(warp));
        if (options_.quantum) break;
      }
    }
    if (!progress && !release_block()) deadlock();
  }
  longest_block_ = std::max(longest_block_, steps_ - steps_before);
}

void Execution::start_warps() {
  alive_ = threads_;
  at_barrier_ = 0;
  for (uint32_t n = 0; n < warps_.size(); ++n) {
    Warp& warp = warps_[n];
    warp.registers32 = registers32_[n].data();
    warp.registers64 = registers64_[n].data();
    warp.predicates = predicates_[n].data();
    warp.kernel = &kernel_;
    warp.index = n;
    const uint32_t lanes = std::min(kLanes, threads_ - n * kLanes);
    warp.alive = kAllLanes >> (kLanes - lanes);
    warp.at_warp_sync = warp.at_block_barrier = 0;
    warp.ready.clear();
    make_ready(warp, 0, warp.alive);
    for (const auto& [which, index] : kernel_.specials) {
      uint32_t* values = destination<uint32_t>(warp, static_cast<Register>(index));
      for (uint32_t l = 0; l < kLanes; ++l) values[l] = special_register(which, n * kLanes + l);
    }
  }
}

uint32_t Execution::special_register(SpecialRegister which, uint32_t thread) const {
  const uint32_t* size = shape_.block;
  const uint32_t lane = thread % kLanes;
  switch (which) {
    case SpecialRegister::kThreadX: return thread % size[0];
    case SpecialRegister::kThreadY: return thread / size[0] % size[1];
    case SpecialRegister::kThreadZ: return thread / size[0] / size[1];
    case SpecialRegister::kBlockSizeX: return size[0];
    case SpecialRegister::kBlockSizeY: return size[1];
    case SpecialRegister::kBlockSizeZ: return size[2];
    case SpecialRegister::kBlockX: return block_index_[0];
    case SpecialRegister::kBlockY: return block_index_[1];
    case SpecialRegister::kBlockZ: return block_index_[2];
    case SpecialRegister::kGridX: return shape_.grid[0];
    case SpecialRegister::kGridY: return shape_.grid[1];
    case SpecialRegister::kGridZ: return shape_.grid[2];
    case SpecialRegister::kLane: return lane;
    case SpecialRegister::kWarp: return thread / kLanes;
    case SpecialRegister::kMaskEqual: return 1u << lane;
    case SpecialRegister::kMaskLess: return (1u << lane) - 1;
    case SpecialRegister::kMaskLessEqual: return (2u << lane) - 1;
    case SpecialRegister::kMaskGreater: return ~((2u << lane) - 1);
    case SpecialRegister::kMaskGreaterEqual: return ~((1u << lane) - 1);
  }
  return 0;
}

void Execution::make_ready(Warp& warp, uint32_t pc, uint32_t lanes) {
  if (!lanes) return;
  if (options_.lockstep) {
    warp.ready.push_back({pc, lanes});
  } else {
    for_each_lane(lanes, [&](uint32_t l) { warp.ready.push_back({pc, 1u << l}); });
  }
}

// In lockstep the lanes at the lowest pc, because they may reconverge with the others.
Group Execution::next_group(Warp& warp) {
  if (warp.ready.size() == 1) {
    const Group group = warp.ready[0];
    warp.ready.clear();
    return group;
  }
  if (!options_.lockstep) {
    const size_t n = options_.seed ? random_() % warp.ready.size() : 0;
    const Group group = warp.ready[n];
    warp.ready.erase(warp.ready.begin() + static_cast<std::ptrdiff_t>(n));
    return group;
  }
  Group lowest{~0u, 0};
  for (const Group& group : warp.ready) lowest.pc = std::min(lowest.pc, group.pc);
  size_t kept = 0;
  for (const Group& group : warp.ready) {
    if (group.pc == lowest.pc) {
      lowest.lanes |= group.lanes;
    } else {
      warp.ready[kept++] = group;
    }
  }
  warp.ready.resize(kept);
  return lowest;
}

// Until the lanes diverge, wait, end, reach other lanes, or have used up their quantum.
void Execution::run_group(Warp& warp, Group group) {
  uint32_t limit = ~0u;
  if (options_.lockstep) {
    for (const Group& other : warp.ready) limit = std::min(limit, other.pc);
  }
  uint64_t turn = options_.quantum ? 1 + random_() % options_.quantum : ~uint64_t{0};
  const Instruction* const code = kernel_.code.data();
  Counters::Executed* const executed = executed_.data();
  while (true) {
    const uint32_t pc = group.pc;
    const Instruction& i = code[pc];
    uint32_t lanes = group.lanes;
    if (i.guard != kNoRegister) {
      const uint32_t guard = warp.predicates[i.guard];
      lanes &= i.negate_guard ? ~guard : guard;
    }
    ++executed[pc].warps;
    executed[pc].threads += static_cast<uint64_t>(__builtin_popcount(lanes));
    if (++steps_ > options_.step_limit) {
      abort("hang", pc, warp.index * kLanes, [] { return "the step limit is reached"; });
    }
    ++group.pc;
    switch (i.kind) {
      case Kind::kArithmetic:
        if (lanes) i.function(warp, i, lanes);
        break;
      case Kind::kNothing: break;
      case Kind::kBranch:
        if (!branch(warp, i, lanes, &group)) return;
        break;
      case Kind::kExit:
        make_ready(warp, group.pc, group.lanes & ~lanes);
        exit(warp, pc, lanes);
        return;
      case Kind::kLoad:
        if (lanes) load(warp, i, pc, lanes);
        break;
      case Kind::kStore:
        if (lanes) store(warp, i, pc, lanes);
        break;
      case Kind::kAtomic:
        if (lanes) atomic(warp, i, pc, lanes);
        break;
      case Kind::kAsyncCopy:
        if (lanes) async_copy(warp, i, pc, lanes);
        break;
      case Kind::kAsyncCommit: async_commit(warp, lanes); break;
      case Kind::kAsyncWait: async_wait(warp, i, lanes); break;
      case Kind::kBarrier:
      case Kind::kBarrierReduce:
        make_ready(warp, group.pc, group.lanes & ~lanes);
        arrive_at_barrier(warp, pc, lanes);
        return;
      case Kind::kShuffle:
      case Kind::kVote:
      case Kind::kReduce:
      case Kind::kWarpBarrier:
      case Kind::kLoadMatrix:
      case Kind::kMultiplyMatrix:
        make_ready(warp, group.pc, group.lanes & ~lanes);
        arrive_at_warp_sync(warp, i, pc, lanes);
        return;
    }
    if (group.pc >= limit || --turn == 0) {
      warp.ready.push_back(group);
      return;
    }
  }
}

// False: the lanes diverge, and are in warp.ready.
bool Execution::branch(Warp& warp, const Instruction& i, uint32_t lanes, Group* group) {
  if (options_.profile) ++counters_.branches;
  if (lanes == group->lanes) {
    group->pc = i.target;
    return true;
  }
  if (!lanes) return true;
  if (options_.profile) ++counters_.divergent_branches;
  make_ready(warp, group->pc, group->lanes & ~lanes);
  make_ready(warp, i.target, lanes);
  return false;
}

void Execution::exit(Warp& warp, uint32_t pc, uint32_t lanes) {
  warp.alive &= ~lanes;
  alive_ -= static_cast<uint32_t>(__builtin_popcount(lanes));
  for_each_lane(lanes, [&](uint32_t l) {
    const uint32_t thread = warp.index * kLanes + l;
    races_.exit(thread);
    if (async_[thread].copies.empty()) return;
    report("async", pc, thread,
           [] { return "the thread ends while its asynchronous copies are in flight"; });
  });
  if (warp.at_warp_sync) release_warp(warp);
  release_block();
}

}  // namespace ptx
