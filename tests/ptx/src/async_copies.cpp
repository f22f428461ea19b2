#include "async_copies.h"

#include <algorithm>
#include <cstring>

#include "execution.h"

namespace ptx {

// The source is read and the destination belongs to the copy from now on. The bytes arrive when
// they are waited for; until then the destination holds neither its old content nor the new one.
void Execution::async_copy(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes) {
  constexpr uint8_t kGarbage = 0xdb;
  uint64_t to[kLanes], from[kLanes];
  load_addresses(warp, i, to);
  const uint64_t* b = source<uint64_t>(warp, i.b);
  for_each_lane(
      lanes, [&](uint32_t l) { from[l] = b[l] + static_cast<uint64_t>(int64_t{i.source_offset}); });
  if (options_.profile) {
    const uint64_t moved = uint64_t{i.bytes} * static_cast<uint64_t>(__builtin_popcount(lanes));
    uint32_t ideal = 0;
    uint32_t actual = sectors(from, lanes, i.bytes, &ideal);
    counters_.async_global.add(actual, ideal, moved);
    actual = wavefronts(to, lanes, i.bytes, &ideal);
    counters_.async_shared.add(actual, ideal, moved);
    counters_.by_instruction[pc].add(actual, ideal, moved);
  }
  uint8_t *sources[kLanes], *targets[kLanes];
  resolve(warp, i, pc, lanes, Space::kGlobal, from, i.bytes, Access::kRead, nullptr, sources);
  const uint32_t global_hint = std::exchange(i.last_used, 0);
  resolve(warp, i, pc, lanes, Space::kShared, to, i.bytes, Access::kWrite, nullptr, targets);
  for_each_lane(lanes, [&](uint32_t l) {
    uint32_t hint = i.last_used;
    const Allocation* allocation = shared_.find(to[l], i.bytes, &hint);
    if (!allocation) return;
    if (options_.land_early) {
      std::memcpy(targets[l], sources[l], i.bytes);
    } else {
      std::memset(targets[l], kGarbage, i.bytes);
    }
    std::memset(&shared_.allocations()[hint]->state[to[l] - allocation->base], kWritten | kPending,
                i.bytes);
    async_[warp.index * kLanes + l].copies.push_back(
        {sources[l], targets[l], to[l], pc, i.bytes, hint});
  });
  i.last_used = global_hint;
}

void Execution::async_commit(const Warp& warp, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t l) { async_[warp.index * kLanes + l].commit(); });
}

void Execution::async_wait(const Warp& warp, const Instruction& i, uint32_t lanes) {
  uint32_t landing[kLanes] = {}, most = 0;  // copies
  for_each_lane(lanes, [&](uint32_t l) {
    AsyncCopies& own = async_[warp.index * kLanes + l];
    if (i.wait_all) own.commit();
    const size_t may_stay = i.wait_all ? 0 : static_cast<size_t>(i.immediate);
    landing[l] = own.take_groups(may_stay);
    most = std::max(most, landing[l]);
  });
  for (uint32_t n = 0; n < most; ++n) {
    uint32_t left = 0;
    for_each_lane(lanes, [&](uint32_t l) { left |= uint32_t{n < landing[l]} << l; });
    while (left) left &= ~land(warp, left, n);
  }
  for_each_lane(lanes, [&](uint32_t l) {
    std::vector<AsyncCopy>& copies = async_[warp.index * kLanes + l].copies;
    copies.erase(copies.begin(), copies.begin() + landing[l]);
  });
}

// Copy number `n` of the first of these lanes, and of those whose copy was issued together with it.
// The bytes are written as by the waiting threads, now. Returns the lanes.
uint32_t Execution::land(const Warp& warp, uint32_t lanes, uint32_t n) {
  const auto copy_of = [&](uint32_t l) -> const AsyncCopy& {
    return async_[warp.index * kLanes + l].copies[n];
  };
  const AsyncCopy& first = copy_of(static_cast<uint32_t>(__builtin_ctz(lanes)));
  Allocation& allocation = *shared_.allocations()[first.allocation];
  uint64_t addresses[kLanes];
  uint32_t together = 0, aligned = 0;
  for_each_lane(lanes, [&](uint32_t l) {
    const AsyncCopy& copy = copy_of(l);
    if (copy.pc != first.pc || copy.allocation != first.allocation) return;
    together |= 1u << l;
    aligned |= uint32_t{copy.address % copy.bytes == 0} << l;
    addresses[l] = copy.address;
    if (!options_.land_early) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(&allocation.state[copy.address - allocation.base], kWritten, copy.bytes);
  });
  if (options_.races && aligned) {
    races_.check(allocation, true, Access::kWrite, addresses, aligned, first.bytes, warp.index,
                 first.pc, nullptr);
  }
  return together;
}

}  // namespace ptx
