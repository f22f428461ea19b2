// Loads, stores and atomics, with the checks of bounds, alignment and initialization.
#include <algorithm>
#include <cstring>

#include "execution.h"

namespace ptx {
namespace {

constexpr uint32_t kMostBytes = 16;  // of an access

// Bytes for lanes whose access is not allowed: zeros to read, or a sink.
alignas(kMostBytes) const uint8_t kZeros[kMostBytes] = {};
alignas(kMostBytes) uint8_t sink[kMostBytes];

// Whether all of these states are `written`, and none is pending.
template <typename Word>
bool all_written(const uint8_t* state) {
  Word word, ones;
  std::memcpy(&word, state, sizeof word);
  std::memset(&ones, kWritten, sizeof ones);
  return word == ones;
}
bool all_written(const uint8_t* state, uint32_t bytes) {
  switch (bytes) {
    case 1: return all_written<uint8_t>(state);
    case 2: return all_written<uint16_t>(state);
    case 4: return all_written<uint32_t>(state);
    case 8: return all_written<uint64_t>(state);
    default: return all_written<unsigned __int128>(state);
  }
}
bool any_pending(const uint8_t* state, uint32_t bytes) {
  uint8_t all = 0;
  for (uint32_t n = 0; n < bytes; ++n) all |= state[n];
  return all & kPending;
}

const char* verb(Access how) { return how == Access::kRead ? "reads" : "writes"; }

}  // namespace

// ---- checks
void Execution::report_state(const Warp& warp, uint32_t pc, uint32_t lane,
                             const Allocation& allocation, uint64_t address, uint32_t bytes,
                             Access how) {
  const uint8_t* state = &allocation.state[address - allocation.base];
  const uint32_t thread = warp.index * kLanes + lane;
  const auto place = [&] {
    return allocation.name + " + " + std::to_string(address - allocation.base);
  };
  if (any_pending(state, bytes)) {
    report("async", pc, thread, [&] {
      return std::string(verb(how)) + " bytes of " + place() +
             " that an asynchronous copy has not brought yet";
    });
  } else if (how != Access::kWrite && options_.initialized) {
    report("initcheck", pc, thread, [&] { return "reads bytes that nothing wrote: " + place(); });
  }
}

inline void Execution::check_state(const Warp& warp, uint32_t pc, uint32_t lane,
                                   Allocation& allocation, uint64_t address, uint32_t bytes,
                                   Access how) {
  uint8_t* state = &allocation.state[address - allocation.base];
  if (all_written(state, bytes)) return;
  if (how != Access::kWrite || any_pending(state, bytes)) {
    report_state(warp, pc, lane, allocation, address, bytes, how);
  }
  if (how != Access::kRead) {
    for (uint32_t n = 0; n < bytes; ++n) state[n] |= kWritten;
  }
}

void Execution::resolve(const Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes,
                        Space space, uint64_t* addresses, uint32_t bytes, Access how,
                        const uint8_t* values, uint8_t** places) {
  uint64_t low = ~uint64_t{0}, high = 0, any = 0;
  for_each_lane(lanes, [&](uint32_t l) {
    low = std::min(low, addresses[l]);
    high = std::max(high, addresses[l]);
    any |= addresses[l];
  });
  if (space == Space::kGeneric && (low >= kSharedWindow || high < kSharedWindow)) {
    space = low >= kSharedWindow ? Space::kShared : Space::kGlobal;
    if (space == Space::kShared) {
      for_each_lane(lanes, [&](uint32_t l) { addresses[l] -= kSharedWindow; });
      low -= kSharedWindow;
      high -= kSharedWindow;
    }
  }
  // All lanes at once, if their addresses are valid.
  Allocation* allocation = nullptr;
  if (space != Space::kGeneric && any % bytes == 0) {
    const Memory& memory = space == Space::kShared ? shared_ : machine_.memory;
    allocation = memory.find(low, high - low + bytes, &i.last_used);
  }
  if (!allocation || (how != Access::kRead && !allocation->writable)) {
    for_each_lane(lanes, [&](uint32_t l) {
      places[l] = resolve_lane(warp, i, pc, l, space, addresses[l], bytes, how,
                               values ? values + kMostBytes * l : nullptr);
    });
    return;
  }
  for_each_lane(lanes, [&](uint32_t l) { places[l] = allocation->at(addresses[l]); });
  if (!allocation->state.empty()) {
    for_each_lane(lanes, [&](uint32_t l) {
      check_state(warp, pc, l, *allocation, addresses[l], bytes, how);
    });
  }
  const bool shared = space == Space::kShared;
  if (options_.races && allocation->shadow.exists() && (shared || options_.global_races)) {
    races_.check(*allocation, shared, how, addresses, lanes, bytes, warp.index, pc, values);
  }
}

uint8_t* Execution::resolve_lane(const Warp& warp, const Instruction& i, uint32_t pc, uint32_t lane,
                                 Space space, uint64_t address, uint32_t bytes, Access how,
                                 const uint8_t* values) {
  uint8_t* const nowhere = how == Access::kRead ? const_cast<uint8_t*>(kZeros) : sink;
  const uint32_t thread = warp.index * kLanes + lane;
  if (space == Space::kGeneric) {
    space = address >= kSharedWindow ? Space::kShared : Space::kGlobal;
    if (space == Space::kShared) address -= kSharedWindow;
  }
  const bool shared = space == Space::kShared;
  const bool aligned = address % bytes == 0;
  if (!aligned) {
    report("memcheck", pc, thread, [&] {
      return "misaligned access of " + std::to_string(bytes) + " bytes at address " +
             std::to_string(address) + ", which is " + std::to_string(address % bytes) +
             " bytes beyond a multiple";
    });
  }
  const Memory& memory = shared ? shared_ : machine_.memory;
  Allocation* allocation = memory.find(address, bytes, &i.last_used);
  if (!allocation) {
    report("memcheck", pc, thread, [&] {
      const std::string near = memory.near(address, shared ? kRedZone : 65536);
      return std::string(verb(how)) + (shared ? " shared" : " global") + " memory out of bounds, " +
             std::to_string(bytes) +
             " bytes:" + (near.empty() ? " nowhere near an allocation" : near);
    });
    return nowhere;
  }
  if (how != Access::kRead && !allocation->writable) {
    report("memcheck", pc, thread,
           [&] { return "writes to " + allocation->name + ", which is an input"; });
    return nowhere;
  }
  if (!allocation->state.empty()) {
    check_state(warp, pc, lane, *allocation, address, bytes, how);
  }
  if (aligned && options_.races && allocation->shadow.exists() &&
      (shared || options_.global_races)) {
    uint64_t addresses[kLanes];
    addresses[lane] = address;
    races_.check(*allocation, shared, how, addresses, 1u << lane, bytes, warp.index, pc,
                 values ? values - kMostBytes * lane : nullptr);
  }
  return allocation->at(address);
}

// ld.global.nc may be used for memory that is not written while the kernel runs.
void Execution::check_read_only(const Warp& warp, uint32_t pc, uint32_t lanes,
                                const uint64_t* addresses, uint32_t bytes) {
  for_each_lane(lanes, [&](uint32_t l) {
    uint32_t hint = 0;
    Allocation* allocation = machine_.memory.find(addresses[l], bytes, &hint);
    if (!allocation || !races_.written_by_launch(*allocation, addresses[l], bytes)) return;
    report("memcheck", pc, warp.index * kLanes + l, [&] {
      return "reads " + allocation->name + " + " + std::to_string(addresses[l] - allocation->base) +
             " as read-only data, but this launch has written it";
    });
  });
}

// ---- loads and stores
namespace {

// Elements in memory, of type Memory, to registers.
template <typename Element, typename Held>
void take(Warp& warp, const Instruction& i, uint32_t lanes, uint8_t* const* places) {
  const Register* registers = &warp.kernel->value_registers[i.values];
  for (uint32_t n = 0; n < i.elements; ++n) {
    auto* d = destination<Held>(warp, registers[n]);
    for_each_lane(lanes, [&](uint32_t l) {
      Element element;
      std::memcpy(&element, places[l] + n * sizeof element, sizeof element);
      d[l] = static_cast<Held>(element);  // signed ones are extended
    });
  }
}
template <typename Element>
void take(Warp& warp, const Instruction& i, uint32_t lanes, uint8_t* const* places) {
  if (i.wide_values) {
    take<Element, uint64_t>(warp, i, lanes, places);
  } else if constexpr (sizeof(Element) <= 4) {
    take<Element, uint32_t>(warp, i, lanes, places);
  }
}
void take_values(Warp& warp, const Instruction& i, uint32_t lanes, uint8_t* const* places) {
  const bool extend = is_signed(i.type);
  switch (i.bytes) {
    case 1:
      return extend ? take<int8_t>(warp, i, lanes, places) : take<uint8_t>(warp, i, lanes, places);
    case 2:
      return extend ? take<int16_t>(warp, i, lanes, places)
                    : take<uint16_t>(warp, i, lanes, places);
    case 4:
      return extend ? take<int32_t>(warp, i, lanes, places)
                    : take<uint32_t>(warp, i, lanes, places);
    default: return take<uint64_t>(warp, i, lanes, places);
  }
}

template <typename Held>
void give(const Warp& warp, const Instruction& i, uint32_t lanes, uint8_t* values) {
  const Register* registers = &warp.kernel->value_registers[i.values];
  for (uint32_t n = 0; n < i.elements; ++n) {
    const auto* a = source<Held>(warp, registers[n]);
    for_each_lane(lanes, [&](uint32_t l) {
      std::memcpy(values + kMostBytes * l + n * i.bytes, &a[l], i.bytes);
    });
  }
}

}  // namespace

void Execution::load_parameter(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes) {
  uint64_t addresses[kLanes];
  load_addresses(warp, i, addresses);
  const uint32_t bytes = uint32_t{i.bytes} * i.elements;
  uint8_t* places[kLanes];
  for_each_lane(lanes, [&](uint32_t l) {
    places[l] = const_cast<uint8_t*>(parameters_ + addresses[l]);
    if (addresses[l] + bytes <= kernel_.parameter_bytes && addresses[l] % bytes == 0) return;
    report("memcheck", pc, warp.index * kLanes + l,
           [] { return "parameters out of bounds or misaligned"; });
    places[l] = const_cast<uint8_t*>(kZeros);
  });
  take_values(warp, i, lanes, places);
}

void Execution::load(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes) {
  if (i.space == Space::kParameter) return load_parameter(warp, i, pc, lanes);
  uint64_t addresses[kLanes];
  uint8_t* places[kLanes];
  load_addresses(warp, i, addresses);
  if (options_.profile) profile_access(i, pc, addresses, lanes);
  const uint32_t bytes = uint32_t{i.bytes} * i.elements;
  resolve(warp, i, pc, lanes, i.space, addresses, bytes, Access::kRead, nullptr, places);
  if (i.read_only) check_read_only(warp, pc, lanes, addresses, bytes);
  take_values(warp, i, lanes, places);
}

void Execution::store(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes) {
  uint64_t addresses[kLanes];
  uint8_t* places[kLanes];
  alignas(kMostBytes) uint8_t values[kLanes * kMostBytes];
  load_addresses(warp, i, addresses);
  if (options_.profile) profile_access(i, pc, addresses, lanes);
  if (i.wide_values) {
    give<uint64_t>(warp, i, lanes, values);
  } else {
    give<uint32_t>(warp, i, lanes, values);
  }
  const uint32_t bytes = uint32_t{i.bytes} * i.elements;
  resolve(warp, i, pc, lanes, i.space, addresses, bytes, Access::kWrite, values, places);
  for_each_lane(lanes, [&](uint32_t l) { std::memcpy(places[l], values + kMostBytes * l, bytes); });
}

// ---- atomics
namespace {

template <typename T>
T combined(Atomic operation, T old, T b, T c) {
  switch (operation) {
    case Atomic::kAdd: return static_cast<T>(old + b);
    case Atomic::kMin: return std::min(old, b);
    case Atomic::kMax: return std::max(old, b);
    case Atomic::kAnd: return static_cast<T>(old & b);
    case Atomic::kOr: return static_cast<T>(old | b);
    case Atomic::kXor: return static_cast<T>(old ^ b);
    case Atomic::kExchange: return b;
    case Atomic::kCompareAndSwap: return old == b ? c : old;
    case Atomic::kIncrement: return old >= b ? T{0} : static_cast<T>(old + 1);
    case Atomic::kDecrement: return old == 0 || old > b ? b : static_cast<T>(old - 1);
  }
  return old;
}

// One after the other, in the order of `order`.
template <typename Unsigned, typename Signed>
void update(Warp& warp, const Instruction& i, const uint32_t* order, uint32_t count,
            uint8_t* const* places) {
  const auto operation = static_cast<Atomic>(i.operation);
  const auto* b = source<Unsigned>(warp, i.b);
  const auto* c = i.c == kNoRegister ? b : source<Unsigned>(warp, i.c);
  auto* d = i.d == kNoRegister ? nullptr : destination<Unsigned>(warp, i.d);
  for (uint32_t n = 0; n < count; ++n) {
    const uint32_t l = order[n];
    Unsigned old;
    std::memcpy(&old, places[l], sizeof old);
    const auto now =
        is_signed(i.type) && (operation == Atomic::kMin || operation == Atomic::kMax)
            ? static_cast<Unsigned>(combined<Signed>(operation, static_cast<Signed>(old),
                                                     static_cast<Signed>(b[l]), Signed{}))
            : combined<Unsigned>(operation, old, b[l], c[l]);
    std::memcpy(places[l], &now, sizeof now);
    if (d) d[l] = old;
  }
}

}  // namespace

void Execution::atomic(Warp& warp, const Instruction& i, uint32_t pc, uint32_t lanes) {
  uint64_t addresses[kLanes];
  uint8_t* places[kLanes];
  load_addresses(warp, i, addresses);
  if (options_.profile) profile_atomic(i, pc, addresses, lanes);
  resolve(warp, i, pc, lanes, i.space, addresses, i.bytes, Access::kAtomic, nullptr, places);
  uint32_t order[kLanes], count = 0;
  for_each_lane(lanes, [&](uint32_t l) { order[count++] = l; });
  if (options_.seed) std::shuffle(order, order + count, random_);
  if (i.bytes == 8) {
    update<uint64_t, int64_t>(warp, i, order, count, places);
  } else {
    update<uint32_t, int32_t>(warp, i, order, count, places);
  }
}

// ---- counters
void Execution::profile_access(const Instruction& i, uint32_t pc, const uint64_t* addresses,
                               uint32_t lanes) {
  const uint32_t bytes = uint32_t{i.bytes} * i.elements;
  const uint64_t moved = uint64_t{bytes} * static_cast<uint64_t>(__builtin_popcount(lanes));
  uint32_t ideal = 0;
  const bool shared = i.space == Space::kShared;
  const uint32_t actual = shared ? wavefronts(addresses, lanes, bytes, &ideal)
                                 : sectors(addresses, lanes, bytes, &ideal);
  Traffic& traffic = shared                  ? counters_.shared
                     : i.kind == Kind::kLoad ? counters_.load
                                             : counters_.store;
  traffic.add(actual, ideal, moved);
  counters_.by_instruction[pc].add(actual, ideal, moved);
}

// Lanes with the same address are serialized.
void Execution::profile_atomic(const Instruction& i, uint32_t pc, const uint64_t* addresses,
                               uint32_t lanes) {
  uint32_t turns = 0, ideal = 0;
  for_each_lane(lanes, [&](uint32_t l) {
    uint32_t same = 0;
    for_each_lane(lanes, [&](uint32_t k) { same += addresses[k] == addresses[l]; });
    turns = std::max(turns, same);
  });
  if (i.space == Space::kShared) {
    turns = std::max(turns, wavefronts(addresses, lanes, i.bytes, &ideal));
  }
  const uint64_t moved = uint64_t{i.bytes} * static_cast<uint64_t>(__builtin_popcount(lanes));
  counters_.atomic.add(turns, 1, moved);
  counters_.by_instruction[pc].add(turns, 1, moved);
}

}  // namespace ptx
