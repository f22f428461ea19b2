// Decoders of moves and conversions.
#include "arithmetic.h"
#include "conversions.h"
#include "decoder.h"

namespace ptx {
namespace {

bool is_float(Type type) { return type == Type::kF32 || type == Type::kF64; }

// ---- mov
template <typename T>
LaneFunction pack_function(size_t parts) {
  if (parts == 2) return pack<T, 2>;
  if (parts == 4 && sizeof(T) == 8) return pack<T, 4>;
  return nullptr;
}
template <typename T>
LaneFunction unpack_function(size_t parts) {
  if (parts == 2) return unpack<T, 2>;
  if (parts == 4 && sizeof(T) == 8) return unpack<T, 4>;
  return nullptr;
}

void decode_mov(Decoding& d) {
  const Type type = d.take_type();
  Instruction& i = d.instruction();
  d.need(2);
  i.kind = Kind::kArithmetic;
  i.category = Category::kMove;
  if (type == Type::kPredicate) {
    i.function = predicate_logic;
    i.operation = static_cast<uint8_t>(Logic::kNone);
    i.d = d.predicate(d.operand(0));
    i.a = d.predicate(d.operand(1));
    return;
  }
  const uint32_t bits = register_bits(type);
  const Operand &to = d.operand(0), &from = d.operand(1);
  const bool packs = from.kind == Operand::Kind::kVector;
  if (!packs && to.kind != Operand::Kind::kVector) {
    i.function = bits == 64 ? move<uint64_t> : move<uint32_t>;
    i.d = d.destination(0, bits);
    i.a = d.source(1, bits);
    return;
  }
  const std::vector<Operand>& parts = packs ? from.parts : to.parts;
  if (bits == 16 || parts.size() > 4) d.unknown();
  const uint32_t part_bits = bits / static_cast<uint32_t>(parts.size());
  std::vector<Register> registers;
  for (const Operand& part : parts) {
    registers.push_back(packs ? d.source(part, part_bits) : d.destination(part, part_bits));
  }
  i.values = d.builder().value_registers(registers);
  if (packs) {
    i.function =
        bits == 64 ? pack_function<uint64_t>(parts.size()) : pack_function<uint32_t>(parts.size());
    i.d = d.destination(0, bits);
  } else {
    i.function = bits == 64 ? unpack_function<uint64_t>(parts.size())
                            : unpack_function<uint32_t>(parts.size());
    i.a = d.source(1, bits);
  }
  if (!i.function) d.unknown();
}

// Generic addresses of global memory are themselves; those of shared memory begin at kSharedWindow.
template <bool kToGeneric>
struct MoveSharedWindow {
  static uint64_t run(uint64_t a) { return kToGeneric ? a + kSharedWindow : a - kSharedWindow; }
};
void decode_cvta(Decoding& d) {
  const bool from_generic = d.take("to");
  const bool shared = d.take_one_of<bool>({{"global", false}, {"shared", true}});
  d.require("u64");
  d.arithmetic(!shared        ? move<uint64_t>
               : from_generic ? unary<MoveSharedWindow<false>, uint64_t>
                              : unary<MoveSharedWindow<true>, uint64_t>,
               Category::kMove, 64, 1);
}

// ---- cvt
// run(T{}) for the C++ type of a PTX type; null: not one of those
template <typename F>
LaneFunction for_integer(Type type, const F& run) {
  switch (type) {
    case Type::kU8: return run(uint8_t{});
    case Type::kS8: return run(int8_t{});
    case Type::kU16: return run(uint16_t{});
    case Type::kS16: return run(int16_t{});
    case Type::kU32: return run(uint32_t{});
    case Type::kS32: return run(int32_t{});
    case Type::kU64: return run(uint64_t{});
    case Type::kS64: return run(int64_t{});
    default: return nullptr;
  }
}
template <typename F>
LaneFunction for_float(Type type, const F& run) {
  switch (type) {
    case Type::kF32: return run(float{});
    case Type::kF64: return run(double{});
    default: return nullptr;
  }
}
// Whether the source register has 64 bits although its type has fewer.
template <typename Op, typename To, typename From>
LaneFunction from_register(bool wide) {
  return wide ? convert<Op, To, From, uint64_t> : convert<Op, To, From, From>;
}

LaneFunction integer_to_integer(Type to, Type from, bool wide, bool saturate) {
  return for_integer(to, [&](auto t) {
    return for_integer(from, [&](auto f) {
      using To = decltype(t);
      using From = decltype(f);
      return saturate ? from_register<SaturateInteger, To, From>(wide)
                      : from_register<ConvertInteger, To, From>(wide);
    });
  });
}
template <template <Rounding> class Op, typename To, typename From>
LaneFunction rounded(Rounding rounding) {
  switch (rounding) {
    case Rounding::kNearest: return convert<Op<Rounding::kNearest>, To, From, From>;
    case Rounding::kZero: return convert<Op<Rounding::kZero>, To, From, From>;
    case Rounding::kDown: return convert<Op<Rounding::kDown>, To, From, From>;
    default: return convert<Op<Rounding::kUp>, To, From, From>;
  }
}
LaneFunction float_to_integer(Type to, Type from, Rounding rounding) {
  return for_integer(to, [&](auto t) {
    return for_float(
        from, [&](auto f) { return rounded<FloatToInteger, decltype(t), decltype(f)>(rounding); });
  });
}
LaneFunction integer_to_float(Type to, Type from, bool wide) {
  return for_float(to, [&](auto t) {
    return for_integer(
        from, [&](auto f) { return from_register<ToFloat, decltype(t), decltype(f)>(wide); });
  });
}

void decode_cvt(Decoding& d) {
  const Type from = d.take_type(), to = d.take_type();
  const bool saturate = d.take("sat");
  bool to_integral = false, nearest = false;
  Rounding rounding = Rounding::kNearest;
  const std::pair<const char*, Rounding> kIntegral[] = {{"rni", Rounding::kNearest},
                                                        {"rzi", Rounding::kZero},
                                                        {"rmi", Rounding::kDown},
                                                        {"rpi", Rounding::kUp}};
  for (const auto& [name, value] : kIntegral) {
    if (!d.take(name)) continue;
    to_integral = true;
    rounding = value;
  }
  nearest = d.take("rn");  // other roundings of floats remain, and are refused

  d.need(2);
  Instruction& i = d.instruction();
  i.kind = Kind::kArithmetic;
  i.category = Category::kConversion;
  i.d = d.destination(0, bytes_of(to) == 8 ? 64 : 32);
  const bool source_is_number = d.operand(1).kind == Operand::Kind::kNumber;
  const bool wide = source_is_number ? bytes_of(from) == 8 : d.any_register(1).bank == Bank::k64;
  i.a = d.source(1, wide ? 64 : 32);
  if (bytes_of(from) == 8 && !wide) d.unknown();

  const bool from_float = is_float(from), to_float = is_float(to);
  if (from == Type::kF16 || from == Type::kBF16) {
    if (to != Type::kF32 || saturate || nearest || to_integral || wide) d.unknown();
    i.function = from == Type::kF16 ? float_from_16<Half> : float_from_16<BFloat>;
  } else if (to == Type::kF16 || to == Type::kBF16) {
    if (from != Type::kF32 || saturate || !nearest || to_integral) d.unknown();
    i.function = to == Type::kF16 ? float_to_16<Half> : float_to_16<BFloat>;
  } else if (!from_float && !to_float) {
    if (nearest || to_integral) d.unknown();
    i.function = integer_to_integer(to, from, wide, saturate);
  } else if (from_float && !to_float) {  // always saturates
    if (!to_integral || wide != (bytes_of(from) == 8)) d.unknown();
    i.function = float_to_integer(to, from, rounding);
  } else if (!from_float) {
    if (!nearest || saturate) d.unknown();
    i.function = integer_to_float(to, from, wide);
  } else if (to_integral) {
    if (to != from || saturate) d.unknown();
    i.function = for_float(
        to, [&](auto t) { return rounded<RoundToIntegral, decltype(t), decltype(t)>(rounding); });
  } else {
    // From 64 to 32 bits a rounding is required; otherwise there is none.
    if (nearest != (bytes_of(from) > bytes_of(to)) || wide != (bytes_of(from) == 8)) d.unknown();
    i.function = for_float(to, [&](auto t) {
      return for_float(from, [&](auto f) -> LaneFunction {
        using To = decltype(t);
        using From = decltype(f);
        return saturate ? convert<Saturate, To, From, From> : convert<ToFloat, To, From, From>;
      });
    });
  }
  if (!i.function) d.unknown();
}

}  // namespace

const OpcodeTable& conversion_opcodes() {
  static const OpcodeTable kTable = {
      {"mov", decode_mov},
      {"cvta", decode_cvta},
      {"cvt", decode_cvt},
  };
  return kTable;
}

}  // namespace ptx
