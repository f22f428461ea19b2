// Arithmetic: one structure per operation, and the loops over lanes that apply it to registers.
#pragma once
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "warp.h"

namespace ptx {

// ---- loops over the lanes of an operation on values of type T
template <typename Op, typename T>
void unary(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<T>(warp, i.a);
  write_lanes(destination<T>(warp, i.d), lanes,
              [=](uint32_t l) { return slot_of<T>(Op::run(value_of<T>(a[l]))); });
}
template <typename Op, typename T>
void binary(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<T>(warp, i.a), *b = source<T>(warp, i.b);
  write_lanes(destination<T>(warp, i.d), lanes, [=](uint32_t l) {
    return slot_of<T>(Op::run(value_of<T>(a[l]), value_of<T>(b[l])));
  });
}
template <typename Op, typename T>
void ternary(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<T>(warp, i.a), *b = source<T>(warp, i.b), *c = source<T>(warp, i.c);
  write_lanes(destination<T>(warp, i.d), lanes, [=](uint32_t l) {
    return slot_of<T>(Op::run(value_of<T>(a[l]), value_of<T>(b[l]), value_of<T>(c[l])));
  });
}
// The result has another type. Operations that are slow or unsafe for idle lanes run lane by lane.
template <typename Op, typename T, typename R = T>
void unary_each(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<T>(warp, i.a);
  write_each_lane(destination<R>(warp, i.d), lanes,
                  [=](uint32_t l) { return slot_of<R>(Op::run(value_of<T>(a[l]))); });
}
template <typename Op, typename T>
void binary_each(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<T>(warp, i.a), *b = source<T>(warp, i.b);
  write_each_lane(destination<T>(warp, i.d), lanes, [=](uint32_t l) {
    return slot_of<T>(Op::run(value_of<T>(a[l]), value_of<T>(b[l])));
  });
}
// The second source is a shift amount of 32 bits.
template <typename Op, typename T>
void shift(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<T>(warp, i.a);
  const auto* b = source<uint32_t>(warp, i.b);
  write_lanes(destination<T>(warp, i.d), lanes,
              [=](uint32_t l) { return slot_of<T>(Op::run(value_of<T>(a[l]), b[l])); });
}

// ---- integers wrap around; floats round to nearest even
template <typename T>
using Unsigned = std::make_unsigned_t<std::conditional_t<std::is_integral_v<T>, T, int>>;

struct Add {
  template <typename T>
  static T run(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
    } else {
      return a + b;
    }
  }
};
struct Subtract {
  template <typename T>
  static T run(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
    } else {
      return a - b;
    }
  }
};
struct Multiply {
  template <typename T>
  static T run(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      return a * b;
    } else if constexpr (sizeof(T) == 8) {
      return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
    } else {
      return static_cast<T>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
    }
  }
};
struct MultiplyAdd {
  template <typename T>
  static T run(T a, T b, T c) {
    return Add::run(Multiply::run(a, b), c);
  }
};
struct FusedMultiplyAdd {
  template <typename T>
  static T run(T a, T b, T c) {
    return std::fma(a, b, c);
  }
};
struct Divide {
  template <typename T>
  static T run(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return static_cast<T>(-1);
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Subtract::run<T>(0, a);
    }
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <typename T>
  static T run(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Minimum {  // of numbers where one is NaN: the other; -0 is below +0
  template <typename T>
  static T run(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return b;
      if (b != b) return a;
      if (a == b) return std::signbit(a) ? a : b;
    }
    return a < b ? a : b;
  }
};
struct Maximum {
  template <typename T>
  static T run(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a != a) return b;
      if (b != b) return a;
      if (a == b) return std::signbit(a) ? b : a;
    }
    return a > b ? a : b;
  }
};
struct Negate {
  template <typename T>
  static T run(T a) {
    if constexpr (std::is_integral_v<T>) {
      return Subtract::run<T>(0, a);
    } else {
      return -a;
    }
  }
};
struct Absolute {
  template <typename T>
  static T run(T a) {
    if constexpr (std::is_integral_v<T>) {
      return a < 0 ? Subtract::run<T>(0, a) : a;
    } else {
      return std::fabs(a);
    }
  }
};
struct SquareRoot {
  template <typename T>
  static T run(T a) {
    return std::sqrt(a);
  }
};
struct Reciprocal {
  template <typename T>
  static T run(T a) {
    return T(1) / a;
  }
};

template <typename T, typename Wide>
void multiply_wide(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<T>(warp, i.a), *b = source<T>(warp, i.b);
  write_lanes(destination<Wide>(warp, i.d), lanes, [=](uint32_t l) {
    return slot_of<Wide>(Multiply::run<Wide>(value_of<T>(a[l]), value_of<T>(b[l])));
  });
}
template <typename T, typename Wide>
void multiply_add_wide(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<T>(warp, i.a), *b = source<T>(warp, i.b);
  const auto* c = source<Wide>(warp, i.c);
  write_lanes(destination<Wide>(warp, i.d), lanes, [=](uint32_t l) {
    return slot_of<Wide>(
        MultiplyAdd::run<Wide>(value_of<T>(a[l]), value_of<T>(b[l]), value_of<Wide>(c[l])));
  });
}
template <typename Wide>
struct MultiplyHigh {
  template <typename T>
  static T run(T a, T b) {
    return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (sizeof(T) * 8));
  }
};

// ---- rounding other than to nearest even
// Hides a value from the compiler, which does not know that the rounding mode changes.
template <typename T>
inline T opaque(T value) {
  volatile T hidden = value;
  return hidden;
}
template <typename Op, typename T, int kMode>
void directed(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<T>(warp, i.a);
  const auto* b = i.b == kNoRegister ? a : source<T>(warp, i.b);
  const auto* c = i.c == kNoRegister ? a : source<T>(warp, i.c);
  const int before = std::fegetround();
  std::fesetround(kMode);
  write_each_lane(destination<T>(warp, i.d), lanes, [=](uint32_t l) {
    const T x = opaque(value_of<T>(a[l]));
    if constexpr (std::is_invocable_v<decltype(&Op::template run<T>), T, T, T>) {
      return slot_of<T>(opaque(Op::run(x, opaque(value_of<T>(b[l])), value_of<T>(c[l]))));
    } else if constexpr (std::is_invocable_v<decltype(&Op::template run<T>), T, T>) {
      return slot_of<T>(opaque(Op::run(x, opaque(value_of<T>(b[l])))));
    } else {
      return slot_of<T>(opaque(Op::run(x)));
    }
  });
  std::fesetround(before);
}

// ---- approximations: the exact value, rounded
template <bool kFlush>  // subnormal sources and results are zeros of the same sign
struct Exp2 {
  static float run(float a) { return flush(static_cast<float>(std::exp2(double{flush(a)}))); }
  static float flush(float x) {
    return kFlush && std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
  }
};
template <bool kFlush>
struct Log2 {
  static float run(float a) {
    return static_cast<float>(std::log2(double{Exp2<kFlush>::flush(a)}));
  }
};

// ---- bits
struct And {
  template <typename T>
  static T run(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  static T run(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  static T run(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <typename T>
  static T run(T a) {
    return static_cast<T>(~a);
  }
};
struct ShiftLeft {
  template <typename T>
  static T run(T a, uint32_t by) {
    constexpr uint32_t kBits = sizeof(T) * 8;
    const auto shifted = static_cast<T>(static_cast<Unsigned<T>>(a) << (by & (kBits - 1)));
    return by < kBits ? shifted : T{0};
  }
};
struct ShiftRight {
  template <typename T>
  static T run(T a, uint32_t by) {
    constexpr uint32_t kBits = sizeof(T) * 8;
    if constexpr (std::is_signed_v<T>) {
      return static_cast<T>(a >> (by < kBits ? by : kBits - 1));
    } else {
      return by < kBits ? static_cast<T>(a >> (by & (kBits - 1))) : T{0};
    }
  }
};
struct CountOnes {
  template <typename T>
  static uint32_t run(T a) {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};
struct CountLeadingZeros {
  template <typename T>
  static uint32_t run(T a) {
    constexpr uint32_t kUnused = 64 - sizeof(T) * 8;
    return a ? static_cast<uint32_t>(__builtin_clzll(a)) - kUnused
             : static_cast<uint32_t>(sizeof(T) * 8);
  }
};
struct Reverse {
  template <typename T>
  static T run(T a) {
    T result = 0;
    for (uint32_t bit = 0; bit < sizeof(T) * 8; ++bit) {
      result = static_cast<T>(result << 1 | (a >> bit & 1));
    }
    return result;
  }
};
// The highest bit that differs from the sign; the shift that brings it to the top.
template <bool kShiftAmount>
struct FindHighest {
  template <typename T>
  static uint32_t run(T a) {
    constexpr uint32_t kTop = sizeof(T) * 8 - 1;
    const auto bits = static_cast<Unsigned<T>>(std::is_signed_v<T> && a < 0 ? ~a : a);
    if (!bits) return ~0u;
    const uint32_t bit = kTop - CountLeadingZeros::run(bits);
    return kShiftAmount ? kTop - bit : bit;
  }
};

// bfi: the low bits of a, inserted into b at c, e of them
template <typename T>
void insert_field(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<T>(warp, i.a), *b = source<T>(warp, i.b);
  const auto *c = source<uint32_t>(warp, i.c), *e = source<uint32_t>(warp, i.e);
  constexpr uint32_t kBits = sizeof(T) * 8;
  write_lanes(destination<T>(warp, i.d), lanes, [=](uint32_t l) {
    const uint32_t at = c[l] & 0xff, length = e[l] & 0xff;
    const T ones = ShiftRight::run<T>(static_cast<T>(~T{0}), length < kBits ? kBits - length : 0);
    const T field = ShiftLeft::run<T>(length ? ones : T{0}, at);
    return static_cast<T>((b[l] & ~field) | (ShiftLeft::run<T>(static_cast<T>(a[l]), at) & field));
  });
}
// bfe: c bits of a from bit b on
template <typename T>
void extract_field(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<T>(warp, i.a);
  const auto *b = source<uint32_t>(warp, i.b), *c = source<uint32_t>(warp, i.c);
  using U = Unsigned<T>;
  constexpr uint32_t kBits = sizeof(T) * 8;
  write_each_lane(destination<T>(warp, i.d), lanes, [=](uint32_t l) {
    const uint32_t at = b[l] & 0xff, length = c[l] & 0xff;
    const U value = static_cast<U>(a[l]);
    U fill = 0;  // the bits beyond the field
    if (std::is_signed_v<T> && length) {
      const uint32_t sign = at + length - 1;
      fill = value >> (sign < kBits ? sign : kBits - 1) & 1;
    }
    U result = 0;
    for (uint32_t bit = 0; bit < kBits; ++bit) {
      const bool inside = bit < length && at + bit < kBits;
      result |= (inside ? value >> (at + bit) & 1 : fill) << bit;
    }
    return slot_of<U>(result);
  });
}

struct PermuteBytes {
  static uint32_t run(uint32_t a, uint32_t b, uint32_t selectors) {
    const uint64_t both = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (uint32_t n = 0; n < 4; ++n) {
      const uint32_t selector = selectors >> (4 * n) & 15;
      uint32_t byte = static_cast<uint32_t>(both >> (8 * (selector & 7))) & 0xff;
      if (selector & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign
      result |= byte << (8 * n);
    }
    return result;
  }
};
inline void permute_bytes(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<uint32_t>(warp, i.a), *b = source<uint32_t>(warp, i.b);
  const auto* c = source<uint32_t>(warp, i.c);
  write_lanes(destination<uint32_t>(warp, i.d), lanes,
              [=](uint32_t l) { return PermuteBytes::run(a[l], b[l], c[l]); });
}
// Any function of three bits, by its table.
inline void logic3(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<uint32_t>(warp, i.a), *b = source<uint32_t>(warp, i.b);
  const auto* c = source<uint32_t>(warp, i.c);
  uint32_t take[8];
  for (int n = 0; n < 8; ++n) take[n] = i.immediate >> n & 1 ? ~0u : 0u;
  write_lanes(destination<uint32_t>(warp, i.d), lanes, [=, &take](uint32_t l) {
    const uint32_t x = a[l], y = b[l], z = c[l];
    return (take[0] & ~x & ~y & ~z) | (take[1] & ~x & ~y & z) | (take[2] & ~x & y & ~z) |
           (take[3] & ~x & y & z) | (take[4] & x & ~y & ~z) | (take[5] & x & ~y & z) |
           (take[6] & x & y & ~z) | (take[7] & x & y & z);
  });
}
// shf: 32 bits of {b, a}, shifted by c
template <bool kRight, bool kClamp>
void funnel_shift(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<uint32_t>(warp, i.a), *b = source<uint32_t>(warp, i.b);
  const auto* c = source<uint32_t>(warp, i.c);
  write_lanes(destination<uint32_t>(warp, i.d), lanes, [=](uint32_t l) {
    const uint32_t by = kClamp ? (c[l] < 32 ? c[l] : 32) : c[l] & 31;
    const uint64_t both = uint64_t{b[l]} << 32 | a[l];
    return static_cast<uint32_t>(kRight ? both >> by : both << by >> 32);
  });
}
// dp4a: c + the dot product of four bytes
template <typename A, typename B>
void dot4(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<uint32_t>(warp, i.a), *b = source<uint32_t>(warp, i.b);
  const auto* c = source<uint32_t>(warp, i.c);
  write_lanes(destination<uint32_t>(warp, i.d), lanes, [=](uint32_t l) {
    int32_t sum = 0;
    for (uint32_t n = 0; n < 4; ++n) {
      sum += int32_t{static_cast<A>(a[l] >> (8 * n))} * int32_t{static_cast<B>(b[l] >> (8 * n))};
    }
    return c[l] + static_cast<uint32_t>(sum);
  });
}

// ---- moves and predicates
template <typename T>
void move(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<T>(warp, i.a);
  write_lanes(destination<T>(warp, i.d), lanes, [=](uint32_t l) { return a[l]; });
}
// Moves between a register of type T and kParts registers, the lowest bits first.
template <typename T, uint32_t kParts>
void pack(Warp& warp, const Instruction& i, uint32_t lanes) {
  constexpr uint32_t kBits = sizeof(T) * 8 / kParts;
  const Register* parts = &warp.kernel->value_registers[i.values];
  auto* d = destination<T>(warp, i.d);
  const uint32_t* from[kParts];
  for (uint32_t n = 0; n < kParts; ++n) from[n] = source<uint32_t>(warp, parts[n]);
  write_lanes(d, lanes, [=, &from](uint32_t l) {
    T value = 0;
    for (uint32_t n = 0; n < kParts; ++n) {
      value |= T{from[n][l] & static_cast<uint32_t>(~uint64_t{0} >> (64 - kBits))} << (kBits * n);
    }
    return value;
  });
}
template <typename T, uint32_t kParts>
void unpack(Warp& warp, const Instruction& i, uint32_t lanes) {
  constexpr uint32_t kBits = sizeof(T) * 8 / kParts;
  const Register* parts = &warp.kernel->value_registers[i.values];
  T from[kLanes];  // one of the parts may be the source
  std::memcpy(from, source<T>(warp, i.a), sizeof from);
  for (uint32_t n = 0; n < kParts; ++n) {
    write_lanes(destination<uint32_t>(warp, parts[n]), lanes, [&](uint32_t l) {
      return static_cast<uint32_t>(from[l] >> (kBits * n) & ~uint64_t{0} >> (64 - kBits));
    });
  }
}
template <typename T>
void select(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<T>(warp, i.a), *b = source<T>(warp, i.b);
  const uint32_t chosen = predicate(warp, i.c);
  write_lanes(destination<T>(warp, i.d), lanes,
              [=](uint32_t l) { return chosen >> l & 1 ? a[l] : b[l]; });
}
inline void predicate_logic(Warp& warp, const Instruction& i, uint32_t lanes) {
  const uint32_t a = predicate(warp, i.a), b = i.b == kNoRegister ? 0 : predicate(warp, i.b);
  uint32_t result = a;
  switch (static_cast<Logic>(i.operation)) {
    case Logic::kNone: break;
    case Logic::kAnd: result = a & b; break;
    case Logic::kOr: result = a | b; break;
    case Logic::kXor: result = a ^ b; break;
    case Logic::kNot: result = ~a; break;
  }
  set_predicate(warp, i.d, lanes, result);
}

template <Comparison kComparison, typename T>
inline bool compare(T a, T b) {
  switch (kComparison) {
    case Comparison::kEqual: return a == b;
    case Comparison::kNotEqual: return a < b || a > b;  // false for NaN
    case Comparison::kLess: return a < b;
    case Comparison::kLessEqual: return a <= b;
    case Comparison::kGreater: return a > b;
    case Comparison::kGreaterEqual: return a >= b;
    case Comparison::kEqualUnordered: return !(a < b || a > b);
    case Comparison::kNotEqualUnordered: return a != b;
    case Comparison::kLessUnordered: return !(a >= b);
    case Comparison::kLessEqualUnordered: return !(a > b);
    case Comparison::kGreaterUnordered: return !(a <= b);
    case Comparison::kGreaterEqualUnordered: return !(a < b);
    case Comparison::kNumbers: return a == a && b == b;
    case Comparison::kNan: return a != a || b != b;
  }
}
// setp: d = a ? b, joined with c; d2 = !(a ? b), joined with c
template <Comparison kComparison, typename T>
void set_comparison(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto *a = source<T>(warp, i.a), *b = source<T>(warp, i.b);
  uint32_t holds = 0;
  if (__builtin_popcount(lanes) <= 3) {
    for_each_lane(lanes, [&](uint32_t l) {
      holds |= uint32_t{compare<kComparison, T>(value_of<T>(a[l]), value_of<T>(b[l]))} << l;
    });
  } else {
    for (uint32_t l = 0; l < kLanes; ++l) {
      holds |= uint32_t{compare<kComparison, T>(value_of<T>(a[l]), value_of<T>(b[l]))} << l;
    }
  }
  uint32_t fails = ~holds;
  if (i.combine != Logic::kNone) {
    const uint32_t c = i.negate_source ? ~predicate(warp, i.c) : predicate(warp, i.c);
    const auto joined = [&](uint32_t x) {
      return i.combine == Logic::kAnd ? x & c : i.combine == Logic::kOr ? x | c : x ^ c;
    };
    holds = joined(holds);
    fails = joined(fails);
  }
  if (i.d != kNoRegister) set_predicate(warp, i.d, lanes, holds);
  if (i.d2 != kNoRegister) set_predicate(warp, i.d2, lanes, fails);
}

}  // namespace ptx
