// A warp: its registers and the states of its lanes.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "ptx.h"

namespace ptx {

// Lanes that are about to run the instruction at `pc` together.
struct Group {
  uint32_t pc, lanes;
};

struct Warp {
  // kLanes values each; registers of 8 and 16 bits are in those of 32, whose upper bits are
  // undefined.
  uint32_t* registers32 = nullptr;
  uint64_t* registers64 = nullptr;
  uint32_t* predicates = nullptr;  // one bit per lane
  const Kernel* kernel = nullptr;
  uint32_t index = 0;
  uint32_t alive = 0;  // lanes
  std::vector<Group> ready;
  uint32_t at_warp_sync = 0, at_block_barrier = 0;  // lanes that wait
  uint32_t pc[kLanes];                              // of those
  uint32_t members[kLanes];                         // member masks of lanes at a warp sync
};

// The storage type of a register.
template <typename T>
using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename T>
inline const Slot<T>* source(const Warp& warp, Register r) {
  if constexpr (sizeof(T) == 8) {
    return r >= 0 ? warp.registers64 + size_t{kLanes} * static_cast<size_t>(r)
                  : warp.kernel->constants64.data() + size_t{kLanes} * static_cast<size_t>(~r);
  } else {
    return r >= 0 ? warp.registers32 + size_t{kLanes} * static_cast<size_t>(r)
                  : warp.kernel->constants32.data() + size_t{kLanes} * static_cast<size_t>(~r);
  }
}
template <typename T>
inline Slot<T>* destination(const Warp& warp, Register r) {
  if constexpr (sizeof(T) == 8) {
    return warp.registers64 + size_t{kLanes} * static_cast<size_t>(r);
  } else {
    return warp.registers32 + size_t{kLanes} * static_cast<size_t>(r);
  }
}
inline uint32_t predicate(const Warp& warp, Register r) {
  return r >= 0 ? warp.predicates[r] : warp.kernel->predicate_constants[static_cast<size_t>(~r)];
}
inline void set_predicate(Warp& warp, Register r, uint32_t lanes, uint32_t values) {
  warp.predicates[r] = (warp.predicates[r] & ~lanes) | (values & lanes);
}

template <typename F>
inline __attribute__((always_inline)) void for_each_lane(uint32_t lanes, const F& f) {
  if (lanes == kAllLanes) {
    for (uint32_t l = 0; l < kLanes; ++l) f(l);
  } else {
    for (; lanes; lanes &= lanes - 1) f(static_cast<uint32_t>(__builtin_ctz(lanes)));
  }
}

// d[l] = f(l) for these lanes. `f` must be safe for the others as well: it runs for all lanes, in
// vector instructions. d may be one of its sources.
template <typename D, typename F>
inline __attribute__((always_inline)) void write_lanes(D* d, uint32_t lanes, const F& f) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (uint32_t l = 0; l < kLanes; ++l) d[l] = f(l);
  } else if (__builtin_popcount(lanes) <= 3) {
    for_each_lane(lanes, [&](uint32_t l) { d[l] = f(l); });
  } else {
    D results[kLanes];
#pragma GCC ivdep
    for (uint32_t l = 0; l < kLanes; ++l) results[l] = f(l);
#pragma GCC ivdep
    for (uint32_t l = 0; l < kLanes; ++l) d[l] = lanes >> l & 1 ? results[l] : d[l];
  }
}

// The same one lane after the other.
template <typename D, typename F>
inline void write_each_lane(D* d, uint32_t lanes, const F& f) {
  for_each_lane(lanes, [&](uint32_t l) { d[l] = f(l); });
}

// Values of registers, and their stored form. NaN results are canonical, as on hardware.
template <typename T>
inline T value_of(Slot<T> slot) {
  if constexpr (std::is_floating_point_v<T>) {
    T value;
    std::memcpy(&value, &slot, sizeof value);
    return value;
  } else {
    return static_cast<T>(slot);
  }
}
template <typename T>
inline Slot<T> slot_of(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    Slot<T> slot;
    std::memcpy(&slot, &value, sizeof slot);
    constexpr Slot<T> kNan =
        static_cast<Slot<T>>(sizeof(T) == 8 ? 0xfff8000000000000ull : 0x7fffffffull);
    return value != value ? kNan : slot;
  } else {
    return static_cast<Slot<T>>(value);  // small signed types keep their sign
  }
}

}  // namespace ptx
