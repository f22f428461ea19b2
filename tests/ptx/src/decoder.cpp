#include "decoder.h"

namespace ptx {

Decoding::Decoding(const Statement& statement, KernelBuilder& builder)
    : statement_(statement), builder_(builder) {
  const std::string& opcode = statement.opcode;
  for (size_t begin = 0; begin <= opcode.size();) {
    const size_t dot = std::min(opcode.find('.', begin), opcode.size());
    modifiers_.push_back(opcode.substr(begin, dot - begin));
    begin = dot + 1;
  }
  taken_.resize(modifiers_.size());
  taken_[0] = true;
}

void Decoding::fail(const std::string& text) const { builder_.fail(statement_.line, text); }

void Decoding::finish() const {
  for (size_t n = 1; n < modifiers_.size(); ++n) {
    if (!taken_[n]) {
      fail("unknown modifier ." + modifiers_[n] + " of instruction " + statement_.opcode);
    }
  }
}

bool Decoding::take(const std::string& modifier) {
  for (size_t n = 1; n < modifiers_.size(); ++n) {
    if (taken_[n] || modifiers_[n] != modifier) continue;
    taken_[n] = true;
    return true;
  }
  return false;
}

void Decoding::require(const std::string& modifier) {
  if (!take(modifier)) {
    fail("instruction " + statement_.opcode + " without ." + modifier);
  }
}

Type Decoding::take_type() {
  for (size_t n = modifiers_.size(); n-- > 1;) {
    const Type type = type_named(modifiers_[n]);
    if (taken_[n] || type == Type::kNone) continue;
    taken_[n] = true;
    return type;
  }
  unknown();
}

void Decoding::need(size_t operands) const {
  if (operand_count() != operands) {
    fail("instruction " + statement_.opcode + " with " + std::to_string(operand_count()) +
         " operands");
  }
}

void Decoding::arithmetic(LaneFunction function, Category category, uint32_t bits, size_t sources) {
  if (!function) unknown();
  need(sources + 1);
  instruction_.kind = Kind::kArithmetic;
  instruction_.category = category;
  instruction_.function = function;
  instruction_.d = destination(0, bits);
  instruction_.a = source(1, bits);
  if (sources > 1) instruction_.b = source(2, bits);
  if (sources > 2) instruction_.c = source(3, bits);
}

void Decoding::address(size_t n) {
  instruction_.a = builder_.address(operand(n), &instruction_.wide_address, statement_.line);
  instruction_.immediate = operand(n).offset;
}

Instruction decode(const Statement& statement, KernelBuilder& builder) {
  Decoding decoding(statement, builder);
  DecodeFunction function = nullptr;
  for (const OpcodeTable* table : {&arithmetic_opcodes(), &conversion_opcodes(), &memory_opcodes(),
                                   &synchronization_opcodes()}) {
    if (const auto found = table->find(decoding.opcode()); found != table->end()) {
      function = found->second;
    }
  }
  if (!function) decoding.unknown();
  function(decoding);
  decoding.finish();
  Instruction instruction = decoding.instruction();
  if (!statement.guard.empty()) {
    Operand guard;
    guard.kind = Operand::Kind::kRegister;
    guard.text = statement.guard;
    instruction.guard = builder.predicate(guard, statement.line);
    instruction.negate_guard = statement.negate_guard;
  }
  return instruction;
}

}  // namespace ptx
