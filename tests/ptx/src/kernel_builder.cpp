#include "kernel_builder.h"

#include <algorithm>
#include <cctype>
#include <charconv>

#include "error.h"

namespace ptx {
namespace {

const std::unordered_map<std::string, SpecialRegister>& special_registers() {
  using S = SpecialRegister;
  static const std::unordered_map<std::string, SpecialRegister> kNames = {
      {"%tid.x", S::kThreadX},
      {"%tid.y", S::kThreadY},
      {"%tid.z", S::kThreadZ},
      {"%ntid.x", S::kBlockSizeX},
      {"%ntid.y", S::kBlockSizeY},
      {"%ntid.z", S::kBlockSizeZ},
      {"%ctaid.x", S::kBlockX},
      {"%ctaid.y", S::kBlockY},
      {"%ctaid.z", S::kBlockZ},
      {"%nctaid.x", S::kGridX},
      {"%nctaid.y", S::kGridY},
      {"%nctaid.z", S::kGridZ},
      {"%laneid", S::kLane},
      {"%warpid", S::kWarp},
      {"%lanemask_eq", S::kMaskEqual},
      {"%lanemask_lt", S::kMaskLess},
      {"%lanemask_le", S::kMaskLessEqual},
      {"%lanemask_gt", S::kMaskGreater},
      {"%lanemask_ge", S::kMaskGreaterEqual},
  };
  return kNames;
}

uint32_t align_up(uint32_t value, uint32_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace

Bank bank_of(Type type) {
  if (type == Type::kPredicate) return Bank::kPredicate;
  return bytes_of(type) == 8 ? Bank::k64 : Bank::k32;
}

bool parse_number(const std::string& text, uint64_t* value) {
  const bool negative = !text.empty() && text[0] == '-';
  std::string_view digits(text);
  if (negative) digits.remove_prefix(1);
  int base = 10;
  if (digits.size() > 2 && digits[0] == '0') {
    const char kind = static_cast<char>(std::tolower(static_cast<unsigned char>(digits[1])));
    if (kind == 'x' || kind == 'f' || kind == 'd') base = 16;
    if (kind == 'b') base = 2;
    if (base != 10) digits.remove_prefix(2);
  }
  if (base != 2 && !digits.empty() && (digits.back() == 'U' || digits.back() == 'u')) {
    digits.remove_suffix(1);
  }
  const auto [end, error] =
      std::from_chars(digits.data(), digits.data() + digits.size(), *value, base);
  if (error != std::errc() || end != digits.data() + digits.size()) return false;
  if (negative) *value = ~*value + 1;
  return true;
}

KernelBuilder::KernelBuilder(Kernel& kernel, std::vector<SharedVariable> module_shared)
    : kernel_(kernel), scopes_(1) {
  kernel_.shared = std::move(module_shared);
}

void KernelBuilder::fail(uint32_t line, const std::string& text) const {
  throw Error("PTX line " + std::to_string(line) + ": " + text + " in " + kernel_.pretty_name);
}

uint32_t KernelBuilder::allocate(Bank bank, uint32_t count) {
  uint32_t& used = bank == Bank::k32   ? kernel_.registers32
                   : bank == Bank::k64 ? kernel_.registers64
                                       : kernel_.predicates;
  const uint32_t first = used;
  used += count;
  return first;
}

void KernelBuilder::declare_register(const std::string& name, Type type) {
  const Bank bank = bank_of(type);
  scopes_.back().registers[name] = {bank, allocate(bank, 1)};
}

void KernelBuilder::declare_registers(const std::string& prefix, Type type, uint32_t count) {
  const Bank bank = bank_of(type);
  scopes_.back().ranges[prefix] = {{bank, allocate(bank, count)}, count};
}

void KernelBuilder::declare_parameter(const std::string& name, uint32_t alignment, uint32_t bytes) {
  const uint32_t offset = align_up(kernel_.parameter_bytes, alignment);
  parameters_[name] = offset;
  kernel_.parameters.push_back({offset, bytes});
  kernel_.parameter_bytes = offset + bytes;
}

void KernelBuilder::declare_label(const std::string& name, uint32_t line) {
  const auto pc = static_cast<uint32_t>(kernel_.code.size());
  if (!labels_.emplace(name, pc).second) fail(line, "label " + name + " is defined twice");
}

void KernelBuilder::add(const Instruction& instruction, Place place) {
  kernel_.code.push_back(instruction);
  kernel_.places.push_back(std::move(place));
}

void KernelBuilder::finish(uint32_t line) {
  if (kernel_.code.size() >= 0xffff) fail(line, "more than 65534 instructions");
  for (const auto& [pc, label] : branches_) {
    const auto found = labels_.find(label);
    if (found == labels_.end()) fail(kernel_.places[pc].ptx_line, "unknown label " + label);
    kernel_.code[pc].target = found->second;
  }
  lay_out_shared();
}

// Static variables as they are declared, then the dynamic ones, which all begin at the same
// address.
void KernelBuilder::lay_out_shared() {
  uint32_t end = 0, red_zones = kRedZone, dynamic_alignment = 1;
  for (SharedVariable& variable : kernel_.shared) {
    if (variable.dynamic) {
      dynamic_alignment = std::max(dynamic_alignment, variable.alignment);
      continue;
    }
    end = align_up(end, variable.alignment);
    variable.address = end + red_zones;
    red_zones += kRedZone;
    end += variable.bytes;
  }
  kernel_.static_shared_bytes = end;
  for (SharedVariable& variable : kernel_.shared) {
    if (variable.dynamic) variable.address = align_up(end, dynamic_alignment) + red_zones;
  }
  for (const SharedAddress& use : shared_addresses_) {
    for (const SharedVariable& variable : kernel_.shared) {
      if (variable.name != use.variable) continue;
      if (use.wide) {
        std::fill_n(kernel_.constants64.begin() + static_cast<int64_t>(use.constant), kLanes,
                    uint64_t{variable.address});
      } else {
        std::fill_n(kernel_.constants32.begin() + static_cast<int64_t>(use.constant), kLanes,
                    variable.address);
      }
    }
  }
}

bool KernelBuilder::find_register(const std::string& name, RegisterName* found) const {
  size_t prefix = name.size();
  while (prefix && std::isdigit(static_cast<unsigned char>(name[prefix - 1]))) --prefix;
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (const auto one = scope->registers.find(name); one != scope->registers.end()) {
      *found = one->second;
      return true;
    }
    if (prefix == name.size()) continue;
    const auto range = scope->ranges.find(name.substr(0, prefix));
    uint64_t number;
    if (range == scope->ranges.end() || !parse_number(name.substr(prefix), &number)) continue;
    const auto& [first, count] = range->second;
    if (number >= count) continue;
    *found = {first.bank, first.index + static_cast<uint32_t>(number)};
    return true;
  }
  return false;
}

Register KernelBuilder::constant(uint64_t value, uint32_t bits) {
  if (bits == 64) {
    const auto [found, added] =
        constants64_.emplace(value, ~static_cast<Register>(kernel_.constants64.size() / kLanes));
    if (added) kernel_.constants64.insert(kernel_.constants64.end(), kLanes, value);
    return found->second;
  }
  const auto narrow = static_cast<uint32_t>(bits == 16 ? value & 0xffff : value);
  const auto [found, added] =
      constants32_.emplace(narrow, ~static_cast<Register>(kernel_.constants32.size() / kLanes));
  if (added) kernel_.constants32.insert(kernel_.constants32.end(), kLanes, narrow);
  return found->second;
}

Register KernelBuilder::special_register(const std::string& name, uint32_t line) {
  if (const auto known = specials_.find(name); known != specials_.end()) return known->second;
  const auto found = special_registers().find(name);
  if (found == special_registers().end()) fail(line, "unknown register " + name);
  const uint32_t index = allocate(Bank::k32, 1);
  kernel_.specials.emplace_back(found->second, index);
  return specials_[name] = static_cast<Register>(index);
}

Register KernelBuilder::symbol(const std::string& name, uint32_t bits, uint32_t line) {
  if (const auto found = parameters_.find(name); found != parameters_.end()) {
    return constant(found->second, bits);
  }
  for (const SharedVariable& variable : kernel_.shared) {
    if (variable.name != name) continue;
    // Its address is known when all variables are declared: a constant that finish() fills in.
    const bool wide = bits == 64;
    size_t first;
    if (wide) {
      first = kernel_.constants64.size();
      kernel_.constants64.insert(kernel_.constants64.end(), kLanes, 0);
    } else {
      first = kernel_.constants32.size();
      kernel_.constants32.insert(kernel_.constants32.end(), kLanes, 0);
    }
    shared_addresses_.push_back({first, wide, name});
    return ~static_cast<Register>(first / kLanes);
  }
  fail(line, "unknown symbol " + name);
}

Register KernelBuilder::source(const Operand& operand, uint32_t bits, uint32_t line) {
  switch (operand.kind) {
    case Operand::Kind::kNumber: {
      uint64_t value = 0;
      if (!parse_number(operand.text, &value)) fail(line, "bad number " + operand.text);
      return constant(value, bits);
    }
    case Operand::Kind::kSymbol:
    case Operand::Kind::kRegister: {
      RegisterName found;
      if (find_register(operand.text, &found)) {
        if (found.bank != (bits == 64 ? Bank::k64 : Bank::k32)) {
          fail(line, "register " + operand.text + " has another width than the instruction");
        }
        return static_cast<Register>(found.index);
      }
      if (operand.kind == Operand::Kind::kSymbol) return symbol(operand.text, bits, line);
      if (bits == 64) fail(line, "unknown register of 64 bits " + operand.text);
      return special_register(operand.text, line);
    }
    default: fail(line, "an operand of the wrong kind");
  }
}

Register KernelBuilder::destination(const Operand& operand, uint32_t bits, uint32_t line) {
  RegisterName found;
  if (!find_register(operand.text, &found)) {
    fail(line, "unknown destination " + operand.text);
  }
  if (found.bank != (bits == 64 ? Bank::k64 : Bank::k32)) {
    fail(line, "register " + operand.text + " has another width than the instruction");
  }
  return static_cast<Register>(found.index);
}

Register KernelBuilder::predicate(const Operand& operand, uint32_t line) {
  if (operand.kind == Operand::Kind::kNumber) {
    kernel_.predicate_constants.push_back(number(operand, line) ? kAllLanes : 0);
    return ~static_cast<Register>(kernel_.predicate_constants.size() - 1);
  }
  RegisterName found;
  if (!find_register(operand.text, &found) || found.bank != Bank::kPredicate) {
    fail(line, "unknown predicate " + operand.text);
  }
  return static_cast<Register>(found.index);
}

RegisterName KernelBuilder::any_register(const Operand& operand, uint32_t line) const {
  RegisterName found;
  if (!find_register(operand.text, &found) || found.bank == Bank::kPredicate) {
    fail(line, "unknown register " + operand.text);
  }
  return found;
}

Register KernelBuilder::address(const Operand& operand, bool* wide, uint32_t line) {
  if (operand.kind != Operand::Kind::kAddress) fail(line, "expected an address in []");
  RegisterName found;
  if (find_register(operand.text, &found) && found.bank != Bank::kPredicate) {
    *wide = found.bank == Bank::k64;
    return static_cast<Register>(found.index);
  }
  *wide = false;
  uint64_t absolute;
  if (parse_number(operand.text, &absolute)) return constant(absolute, 32);
  return symbol(operand.text, 32, line);
}

int64_t KernelBuilder::number(const Operand& operand, uint32_t line) const {
  uint64_t value = 0;
  if (operand.kind != Operand::Kind::kNumber || !parse_number(operand.text, &value)) {
    fail(line, "expected a number instead of " + operand.text);
  }
  return static_cast<int64_t>(value);
}

void KernelBuilder::branch_to(const std::string& label) {
  branches_.emplace_back(static_cast<uint32_t>(kernel_.code.size()), label);
}

uint32_t KernelBuilder::value_registers(const std::vector<Register>& registers) {
  const auto first = static_cast<uint32_t>(kernel_.value_registers.size());
  kernel_.value_registers.insert(kernel_.value_registers.end(), registers.begin(), registers.end());
  return first;
}

}  // namespace ptx
