// Decoders of memory instructions.
#include "decoder.h"

namespace ptx {
namespace {

Space take_space(Decoding& d) {
  if (d.take("global")) return Space::kGlobal;
  if (d.take("shared")) {
    d.take("cta");
    return Space::kShared;
  }
  if (d.take("shared::cta")) return Space::kShared;
  if (d.take("param")) return Space::kParameter;
  return Space::kGeneric;  // .local, .const, ... remain, and are refused
}

// The registers of a value or of the elements of a vector. They may be wider than the elements.
void decode_values(Decoding& d, const Operand& value, bool destinations) {
  Instruction& i = d.instruction();
  const bool vector = value.kind == Operand::Kind::kVector;
  const std::vector<Operand> parts = vector ? value.parts : std::vector<Operand>{value};
  if (parts.size() != i.elements || vector != (i.elements > 1)) {
    d.fail("wrong number of elements");
  }
  std::vector<Register> registers;
  for (size_t n = 0; n < parts.size(); ++n) {
    bool wide = i.bytes == 8;
    if (parts[n].kind == Operand::Kind::kNumber) {
      if (destinations) d.fail("a number as destination");
      registers.push_back(d.source(parts[n], wide ? 64 : 32));
    } else {
      const RegisterName found = d.builder().any_register(parts[n], d.line());
      if (wide && found.bank != Bank::k64) d.fail("register " + parts[n].text + " is too narrow");
      wide = found.bank == Bank::k64;
      registers.push_back(static_cast<Register>(found.index));
    }
    if (n && wide != i.wide_values) d.fail("a vector of registers of different widths");
    i.wide_values = wide;
  }
  i.values = d.builder().value_registers(registers);
}

void decode_access(Decoding& d) {
  Instruction& i = d.instruction();
  i.type = d.take_type();
  i.bytes = static_cast<uint8_t>(bytes_of(i.type));
  i.elements = d.take("v2") ? 2 : d.take("v4") ? 4 : 1;
  if (!i.bytes || i.bytes * i.elements > 16) d.unknown();
  i.space = take_space(d);
  d.need(2);
}

void decode_ld(Decoding& d) {
  Instruction& i = d.instruction();
  decode_access(d);
  i.kind = Kind::kLoad;
  i.read_only = i.space == Space::kGlobal && d.take("nc");
  i.category = i.space == Space::kParameter ? Category::kParameterLoad
               : i.space == Space::kShared  ? Category::kSharedLoad
                                            : Category::kGlobalLoad;
  decode_values(d, d.operand(0), true);
  d.address(1);
}

void decode_st(Decoding& d) {
  Instruction& i = d.instruction();
  decode_access(d);
  if (i.space == Space::kParameter) d.unknown();
  i.kind = Kind::kStore;
  i.category = i.space == Space::kShared ? Category::kSharedStore : Category::kGlobalStore;
  d.address(0);
  decode_values(d, d.operand(1), false);
}

// atom returns the old value, red does not. Both are relaxed; the scope has no effect here.
void decode_atomic(Decoding& d) {
  Instruction& i = d.instruction();
  const bool returns = d.opcode() == "atom";
  i.type = d.take_type();
  i.space = take_space(d);
  if (i.space == Space::kParameter) d.unknown();
  const auto operation = d.take_one_of<Atomic>({{"add", Atomic::kAdd},
                                                {"min", Atomic::kMin},
                                                {"max", Atomic::kMax},
                                                {"and", Atomic::kAnd},
                                                {"or", Atomic::kOr},
                                                {"xor", Atomic::kXor},
                                                {"exch", Atomic::kExchange},
                                                {"cas", Atomic::kCompareAndSwap},
                                                {"inc", Atomic::kIncrement},
                                                {"dec", Atomic::kDecrement}});
  d.take("relaxed");
  for (const char* scope : {"cta", "gpu", "sys"}) {
    if (d.take(scope)) break;
  }
  const bool bits = i.type == Type::kB32 || i.type == Type::kB64;
  const bool numbers =
      i.type == Type::kU32 || i.type == Type::kS32 || i.type == Type::kU64 || i.type == Type::kS64;
  const bool is_bitwise = operation == Atomic::kAnd || operation == Atomic::kOr ||
                          operation == Atomic::kXor || operation == Atomic::kExchange ||
                          operation == Atomic::kCompareAndSwap;
  const bool wraps = operation == Atomic::kIncrement || operation == Atomic::kDecrement;
  if (is_bitwise ? !bits : wraps ? i.type != Type::kU32 : !numbers) d.unknown();
  i.kind = Kind::kAtomic;
  i.category = Category::kAtomic;
  i.operation = static_cast<uint8_t>(operation);
  i.bytes = static_cast<uint8_t>(bytes_of(i.type));
  const uint32_t register_width = register_bits(i.type);
  const size_t at = returns ? 1 : 0;
  d.need(at + (operation == Atomic::kCompareAndSwap ? 3 : 2));
  if (returns && d.operand(0).text != "_") i.d = d.destination(0, register_width);
  d.address(at);
  i.b = d.source(at + 1, register_width);
  if (operation == Atomic::kCompareAndSwap) i.c = d.source(at + 2, register_width);
}

void decode_async_copy(Decoding& d) {
  Instruction& i = d.instruction();
  const bool through_l2 = d.take_one_of<bool>({{"cg", true}, {"ca", false}});
  if (!d.take("shared::cta")) d.require("shared");
  d.require("global");
  d.need(3);
  i.kind = Kind::kAsyncCopy;
  i.bytes = static_cast<uint8_t>(d.number(2));
  if (i.bytes != 16 && (through_l2 || (i.bytes != 4 && i.bytes != 8))) {
    d.fail("an asynchronous copy of " + std::to_string(d.number(2)) + " bytes");
  }
  d.address(0);
  bool wide = false;
  i.b = d.builder().address(d.operand(1), &wide, d.line());
  if (!wide) d.fail("a global address that is not a register of 64 bits");
  i.source_offset = static_cast<int32_t>(d.operand(1).offset);
}

void decode_cp(Decoding& d) {
  d.require("async");
  Instruction& i = d.instruction();
  i.category = Category::kAsyncCopy;
  if (d.take("commit_group")) {
    d.need(0);
    i.kind = Kind::kAsyncCommit;
  } else if (d.take("wait_all")) {
    d.need(0);
    i.kind = Kind::kAsyncWait;
    i.wait_all = true;
  } else if (d.take("wait_group")) {
    d.need(1);
    i.kind = Kind::kAsyncWait;
    i.immediate = d.number(0);
  } else {
    decode_async_copy(d);
  }
}

}  // namespace

const OpcodeTable& memory_opcodes() {
  static const OpcodeTable kTable = {
      {"ld", decode_ld},      {"st", decode_st}, {"atom", decode_atomic},
      {"red", decode_atomic}, {"cp", decode_cp},
  };
  return kTable;
}

}  // namespace ptx
