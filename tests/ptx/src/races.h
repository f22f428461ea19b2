// Race checker: two accesses to the same bytes, one of them a write and not both atomic, without an
// order between them.
//
// Independent of the actual schedule, by the order of accesses (happens-before):
//   * a new launch, a barrier of the block: both begin a new era;
//   * within a warp bar.warp.sync and, if the options say so, other instructions that synchronize
//     lanes: each is a tick of the warp's clock.
// Blocks of one launch have no order.
#pragma once
#include <cstdint>
#include <vector>

#include "findings.h"
#include "memory.h"
#include "ptx.h"
#include "warp.h"

namespace ptx {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

class RaceChecker {
 public:
  // `era` continues from launch to launch, because the memory's shadow does.
  RaceChecker(Reporter& reporter, uint32_t& era, uint32_t threads);

  void begin_block();
  void block_barrier() { ++era_; }
  void exit(uint32_t thread);
  void order(uint32_t warp, uint32_t lanes, uint32_t alive);  // lanes of a warp have synchronized

  // Lanes access `bytes` each at addresses, aligned, in one allocation. `values` are 16 bytes per
  // lane to be written; null: unknown.
  void check(Allocation& allocation, bool shared, Access how, const uint64_t* addresses,
             uint32_t lanes, uint32_t bytes, uint32_t warp, uint32_t pc, const uint8_t* values);

  // Whether this launch has written one of the bytes.
  bool written_by_launch(Allocation& allocation, uint64_t address, uint32_t bytes) const;

 private:
  struct WarpOrder {
    uint32_t clock = 1;
    uint32_t all_known = 0;  // the clock when all lanes synchronized
    bool partial = false;    // whether only some lanes have synchronized since
    // known[l][k]: accesses of lane k before this clock are before the current one of lane l.
    uint32_t known[kLanes][kLanes];
  };
  struct Event {
    uint32_t era, clock;
    uint16_t thread, pc;
  };
  struct Current {  // the access to be checked
    Allocation& allocation;
    bool shared;
    Access how;
    uint32_t bytes, warp, pc;
    uint32_t horizon;  // all earlier eras are before all of the access
    const uint64_t* addresses;
    const uint8_t* values;
    WarpOrder& order;
  };

  bool known(const WarpOrder& order, uint32_t lane, uint32_t other, uint32_t clock) const {
    const uint32_t partial = order.partial ? order.known[lane][other] : 0;
    return (partial > order.all_known ? partial : order.all_known) > clock;
  }
  // Whether an era is before this one for every thread of the block.
  bool settled(uint32_t era, uint32_t horizon) const {
    return era < horizon || era - block_era_ < settled_eras_;
  }
  bool ordered(const Current& now, uint32_t lane, const Event& event) const;

  void read(const Current& now, Cell& cell, uint32_t lanes, uint64_t address);
  void write(const Current& now, Cell& cell, uint32_t lane, uint64_t address);
  void check_last_write(const Current& now, const Cell& cell, uint32_t lane, uint64_t address);
  void check_users(const Current& now, const Users& users, uint32_t lane, uint64_t address,
                   const char* what);
  void atomic(const Current& now, Cell& cell, Users& users, uint32_t lane, uint64_t address);
  void add_user(const Current& now, Users& users, uint32_t lanes);
  void join_users(const Current& now, Users& users, uint32_t lanes);
  bool writes_same_value(const Current& now, uint32_t lane, uint64_t address,
                         const Event& other) const;
  void report(const Current& now, uint32_t lane, uint64_t address, const char* what,
              const Event& other);

  Reporter& reporter_;
  uint32_t& era_;
  uint32_t launch_era_, block_era_;
  uint32_t exits_ = 0;         // threads of the block that have ended
  uint32_t settled_eras_ = 0;  // of the block: how many are before this one for certain
  std::vector<uint32_t> exit_eras_;
  std::vector<WarpOrder> orders_;
};

}  // namespace ptx
