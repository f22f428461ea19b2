#include "counters.h"

#include <algorithm>

#include "warp.h"

namespace ptx {

uint32_t wavefronts(const uint64_t* addresses, uint32_t lanes, uint32_t bytes, uint32_t* ideal) {
  constexpr uint32_t kBanks = 32;
  const uint32_t together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;  // lanes
  const uint32_t words = bytes <= 4 ? 1 : bytes / 4;
  uint32_t total = 0;
  *ideal = 0;
  for (uint32_t first = 0; first < kLanes; first += together) {
    uint64_t seen[kBanks][kLanes];
    uint32_t count[kBanks] = {}, distinct = 0, most = 0;
    for (uint32_t l = first; l < first + together; ++l) {
      if (!(lanes >> l & 1)) continue;
      for (uint32_t n = 0; n < words; ++n) {
        const uint64_t word = addresses[l] / 4 + n;
        const uint32_t bank = word % kBanks;
        uint64_t* end = seen[bank] + count[bank];
        if (std::find(seen[bank], end, word) != end) continue;
        *end = word;
        most = std::max(most, ++count[bank]);
        ++distinct;
      }
    }
    total += most;
    *ideal += (distinct + kBanks - 1) / kBanks;
  }
  return total;
}

uint32_t sectors(const uint64_t* addresses, uint32_t lanes, uint32_t bytes, uint32_t* ideal) {
  constexpr uint32_t kSectorBytes = 32;
  uint64_t touched[2 * kLanes], places[kLanes];
  size_t touched_count = 0, place_count = 0;
  for_each_lane(lanes, [&](uint32_t l) {
    places[place_count++] = addresses[l];
    touched[touched_count++] = addresses[l] / kSectorBytes;
    touched[touched_count++] = (addresses[l] + bytes - 1) / kSectorBytes;
  });
  const auto distinct = [](uint64_t* begin, uint64_t* end) {
    std::sort(begin, end);
    return static_cast<uint32_t>(std::unique(begin, end) - begin);
  };
  // Lanes that read the same bytes need them once.
  *ideal = (distinct(places, places + place_count) * bytes + kSectorBytes - 1) / kSectorBytes;
  return distinct(touched, touched + touched_count);
}

}  // namespace ptx
