// One launch being executed, block after block.
#pragma once
#include <cstdint>
#include <random>
#include <vector>

#include "async_copies.h"
#include "executor.h"
#include "findings.h"
#include "memory.h"
#include "races.h"
#include "warp.h"

namespace ptx {

// Thrown after a finding that ends the launch.
struct Aborted {};

class Execution {
 public:
  Execution(Machine& machine, const Kernel& kernel, const LaunchShape& shape,
            const uint8_t* parameters);
  bool run();

 private:
  // ---- scheduling (executor.cpp)
  void run_block(uint32_t number);
  void start_warps();
  uint32_t special_register(SpecialRegister which, uint32_t thread) const;
  void make_ready(Warp& warp, uint32_t pc, uint32_t lanes);
  Group next_group(Warp& warp);
  void run_group(Warp& warp, Group group);
  bool branch(Warp& warp, const Instruction& i, uint32_t lanes, Group* group);
  void exit(Warp& warp, uint32_t pc, uint32_t lanes);
  void count();
  template <typename F>
  void report(const char* kind, uint32_t pc, uint32_t thread, const F& text) {
    reporter_.report(kind, pc, thread, text);
  }
  template <typename F>
  [[noreturn]] void abort(const char* kind, uint32_t pc, uint32_t thread, const F& text) {
    reporter_.report(kind, pc, thread, text);
    throw Aborted();
  }

  // ---- synchronization of lanes and warps (synchronization.cpp)
  void arrive_at_warp_sync(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes);
  void release_warp(Warp& warp);
  void check_meeting(const Warp& warp, uint32_t lane, uint32_t set);
  void meet(Warp& warp, const Instruction& i, uint32_t pc, uint32_t set);
  void shuffle(Warp& warp, const Instruction& i, uint32_t pc, uint32_t set);
  void vote(Warp& warp, const Instruction& i, uint32_t set);
  void reduce(Warp& warp, const Instruction& i, uint32_t set);
  void arrive_at_barrier(Warp& warp, uint32_t pc, uint32_t lanes);
  bool release_block();
  void check_barrier();
  [[noreturn]] void deadlock();

  // ---- memory (memory_access.cpp)
  // The host address of each lane's bytes, after all checks. A lane whose access is not allowed
  // gets unused bytes. `addresses` become those of the space; `values` are 16 bytes per lane to be
  // written.
  void resolve(const Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes, Space space,
               uint64_t* addresses, uint32_t bytes, Access how, const uint8_t* values,
               uint8_t** places);
  uint8_t* resolve_lane(const Warp& warp, const Instruction& i, uint32_t pc, uint32_t lane,
                        Space space, uint64_t address, uint32_t bytes, Access how,
                        const uint8_t* values);
  void check_state(const Warp& warp, uint32_t pc, uint32_t lane, Allocation& allocation,
                   uint64_t address, uint32_t bytes, Access how);
  void report_state(const Warp& warp, uint32_t pc, uint32_t lane, const Allocation& allocation,
                    uint64_t address, uint32_t bytes, Access how);
  void check_read_only(const Warp& warp, uint32_t pc, uint32_t lanes, const uint64_t* addresses,
                       uint32_t bytes);
  void load(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes);
  void load_parameter(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes);
  void store(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes);
  void atomic(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes);
  void profile_access(const Instruction& i, uint32_t pc, const uint64_t* addresses, uint32_t lanes);
  void profile_atomic(const Instruction& i, uint32_t pc, const uint64_t* addresses, uint32_t lanes);

  // ---- asynchronous copies (async_copies.cpp)
  void async_copy(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes);
  void async_commit(const Warp& warp, uint32_t lanes);
  void async_wait(const Warp& warp, const Instruction& i, uint32_t lanes);
  uint32_t land(const Warp& warp, uint32_t lanes, uint32_t n);

  // ---- matrices (matrix.cpp)
  void load_matrix(Warp& warp, const Instruction& i, uint32_t pc);
  void multiply_matrix(Warp& warp, const Instruction& i);

  Machine& machine_;
  const Options& options_;
  const Kernel& kernel_;
  const LaunchShape shape_;
  const uint8_t* parameters_;
  const uint32_t threads_;  // of a block
  Reporter reporter_;
  RaceChecker races_;
  Counters& counters_;
  std::mt19937 random_;

  std::vector<Warp> warps_;
  std::vector<std::vector<uint32_t>> registers32_, predicates_;
  std::vector<std::vector<uint64_t>> registers64_;
  Memory shared_;
  std::vector<uint8_t> shared_data_;
  std::vector<AsyncCopies> async_;  // of the threads

  // of the current block
  uint32_t block_number_ = 0, block_index_[3] = {};
  uint32_t alive_ = 0, at_barrier_ = 0;  // threads
  uint64_t steps_ = 0;                   // warp instructions of the launch
  std::vector<Counters::Executed> executed_;
  uint64_t longest_block_ = 0;
};

// Of all lanes, active or not.
inline void load_addresses(const Warp& warp, const Instruction& i, uint64_t* addresses) {
  if (i.wide_address) {
    const uint64_t* a = source<uint64_t>(warp, i.a);
    for (uint32_t l = 0; l < kLanes; ++l) {
      addresses[l] = a[l] + static_cast<uint64_t>(i.immediate);
    }
  } else {
    const uint32_t* a = source<uint32_t>(warp, i.a);
    for (uint32_t l = 0; l < kLanes; ++l) {
      addresses[l] = a[l] + static_cast<uint32_t>(i.immediate);
    }
  }
}

}  // namespace ptx
