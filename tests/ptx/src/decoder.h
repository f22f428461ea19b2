// Statements to instructions: opcodes, modifiers and operands.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernel_builder.h"
#include "ptx.h"
#include "statement.h"

namespace ptx {

// Throws an error with name and line for every unknown opcode, modifier and operand.
Instruction decode(const Statement& statement, KernelBuilder& builder);

// One statement being decoded. The functions of opcodes take the modifiers that they support, in
// any order; a remaining one is an error.
class Decoding {
 public:
  Decoding(const Statement& statement, KernelBuilder& builder);

  const std::string& opcode() const { return modifiers_[0]; }  // without modifiers
  Instruction& instruction() { return instruction_; }
  KernelBuilder& builder() { return builder_; }

  [[noreturn]] void fail(const std::string& text) const;
  [[noreturn]] void unknown() const { fail("unknown instruction " + statement_.opcode); }
  void finish() const;

  // ---- modifiers
  bool take(const std::string& modifier);
  void require(const std::string& modifier);
  Type take_type();  // the last type in the name
  template <typename T>
  T take_one_of(const std::vector<std::pair<const char*, T>>& choices) {
    for (const auto& [name, value] : choices) {
      if (take(name)) return value;
    }
    unknown();
  }

  // ---- operands
  size_t operand_count() const { return statement_.operands.size(); }
  void need(size_t operands) const;
  const Operand& operand(size_t n) const { return statement_.operands[n]; }
  Register source(size_t n, uint32_t bits) {
    return builder_.source(operand(n), bits, statement_.line);
  }
  Register source(const Operand& o, uint32_t bits) {
    return builder_.source(o, bits, statement_.line);
  }
  Register destination(size_t n, uint32_t bits) {
    return builder_.destination(operand(n), bits, statement_.line);
  }
  Register destination(const Operand& o, uint32_t bits) {
    return builder_.destination(o, bits, statement_.line);
  }
  Register predicate(const Operand& o) { return builder_.predicate(o, statement_.line); }
  RegisterName any_register(size_t n) const {
    return builder_.any_register(operand(n), statement_.line);
  }
  int64_t number(size_t n) const { return builder_.number(operand(n), statement_.line); }
  // Operands `from` and on as d, a, b, c of an arithmetic instruction.
  void arithmetic(LaneFunction function, Category category, uint32_t bits, size_t sources);
  void address(size_t n);  // into a, immediate, wide_address

  uint32_t line() const { return statement_.line; }

 private:
  const Statement& statement_;
  KernelBuilder& builder_;
  std::vector<std::string> modifiers_;  // the opcode first
  std::vector<bool> taken_;
  Instruction instruction_;
};

inline uint32_t register_bits(Type type) {
  const uint32_t bytes = bytes_of(type);
  return bytes == 8 ? 64 : bytes == 4 ? 32 : 16;
}

using DecodeFunction = void (*)(Decoding&);
using OpcodeTable = std::map<std::string, DecodeFunction>;
const OpcodeTable& arithmetic_opcodes();       // decode_arithmetic.cpp
const OpcodeTable& conversion_opcodes();       // decode_conversions.cpp
const OpcodeTable& memory_opcodes();           // decode_memory.cpp
const OpcodeTable& synchronization_opcodes();  // decode_synchronization.cpp

}  // namespace ptx
