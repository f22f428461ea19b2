// An instruction as written, passed from the parser to the decoder.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct Operand {
  enum class Kind : uint8_t { kRegister, kNumber, kAddress, kVector, kPair, kSymbol };
  Kind kind = Kind::kSymbol;
  std::string text;            // name of the register or symbol (also of an address), or a number
  int64_t offset = 0;          // of an address
  std::vector<Operand> parts;  // of a vector {a, b} or a pair a|b
  bool negated = false;        // !p
};

struct Statement {
  std::string guard;  // empty: none
  bool negate_guard = false;
  std::string opcode;
  std::vector<Operand> operands;
  uint32_t line = 0;
};

}  // namespace ptx
