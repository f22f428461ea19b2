// Asynchronous copies of a thread: issued, then committed as a group, then waited for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace ptx {

struct AsyncCopy {
  const uint8_t* from;
  uint8_t* to;
  uint64_t address;  // in shared memory
  uint32_t pc, bytes;
  uint32_t allocation;  // number in shared memory
};

struct AsyncCopies {
  std::vector<AsyncCopy> copies;      // the oldest first
  std::vector<uint32_t> group_sizes;  // of committed groups; the rest is not committed

  void commit() {
    uint32_t committed = 0;
    for (const uint32_t size : group_sizes) committed += size;
    group_sizes.push_back(static_cast<uint32_t>(copies.size()) - committed);
  }
  // Ends the oldest groups, so that at most this many remain. Returns the number of their copies.
  uint32_t take_groups(size_t remaining) {
    uint32_t count = 0;
    while (group_sizes.size() > remaining) {
      count += group_sizes.front();
      group_sizes.erase(group_sizes.begin());
    }
    return count;
  }
  void clear() {
    copies.clear();
    group_sizes.clear();
  }
};

}  // namespace ptx
