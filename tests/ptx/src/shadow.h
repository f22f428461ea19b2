// The race checker's record of each unit of memory. A unit has 16 bytes until a smaller access;
// then the units of that page become smaller.
#pragma once
#include <cstdint>
#include <vector>

namespace ptx {

constexpr uint16_t kNobody = 0x7fff;

// Threads that have read a unit, or used it in atomics, since the last barrier. The lanes of one
// warp are recorded one by one. For other warps one thread is enough: with two warps any later
// write is a race, unless a barrier comes first.
struct Users {
  uint32_t era = 0, clock = 0;
  uint32_t lanes = 0;
  uint16_t thread = 0, pc = 0;
  uint16_t other_warp : 15;  // a thread
  uint16_t other_block : 1;  // also a thread of an earlier block of this launch
  uint16_t other_pc = 0;

  Users() : other_warp(kNobody), other_block(0) {}
};

struct Cell {
  Users readers;
  uint32_t write_era = 0, write_clock = 0;
  uint16_t write_thread = 0, write_pc = 0;
};
static_assert(sizeof(Cell) == 32, "two cells a cache line");

class ShadowPage {
 public:
  static constexpr uint32_t kBytes = 1024;

  // For an access of this many bytes. Accesses before era `horizon` are ignored.
  void prepare(uint32_t bytes, uint32_t horizon) {
    if (horizon != horizon_) restart(horizon);
    if (bytes < 1u << unit_log2_) refine(bytes);
  }
  void add_atomics();

  uint32_t horizon() const { return horizon_; }
  uint32_t unit_log2() const { return unit_log2_; }
  Cell* cells() { return cells_.data(); }
  Users* atomics() { return has_atomics_ ? atomics_.data() : nullptr; }  // null: there were none

 private:
  static constexpr uint32_t kLargestUnitLog2 = 4;

  void restart(uint32_t horizon);
  void refine(uint32_t bytes);

  uint32_t horizon_ = 0;
  uint32_t unit_log2_ = kLargestUnitLog2;
  bool has_atomics_ = false;
  std::vector<Cell> cells_;
  std::vector<Users> atomics_;
};

class Shadow {
 public:
  Shadow() = default;
  Shadow(uint64_t base, uint64_t bytes)
      : first_(base / ShadowPage::kBytes),
        pages_((base + bytes - 1) / ShadowPage::kBytes - first_ + 1) {}

  bool exists() const { return !pages_.empty(); }
  ShadowPage& page(uint64_t address) { return pages_[address / ShadowPage::kBytes - first_]; }

 private:
  uint64_t first_ = 0;
  std::vector<ShadowPage> pages_;
};

}  // namespace ptx
