#include "races.h"

#include <algorithm>
#include <cstring>

namespace ptx {

RaceChecker::RaceChecker(Reporter& reporter, uint32_t& era, uint32_t threads)
    : reporter_(reporter),
      era_(era),
      launch_era_(++era),
      block_era_(launch_era_),
      exit_eras_(threads),
      orders_((threads + kLanes - 1) / kLanes) {}

void RaceChecker::begin_block() {
  block_era_ = ++era_;
  exits_ = 0;
  std::fill(exit_eras_.begin(), exit_eras_.end(), 0u);
  for (WarpOrder& order : orders_) {
    order.clock = 1;
    order.all_known = 0;
    order.partial = false;
  }
}

void RaceChecker::exit(uint32_t thread) {
  ++exits_;
  exit_eras_[thread] = era_;
}

void RaceChecker::order(uint32_t warp, uint32_t lanes, uint32_t alive) {
  WarpOrder& order = orders_[warp];
  const uint32_t now = ++order.clock;
  if ((lanes & alive) == alive) {
    order.all_known = now;
    return;
  }
  if (!order.partial) {
    order.partial = true;
    std::memset(order.known, 0, sizeof order.known);
  }
  uint32_t joint[kLanes] = {};
  for (uint32_t l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    for (uint32_t k = 0; k < kLanes; ++k) joint[k] = std::max(joint[k], order.known[l][k]);
  }
  for (uint32_t l = 0; l < kLanes; ++l) {
    if (lanes >> l & 1) joint[l] = now;
  }
  for (uint32_t l = 0; l < kLanes; ++l) {
    if (lanes >> l & 1) std::memcpy(order.known[l], joint, sizeof joint);
  }
}

// Whether an event is before the current access of this lane.
bool RaceChecker::ordered(const Current& now, uint32_t lane, const Event& event) const {
  if (event.era < now.horizon) return true;
  if (event.era < block_era_) return false;  // another block
  if (event.thread == now.warp * kLanes + lane) return true;
  // A barrier came between, unless the thread had ended before it.
  if (event.era < era_ && exit_eras_[event.thread] != event.era) return true;
  return event.thread / kLanes == now.warp &&
         known(now.order, lane, event.thread % kLanes, event.clock);
}

// Whether a write does not change the bytes.
bool RaceChecker::writes_same_value(const Current& now, uint32_t lane, uint64_t address,
                                    const Event& other) const {
  if (now.how != Access::kWrite || !now.values) return false;
  const uint8_t* there = now.allocation.at(address);
  // The bytes of this instruction are not in memory yet: another lane may have been first.
  const uint32_t other_lane = other.thread % kLanes;
  if (other.pc == now.pc && other.thread / kLanes == now.warp && other_lane < lane &&
      now.addresses[other_lane] == address) {
    there = now.values + 16 * other_lane;
  }
  return std::memcmp(now.values + 16 * lane, there, now.bytes) == 0;
}

void RaceChecker::report(const Current& now, uint32_t lane, uint64_t address, const char* what,
                         const Event& other) {
  const Allocation& a = now.allocation;
  const bool same_value = writes_same_value(now, lane, address, other);
  const uint32_t thread = now.warp * kLanes + lane;
  reporter_.report(same_value ? "racecheck, same value" : "racecheck", now.pc, thread, [&] {
    const bool other_block = other.era < block_era_;
    const char* const kVerbs[] = {"reads ", "writes ", "atomic on "};
    return kVerbs[static_cast<size_t>(now.how)] + a.name + " + " +
           std::to_string(address - a.base) + " without order after the " + what + " of " +
           (other_block ? "another block (thread " : "thread ") + std::to_string(other.thread) +
           (other_block ? ")" : "") + " at " + reporter_.kernel().where(other.pc);
  });
}

void RaceChecker::check_last_write(const Current& now, const Cell& cell, uint32_t lane,
                                   uint64_t address) {
  const Event event{cell.write_era, cell.write_clock, cell.write_thread, cell.write_pc};
  if (!ordered(now, lane, event)) report(now, lane, address, "write", event);
}

void RaceChecker::check_users(const Current& now, const Users& users, uint32_t lane,
                              uint64_t address, const char* what) {
  if (users.era < now.horizon) return;
  Event event{users.era, users.clock, users.thread, users.pc};
  bool conflict = false;
  if (users.other_block && !now.shared) {
    event.era = block_era_ - 1;
    conflict = true;
  } else if (users.era < era_) {
    conflict = !ordered(now, lane, event);
  } else if (users.other_warp != kNobody) {
    conflict = true;
    if (users.thread / kLanes == now.warp) {
      event.thread = users.other_warp;
      event.pc = users.other_pc;
    }
  } else if (users.thread / kLanes != now.warp) {
    conflict = true;
  } else {
    for_each_lane(users.lanes & ~(1u << lane), [&](uint32_t l) {
      if (conflict || known(now.order, lane, l, users.clock)) return;
      event.thread = static_cast<uint16_t>(now.warp * kLanes + l);
      conflict = true;
    });
  }
  if (conflict) report(now, lane, address, what, event);
}

inline void RaceChecker::add_user(const Current& now, Users& users, uint32_t lanes) {
  if (users.era == era_) return join_users(now, users, lanes);
  const bool same_launch = users.era >= launch_era_;
  users.other_block = same_launch && (users.era < block_era_ || users.other_block);
  users.era = era_;
  users.clock = now.order.clock;
  users.lanes = lanes;
  users.thread = static_cast<uint16_t>(now.warp * kLanes + __builtin_ctz(lanes));
  users.pc = static_cast<uint16_t>(now.pc);
  users.other_warp = kNobody;
}

// Adds this access to the users of a unit since the last barrier.
void RaceChecker::join_users(const Current& now, Users& users, uint32_t lanes) {
  const auto lane = static_cast<uint32_t>(__builtin_ctz(lanes));
  const auto thread = static_cast<uint16_t>(now.warp * kLanes + lane);
  const auto pc = static_cast<uint16_t>(now.pc);
  if (users.thread / kLanes == now.warp) {
    if (users.clock != now.order.clock) {
      // Accesses before this one of the lane are also before all later ones: only the others need
      // to be kept.
      uint32_t rest = 0;
      for_each_lane(users.lanes, [&](uint32_t l) {
        rest |= uint32_t{!known(now.order, lane, l, users.clock)} << l;
      });
      users.lanes = rest;
      users.clock = now.order.clock;
    }
    users.lanes |= lanes;
    users.pc = pc;
  } else if (users.other_warp == kNobody) {
    users.other_warp = thread & 0x7fff;
    users.other_pc = pc;
  }
}

inline void RaceChecker::read(const Current& now, Cell& cell, uint32_t lanes, uint64_t address) {
  if (!settled(cell.write_era, now.horizon)) {
    for_each_lane(lanes, [&](uint32_t l) { check_last_write(now, cell, l, address); });
  }
  Users& r = cell.readers;
  if (r.era == era_ && r.clock == now.order.clock && r.thread / kLanes == now.warp) {
    r.lanes |= lanes;
    r.pc = static_cast<uint16_t>(now.pc);
  } else {
    add_user(now, r, lanes);
  }
}

inline void RaceChecker::write(const Current& now, Cell& cell, uint32_t lane, uint64_t address) {
  if (!settled(cell.write_era, now.horizon)) check_last_write(now, cell, lane, address);
  if (!settled(cell.readers.era, now.horizon) ||
      (cell.readers.other_block && cell.readers.era >= now.horizon)) {
    check_users(now, cell.readers, lane, address, "read");
  }
  cell.write_era = era_;
  cell.write_clock = now.order.clock;
  cell.write_thread = static_cast<uint16_t>(now.warp * kLanes + lane);
  cell.write_pc = static_cast<uint16_t>(now.pc);
  // Those reads are before this write or have been reported, so they can be dropped.
  cell.readers.era = 0;
}

void RaceChecker::atomic(const Current& now, Cell& cell, Users& users, uint32_t lane,
                         uint64_t address) {
  if (!settled(cell.write_era, now.horizon)) check_last_write(now, cell, lane, address);
  check_users(now, cell.readers, lane, address, "read");
  add_user(now, users, 1u << lane);
}

void RaceChecker::check(Allocation& allocation, bool shared, Access how, const uint64_t* addresses,
                        uint32_t lanes, uint32_t bytes, uint32_t warp, uint32_t pc,
                        const uint8_t* values) {
  const uint32_t horizon = shared ? block_era_ : launch_era_;
  const Current now{allocation, shared,  how,       bytes,  warp,
                    pc,         horizon, addresses, values, orders_[warp]};
  settled_eras_ = exits_ ? 0 : era_ - block_era_;
  // All lanes read the same place: one check for all.
  bool together = how == Access::kRead;
  const uint64_t one = addresses[__builtin_ctz(lanes)];
  for_each_lane(lanes, [&](uint32_t l) { together = together && addresses[l] == one; });
  for (uint32_t left = lanes; left;) {
    const auto lane = static_cast<uint32_t>(__builtin_ctz(left));
    const uint32_t group = together ? left : 1u << lane;
    left &= ~group;
    const uint64_t address = addresses[lane];
    ShadowPage& page = allocation.shadow.page(address);
    page.prepare(bytes, horizon);
    if (how == Access::kAtomic) page.add_atomics();
    // Aligned accesses are whole units, all in one page.
    const uint64_t first = address % ShadowPage::kBytes >> page.unit_log2();
    const uint64_t end = first + (bytes >> page.unit_log2());
    Cell* const cells = page.cells();
    Users* const atomics = page.atomics();
    for (uint64_t unit = first; unit < end; ++unit) {
      if (how == Access::kAtomic) {
        atomic(now, cells[unit], atomics[unit], lane, address);
        continue;
      }
      if (atomics) {
        for_each_lane(group, [&](uint32_t l) {
          check_users(now, atomics[unit], l, address, "atomic operation");
        });
      }
      if (how == Access::kRead) {
        read(now, cells[unit], group, address);
      } else {
        write(now, cells[unit], lane, address);
      }
    }
  }
}

bool RaceChecker::written_by_launch(Allocation& allocation, uint64_t address,
                                    uint32_t bytes) const {
  if (!allocation.shadow.exists()) return false;
  ShadowPage& page = allocation.shadow.page(address);
  if (page.horizon() != launch_era_) return false;
  const uint64_t first = address % ShadowPage::kBytes;
  for (uint64_t byte = first; byte < first + bytes; ++byte) {
    if (page.cells()[byte >> page.unit_log2()].write_era >= launch_era_) return true;
  }
  return false;
}

}  // namespace ptx
