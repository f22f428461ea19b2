// Counts of a kernel's work, and the models behind them.
#pragma once
#include <cstdint>
#include <map>
#include <vector>

#include "ptx.h"

namespace ptx {

struct Traffic {
  uint64_t requests = 0;  // of a warp
  uint64_t actual = 0;    // wavefronts of shared memory, sectors of global memory
  uint64_t ideal = 0;     // the minimum for this number of bytes
  uint64_t bytes = 0;

  void add(uint64_t now, uint64_t least, uint64_t moved) {
    ++requests;
    actual += now;
    ideal += least;
    bytes += moved;
  }
};

struct Counters {  // of one kernel, over its launches
  uint64_t launches = 0, blocks = 0;
  uint32_t threads = 0;  // of a block
  uint32_t static_shared = 0, dynamic_shared = 0;
  struct Executed {
    uint64_t warps = 0, threads = 0;
  };
  std::vector<Executed> executed;  // each instruction
  uint64_t longest_block = 0;      // warp instructions of the block with the most

  // with Options::profile
  Traffic shared, matrix, atomic, load, store, async_global, async_shared;
  uint64_t branches = 0, divergent_branches = 0, barriers = 0, warp_syncs = 0;
  std::map<uint32_t, Traffic> by_instruction;
};

// Wavefronts of shared memory for an access of a warp: 32 banks of four bytes, a quarter, half or
// all of the warp at a time.
uint32_t wavefronts(const uint64_t* addresses, uint32_t lanes, uint32_t bytes, uint32_t* ideal);
// Sectors of 32 bytes that the lanes access.
uint32_t sectors(const uint64_t* addresses, uint32_t lanes, uint32_t bytes, uint32_t* ideal);

}  // namespace ptx
