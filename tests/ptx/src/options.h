// Options of running and checking kernels.
#pragma once
#include <cstdint>

namespace ptx {

struct Options {
  uint32_t seed = 0;         // order of blocks, warps, threads, atomics; 0: ascending
  bool lockstep = true;      // lanes at one instruction run together; else each thread by itself
  uint32_t quantum = 0;      // instructions before other threads run; 0: no limit
  bool strict = true;        // within a warp only bar.warp.sync orders memory, no shuffle or vote
  bool races = true;         // in shared memory, and
  bool global_races = true;  // in global memory
  bool initialized = true;   // reads of bytes that were never written
  bool land_early = false;   // asynchronous copies arrive when issued, not at the wait
  bool profile = false;      // wavefronts, sectors, divergence
  uint64_t step_limit = uint64_t{1} << 32;  // warp instructions of a launch
};

}  // namespace ptx
