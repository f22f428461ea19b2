// Decoders of arithmetic instructions.
#include "arithmetic.h"
#include "decoder.h"

namespace ptx {
namespace {

bool is_float(Type type) { return type == Type::kF32 || type == Type::kF64; }

Category category_of(Type type) {
  return type == Type::kF32   ? Category::kFloat32
         : type == Type::kF64 ? Category::kFloat64
                              : Category::kInteger;
}

// run(T{}) for the C++ type of a PTX type; null: not one of those
template <typename F>
LaneFunction for_float(Type type, const F& run) {
  switch (type) {
    case Type::kF32: return run(float{});
    case Type::kF64: return run(double{});
    default: return nullptr;
  }
}
template <typename F>
LaneFunction for_integer(Type type, const F& run) {
  switch (type) {
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
LaneFunction for_bits(Type type, const F& run) {
  switch (type) {
    case Type::kB16: return run(uint16_t{});
    case Type::kB32: return run(uint32_t{});
    case Type::kB64: return run(uint64_t{});
    default: return nullptr;
  }
}
template <typename F>
LaneFunction for_number(Type type, const F& run) {
  return is_float(type) ? for_float(type, run) : for_integer(type, run);
}

// ptxas may fuse float operations without a rounding modifier, so it is required.
enum class Mode : uint8_t { kNearest, kZero, kDown, kUp };
Mode take_rounding(Decoding& d) {
  return d.take_one_of<Mode>(
      {{"rn", Mode::kNearest}, {"rz", Mode::kZero}, {"rm", Mode::kDown}, {"rp", Mode::kUp}});
}
template <typename Op>
LaneFunction directed_function(Type type, Mode mode) {
  return for_float(type, [&](auto t) -> LaneFunction {
    using T = decltype(t);
    switch (mode) {
      case Mode::kZero: return directed<Op, T, FE_TOWARDZERO>;
      case Mode::kDown: return directed<Op, T, FE_DOWNWARD>;
      case Mode::kUp: return directed<Op, T, FE_UPWARD>;
      default: return nullptr;
    }
  });
}

template <typename Op>
void decode_binary_float(Decoding& d, Type type) {
  const Mode mode = take_rounding(d);
  const LaneFunction nearest =
      for_float(type, [](auto t) -> LaneFunction { return binary<Op, decltype(t)>; });
  d.arithmetic(mode == Mode::kNearest ? nearest : directed_function<Op>(type, mode),
               category_of(type), register_bits(type), 2);
}
template <typename Op>
void decode_binary(Decoding& d) {
  const Type type = d.take_type();
  if (is_float(type)) return decode_binary_float<Op>(d, type);
  d.arithmetic(for_integer(type, [](auto t) -> LaneFunction { return binary<Op, decltype(t)>; }),
               category_of(type), register_bits(type), 2);
}
template <typename Op>
void decode_unary_float(Decoding& d) {
  const Type type = d.take_type();
  const Mode mode = take_rounding(d);
  const LaneFunction nearest =
      for_float(type, [](auto t) -> LaneFunction { return unary<Op, decltype(t)>; });
  d.arithmetic(mode == Mode::kNearest ? nearest : directed_function<Op>(type, mode),
               category_of(type), register_bits(type), 1);
}

LaneFunction wide_function(Type type, bool add) {
  switch (type) {
    case Type::kU16:
      return add ? multiply_add_wide<uint16_t, uint32_t> : multiply_wide<uint16_t, uint32_t>;
    case Type::kS16:
      return add ? multiply_add_wide<int16_t, int32_t> : multiply_wide<int16_t, int32_t>;
    case Type::kU32:
      return add ? multiply_add_wide<uint32_t, uint64_t> : multiply_wide<uint32_t, uint64_t>;
    case Type::kS32:
      return add ? multiply_add_wide<int32_t, int64_t> : multiply_wide<int32_t, int64_t>;
    default: return nullptr;
  }
}
void decode_wide(Decoding& d, Type type, bool add) {
  Instruction& i = d.instruction();
  i.function = wide_function(type, add);
  if (!i.function) d.unknown();
  d.need(add ? 4 : 3);
  i.kind = Kind::kArithmetic;
  i.category = Category::kInteger;
  const uint32_t bits = register_bits(type), wide = bytes_of(type) == 4 ? 64 : 32;
  i.d = d.destination(0, wide);
  i.a = d.source(1, bits);
  i.b = d.source(2, bits);
  if (add) i.c = d.source(3, wide);
}

void decode_mul(Decoding& d) {
  const Type type = d.take_type();
  if (is_float(type)) return decode_binary_float<Multiply>(d, type);
  if (d.take("wide")) return decode_wide(d, type, false);
  if (d.take("hi")) {
    const auto function = [&]() -> LaneFunction {
      switch (type) {
        case Type::kU16: return binary<MultiplyHigh<uint32_t>, uint16_t>;
        case Type::kS16: return binary<MultiplyHigh<int32_t>, int16_t>;
        case Type::kU32: return binary<MultiplyHigh<uint64_t>, uint32_t>;
        case Type::kS32: return binary<MultiplyHigh<int64_t>, int32_t>;
        case Type::kU64: return binary_each<MultiplyHigh<unsigned __int128>, uint64_t>;
        case Type::kS64: return binary_each<MultiplyHigh<__int128>, int64_t>;
        default: return nullptr;
      }
    };
    return d.arithmetic(function(), Category::kInteger, register_bits(type), 2);
  }
  d.require("lo");
  d.arithmetic(
      for_integer(type, [](auto t) -> LaneFunction { return binary<Multiply, decltype(t)>; }),
      Category::kInteger, register_bits(type), 2);
}
void decode_mad(Decoding& d) {
  const Type type = d.take_type();
  if (d.take("wide")) return decode_wide(d, type, true);
  d.require("lo");
  d.arithmetic(
      for_integer(type, [](auto t) -> LaneFunction { return ternary<MultiplyAdd, decltype(t)>; }),
      Category::kInteger, register_bits(type), 3);
}
void decode_fma(Decoding& d) {
  const Type type = d.take_type();
  const Mode mode = take_rounding(d);
  const LaneFunction nearest = for_float(
      type, [](auto t) -> LaneFunction { return ternary<FusedMultiplyAdd, decltype(t)>; });
  d.arithmetic(mode == Mode::kNearest ? nearest : directed_function<FusedMultiplyAdd>(type, mode),
               category_of(type), register_bits(type), 3);
}
void decode_div(Decoding& d) {
  const Type type = d.take_type();
  if (is_float(type)) return decode_binary_float<Divide>(d, type);
  d.arithmetic(
      for_integer(type, [](auto t) -> LaneFunction { return binary_each<Divide, decltype(t)>; }),
      Category::kInteger, register_bits(type), 2);
}
void decode_rem(Decoding& d) {
  const Type type = d.take_type();
  d.arithmetic(
      for_integer(type, [](auto t) -> LaneFunction { return binary_each<Remainder, decltype(t)>; }),
      Category::kInteger, register_bits(type), 2);
}
template <typename Op>
void decode_extreme(Decoding& d) {
  const Type type = d.take_type();
  d.arithmetic(for_number(type, [](auto t) -> LaneFunction { return binary<Op, decltype(t)>; }),
               category_of(type), register_bits(type), 2);
}
void decode_neg(Decoding& d) {
  const Type type = d.take_type();
  if (!is_float(type) && !is_signed(type)) d.unknown();
  d.arithmetic(for_number(type, [](auto t) -> LaneFunction { return unary<Negate, decltype(t)>; }),
               category_of(type), register_bits(type), 1);
}
void decode_abs(Decoding& d) {
  const Type type = d.take_type();
  if (!is_float(type) && !is_signed(type)) d.unknown();
  d.arithmetic(
      for_number(type, [](auto t) -> LaneFunction { return unary<Absolute, decltype(t)>; }),
      category_of(type), register_bits(type), 1);
}
template <template <bool> class Op>
void decode_approximation(Decoding& d) {
  d.require("approx");
  const LaneFunction function =
      d.take("ftz") ? unary_each<Op<true>, float> : unary_each<Op<false>, float>;
  if (d.take_type() != Type::kF32) d.unknown();
  d.arithmetic(function, Category::kSpecialFunction, 32, 1);
}

void decode_predicate_logic(Decoding& d, Logic logic) {
  Instruction& i = d.instruction();
  const bool unary = logic == Logic::kNot || logic == Logic::kNone;
  d.need(unary ? 2 : 3);
  i.kind = Kind::kArithmetic;
  i.category = Category::kPredicate;
  i.function = predicate_logic;
  i.operation = static_cast<uint8_t>(logic);
  i.d = d.predicate(d.operand(0));
  i.a = d.predicate(d.operand(1));
  if (!unary) i.b = d.predicate(d.operand(2));
}
template <typename Op, Logic kLogic>
void decode_logic(Decoding& d) {
  const Type type = d.take_type();
  if (type == Type::kPredicate) return decode_predicate_logic(d, kLogic);
  if constexpr (kLogic == Logic::kNot) {
    d.arithmetic(for_bits(type, [](auto t) -> LaneFunction { return unary<Op, decltype(t)>; }),
                 Category::kLogic, register_bits(type), 1);
  } else {
    d.arithmetic(for_bits(type, [](auto t) -> LaneFunction { return binary<Op, decltype(t)>; }),
                 Category::kLogic, register_bits(type), 2);
  }
}
template <typename Op>
void decode_shift(Decoding& d) {
  const Type type = d.take_type();
  const auto pick = [](auto t) -> LaneFunction { return shift<Op, decltype(t)>; };
  Instruction& i = d.instruction();
  i.function = for_bits(type, pick);
  if (!i.function && std::is_same_v<Op, ShiftRight>) i.function = for_integer(type, pick);
  if (!i.function) d.unknown();
  d.need(3);
  i.kind = Kind::kArithmetic;
  i.category = Category::kLogic;
  i.d = d.destination(0, register_bits(type));
  i.a = d.source(1, register_bits(type));
  i.b = d.source(2, 32);
}
// The result has 32 bits, for any source.
void decode_bit_count(Decoding& d, Type type, LaneFunction function) {
  Instruction& i = d.instruction();
  if (!function) d.unknown();
  d.need(2);
  i.kind = Kind::kArithmetic;
  i.category = Category::kInteger;
  i.function = function;
  i.d = d.destination(0, 32);
  i.a = d.source(1, register_bits(type));
}
template <typename Op>
void decode_count(Decoding& d) {
  const Type type = d.take_type();
  decode_bit_count(d, type,
                   type == Type::kB32   ? unary_each<Op, uint32_t, uint32_t>
                   : type == Type::kB64 ? unary_each<Op, uint64_t, uint32_t>
                                        : nullptr);
}
void decode_bfind(Decoding& d) {
  const Type type = d.take_type();
  const auto function = [&](auto shift_amount) -> LaneFunction {
    using Op = FindHighest<decltype(shift_amount)::value>;
    switch (type) {
      case Type::kU32: return unary_each<Op, uint32_t, uint32_t>;
      case Type::kS32: return unary_each<Op, int32_t, uint32_t>;
      case Type::kU64: return unary_each<Op, uint64_t, uint32_t>;
      case Type::kS64: return unary_each<Op, int64_t, uint32_t>;
      default: return nullptr;
    }
  };
  decode_bit_count(d, type,
                   d.take("shiftamt") ? function(std::true_type{}) : function(std::false_type{}));
}
void decode_brev(Decoding& d) {
  const Type type = d.take_type();
  d.arithmetic(for_bits(type, [](auto t) -> LaneFunction { return unary<Reverse, decltype(t)>; }),
               Category::kLogic, register_bits(type), 1);
}
void decode_bfi(Decoding& d) {
  const Type type = d.take_type();
  Instruction& i = d.instruction();
  i.function = type == Type::kB32   ? insert_field<uint32_t>
               : type == Type::kB64 ? insert_field<uint64_t>
                                    : nullptr;
  if (!i.function) d.unknown();
  d.need(5);
  i.kind = Kind::kArithmetic;
  i.category = Category::kLogic;
  i.d = d.destination(0, register_bits(type));
  i.a = d.source(1, register_bits(type));
  i.b = d.source(2, register_bits(type));
  i.c = d.source(3, 32);
  i.e = d.source(4, 32);
}
void decode_bfe(Decoding& d) {
  const Type type = d.take_type();
  Instruction& i = d.instruction();
  i.function =
      bytes_of(type) < 4
          ? nullptr
          : for_integer(type, [](auto t) -> LaneFunction { return extract_field<decltype(t)>; });
  if (!i.function) d.unknown();
  d.need(4);
  i.kind = Kind::kArithmetic;
  i.category = Category::kLogic;
  i.d = d.destination(0, register_bits(type));
  i.a = d.source(1, register_bits(type));
  i.b = d.source(2, 32);
  i.c = d.source(3, 32);
}
void decode_prmt(Decoding& d) {
  d.require("b32");
  d.arithmetic(permute_bytes, Category::kLogic, 32, 3);
}
void decode_lop3(Decoding& d) {
  d.require("b32");
  d.need(5);
  Instruction& i = d.instruction();
  i.kind = Kind::kArithmetic;
  i.category = Category::kLogic;
  i.function = logic3;
  i.d = d.destination(0, 32);
  i.a = d.source(1, 32);
  i.b = d.source(2, 32);
  i.c = d.source(3, 32);
  i.immediate = d.number(4);
}
void decode_shf(Decoding& d) {
  const bool right = d.take_one_of<bool>({{"r", true}, {"l", false}});
  const bool clamp = d.take_one_of<bool>({{"clamp", true}, {"wrap", false}});
  d.require("b32");
  d.arithmetic(right ? (clamp ? funnel_shift<true, true> : funnel_shift<true, false>)
                     : (clamp ? funnel_shift<false, true> : funnel_shift<false, false>),
               Category::kLogic, 32, 3);
}
void decode_dp4a(Decoding& d) {
  const Type b = d.take_type(), a = d.take_type();
  const auto function = [&](auto x) -> LaneFunction {
    using A = decltype(x);
    return b == Type::kS32   ? dot4<A, int8_t>
           : b == Type::kU32 ? dot4<A, uint8_t>
                             : static_cast<LaneFunction>(nullptr);
  };
  d.arithmetic(a == Type::kS32   ? function(int8_t{})
               : a == Type::kU32 ? function(uint8_t{})
                                 : nullptr,
               Category::kInteger, 32, 3);
}
void decode_selp(Decoding& d) {
  const Type type = d.take_type();
  if (bytes_of(type) < 2) d.unknown();
  d.need(4);
  Instruction& i = d.instruction();
  const uint32_t bits = register_bits(type);
  i.kind = Kind::kArithmetic;
  i.category = Category::kInteger;
  i.function = bits == 64 ? select<uint64_t> : select<uint32_t>;
  i.d = d.destination(0, bits);
  i.a = d.source(1, bits);
  i.b = d.source(2, bits);
  i.c = d.predicate(d.operand(3));
}

template <Comparison kComparison>
LaneFunction comparison_function(Type type) {
  const auto pick = [](auto t) -> LaneFunction { return set_comparison<kComparison, decltype(t)>; };
  if (is_float(type)) return for_float(type, pick);
  if constexpr (kComparison <= Comparison::kGreaterEqual) {
    if constexpr (kComparison <= Comparison::kNotEqual) {
      if (const LaneFunction bits = for_bits(type, pick)) return bits;
    }
    return for_integer(type, pick);
  }
  return nullptr;
}
void decode_setp(Decoding& d) {
  const Type type = d.take_type();
  using C = Comparison;
  const auto comparison = d.take_one_of<LaneFunction (*)(Type)>({
      {"eq", comparison_function<C::kEqual>},
      {"ne", comparison_function<C::kNotEqual>},
      {"lt", comparison_function<C::kLess>},
      {"le", comparison_function<C::kLessEqual>},
      {"gt", comparison_function<C::kGreater>},
      {"ge", comparison_function<C::kGreaterEqual>},
      {"equ", comparison_function<C::kEqualUnordered>},
      {"neu", comparison_function<C::kNotEqualUnordered>},
      {"ltu", comparison_function<C::kLessUnordered>},
      {"leu", comparison_function<C::kLessEqualUnordered>},
      {"gtu", comparison_function<C::kGreaterUnordered>},
      {"geu", comparison_function<C::kGreaterEqualUnordered>},
      {"num", comparison_function<C::kNumbers>},
      {"nan", comparison_function<C::kNan>},
      // the names for unsigned integers
      {"lo", comparison_function<C::kLess>},
      {"ls", comparison_function<C::kLessEqual>},
      {"hi", comparison_function<C::kGreater>},
      {"hs", comparison_function<C::kGreaterEqual>},
  });
  Instruction& i = d.instruction();
  i.kind = Kind::kArithmetic;
  i.category = Category::kPredicate;
  i.function = comparison(type);
  if (!i.function) d.unknown();
  i.combine = d.take("and")   ? Logic::kAnd
              : d.take("or")  ? Logic::kOr
              : d.take("xor") ? Logic::kXor
                              : Logic::kNone;
  d.need(i.combine == Logic::kNone ? 3 : 4);
  const Operand& result = d.operand(0);
  if (result.kind == Operand::Kind::kPair) {
    if (result.parts[0].text != "_") i.d = d.predicate(result.parts[0]);
    if (result.parts[1].text != "_") i.d2 = d.predicate(result.parts[1]);
  } else {
    i.d = d.predicate(result);
  }
  i.a = d.source(1, register_bits(type));
  i.b = d.source(2, register_bits(type));
  if (i.combine != Logic::kNone) {
    i.c = d.predicate(d.operand(3));
    i.negate_source = d.operand(3).negated;
  }
}

}  // namespace

const OpcodeTable& arithmetic_opcodes() {
  static const OpcodeTable kTable = {
      {"add", decode_binary<Add>},
      {"sub", decode_binary<Subtract>},
      {"mul", decode_mul},
      {"mad", decode_mad},
      {"fma", decode_fma},
      {"div", decode_div},
      {"rem", decode_rem},
      {"min", decode_extreme<Minimum>},
      {"max", decode_extreme<Maximum>},
      {"neg", decode_neg},
      {"abs", decode_abs},
      {"sqrt", decode_unary_float<SquareRoot>},
      {"rcp", decode_unary_float<Reciprocal>},
      {"ex2", decode_approximation<Exp2>},
      {"lg2", decode_approximation<Log2>},
      {"and", decode_logic<And, Logic::kAnd>},
      {"or", decode_logic<Or, Logic::kOr>},
      {"xor", decode_logic<Xor, Logic::kXor>},
      {"not", decode_logic<Not, Logic::kNot>},
      {"shl", decode_shift<ShiftLeft>},
      {"shr", decode_shift<ShiftRight>},
      {"popc", decode_count<CountOnes>},
      {"clz", decode_count<CountLeadingZeros>},
      {"bfind", decode_bfind},
      {"brev", decode_brev},
      {"bfi", decode_bfi},
      {"bfe", decode_bfe},
      {"prmt", decode_prmt},
      {"lop3", decode_lop3},
      {"shf", decode_shf},
      {"dp4a", decode_dp4a},
      {"selp", decode_selp},
      {"setp", decode_setp},
  };
  return kTable;
}

}  // namespace ptx
