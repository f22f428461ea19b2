#include "fat_binary.h"

#include <cstring>

namespace ptx {
namespace {

template <typename T>
T field(const uint8_t* data, size_t offset) {
  T value;
  std::memcpy(&value, data + offset, sizeof value);
  return value;
}

constexpr uint32_t kMagic = 0xba55ed50;
constexpr uint16_t kPtx = 1;                       // kind of an entry; 2 is machine code
constexpr uint64_t kCompressed = 0x2000 | 0x8000;  // flags of an entry: LZ4, Zstandard

// Code for one device only (sm_90a) or one family (sm_100f).
bool is_specific(std::string_view text) {
  const size_t at = text.find(".target sm_");
  if (at == std::string_view::npos) return false;
  size_t end = at + std::strlen(".target sm_");
  while (end < text.size() && text[end] >= '0' && text[end] <= '9') ++end;
  return end < text.size() && (text[end] == 'a' || text[end] == 'f');
}

}  // namespace

std::vector<FatEntry> read_fat_binary(const uint8_t* data) {
  if (field<uint32_t>(data, 0) != kMagic) throw Error("not a fat binary");
  const auto header_bytes = field<uint16_t>(data, 6);
  const uint8_t* entry = data + header_bytes;
  const uint8_t* const end = entry + field<uint64_t>(data, 8);
  std::vector<FatEntry> entries;
  while (entry < end) {
    const auto kind = field<uint16_t>(entry, 0);
    const auto entry_header = field<uint32_t>(entry, 4);
    const auto bytes = field<uint64_t>(entry, 8);
    if (entry_header == 0 || bytes > static_cast<uint64_t>(end - entry)) {
      throw Error("a damaged fat binary");
    }
    if (kind == kPtx) {
      const bool compressed = field<uint64_t>(entry, 40) & kCompressed;
      const std::string_view text(reinterpret_cast<const char*>(entry + entry_header), bytes);
      entries.push_back({field<uint32_t>(entry, 28), compressed, text.substr(0, text.find('\0'))});
    }
    entry += entry_header + bytes;
  }
  if (entries.empty()) {
    throw Error("a fat binary without PTX: compile with -gencode arch=compute_80,code=compute_80");
  }
  return entries;
}

const FatEntry& choose_ptx(const std::vector<FatEntry>& entries, uint32_t capability,
                           uint32_t newest) {
  const FatEntry* best = nullptr;
  std::string targets;
  for (const FatEntry& entry : entries) {
    targets += " compute_" + std::to_string(entry.target);
    if (newest && entry.target > newest) continue;
    const bool fits =
        is_specific(entry.text) ? entry.target == capability : entry.target <= capability;
    if (fits && (!best || entry.target > best->target)) best = &entry;
  }
  if (!best) {
    throw NoFittingPtx("no PTX for a device of compute capability " +
                       std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
                       (newest ? " in a library up to compute_" + std::to_string(newest) : "") +
                       "; there is" + targets);
  }
  if (best->compressed) {
    throw Error("the PTX for compute_" + std::to_string(best->target) +
                " is compressed: compile with --no-compress");
  }
  return *best;
}

}  // namespace ptx
