// Numbers for the names of a kernel: registers, constants, parameters, labels, shared variables.
#pragma once
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ptx.h"
#include "statement.h"

namespace ptx {

enum class Bank : uint8_t { k32, k64, kPredicate };  // registers of 16 bits are in k32
struct RegisterName {
  Bank bank;
  uint32_t index;
};

class KernelBuilder {
 public:
  KernelBuilder(Kernel& kernel, std::vector<SharedVariable> module_shared);

  // Every error of this kernel: "PTX line n: text in kernel".
  [[noreturn]] void fail(uint32_t line, const std::string& text) const;

  // ---- declarations, for the parser
  void open_scope() { scopes_.emplace_back(); }
  void close_scope() { scopes_.pop_back(); }
  void declare_register(const std::string& name, Type type);
  void declare_registers(const std::string& prefix, Type type, uint32_t count);  // %r<count>
  void declare_parameter(const std::string& name, uint32_t alignment, uint32_t bytes);
  void declare_shared(SharedVariable variable) { kernel_.shared.push_back(std::move(variable)); }
  void declare_label(const std::string& name, uint32_t line);
  void add(const Instruction& instruction, Place place);
  // Once everything is declared: addresses of shared variables, targets of branches.
  void finish(uint32_t line);

  // ---- look-ups, for the decoder; `bits` is 16, 32 or 64
  Register destination(const Operand& operand, uint32_t bits, uint32_t line);
  Register source(const Operand& operand, uint32_t bits, uint32_t line);
  Register predicate(const Operand& operand, uint32_t line);  // or a constant
  // A register of any width, as the values of loads, stores and conversions may be wider.
  RegisterName any_register(const Operand& operand, uint32_t line) const;
  // Base register or symbol of an address; whether it has 64 bits.
  Register address(const Operand& operand, bool* wide, uint32_t line);
  int64_t number(const Operand& operand, uint32_t line) const;
  void branch_to(const std::string& label);  // of the next instruction
  uint32_t value_registers(const std::vector<Register>& registers);

 private:
  struct Scope {
    std::unordered_map<std::string, RegisterName> registers;
    std::unordered_map<std::string, std::pair<RegisterName, uint32_t>> ranges;  // by prefix
  };

  uint32_t allocate(Bank bank, uint32_t count);
  bool find_register(const std::string& name, RegisterName* found) const;
  Register constant(uint64_t value, uint32_t bits);
  Register special_register(const std::string& name, uint32_t line);
  Register symbol(const std::string& name, uint32_t bits, uint32_t line);
  void lay_out_shared();

  Kernel& kernel_;
  std::vector<Scope> scopes_;
  std::unordered_map<std::string, uint32_t> parameters_, labels_;
  std::vector<std::pair<uint32_t, std::string>> branches_;
  std::unordered_map<std::string, Register> specials_;
  std::map<uint32_t, Register> constants32_;
  std::map<uint64_t, Register> constants64_;
  struct SharedAddress {
    size_t constant;
    bool wide;
    std::string variable;
  };
  std::vector<SharedAddress> shared_addresses_;
};

Bank bank_of(Type type);
// The value of "12", "0x1F", "-3", "0f3F800000" or "0d3FF0000000000000"; false: not a number.
bool parse_number(const std::string& text, uint64_t* value);

}  // namespace ptx
