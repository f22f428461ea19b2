#include "ptx.h"

namespace ptx {
namespace {

struct NamedType {
  const char* name;
  Type type;
  uint32_t bytes;
};
constexpr NamedType kTypes[] = {
    {"b8", Type::kB8, 1},   {"b16", Type::kB16, 2},        {"b32", Type::kB32, 4},
    {"b64", Type::kB64, 8}, {"u8", Type::kU8, 1},          {"s8", Type::kS8, 1},
    {"u16", Type::kU16, 2}, {"s16", Type::kS16, 2},        {"u32", Type::kU32, 4},
    {"s32", Type::kS32, 4}, {"u64", Type::kU64, 8},        {"s64", Type::kS64, 8},
    {"f16", Type::kF16, 2}, {"bf16", Type::kBF16, 2},      {"f32", Type::kF32, 4},
    {"f64", Type::kF64, 8}, {"pred", Type::kPredicate, 0},
};

std::string file_name(const Kernel& kernel, uint32_t file) {
  const auto found = kernel.files->find(file);
  return found == kernel.files->end() ? "?" : found->second;
}

}  // namespace

uint32_t bytes_of(Type type) {
  for (const NamedType& t : kTypes) {
    if (t.type == type) return t.bytes;
  }
  return 0;
}

bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

Type type_named(const std::string& name) {
  for (const NamedType& t : kTypes) {
    if (name == t.name) return t.type;
  }
  return Type::kNone;
}

const char* name_of(Category category) {
  static const char* const kNames[] = {
      "int",  "logic",    "mov",      "pred",      "cvt",       "fp32",      "fp64",
      "sfu",  "bra",      "ld.param", "ld.global", "st.global", "ld.shared", "st.shared",
      "atom", "cp.async", "ldmatrix", "mma",       "warp sync", "bar",       "other"};
  static_assert(sizeof kNames / sizeof *kNames == static_cast<size_t>(Category::kCount), "");
  return kNames[static_cast<size_t>(category)];
}

std::string Kernel::where(uint32_t pc) const {
  const Place& place = places[pc];
  std::string text = file_name(*this, place.file) + ":" + std::to_string(place.line);
  if (place.outer_line) {
    text += " (inlined at " + file_name(*this, place.outer_file) + ":" +
            std::to_string(place.outer_line) + ")";
  }
  return text + ", PTX line " + std::to_string(place.ptx_line) + " `" + place.text + "`";
}

std::string Kernel::source_line(uint32_t pc) const {
  const Place& place = places[pc];
  std::string text = file_name(*this, place.file) + ":" + std::to_string(place.line);
  if (place.outer_line) {
    text += " < " + file_name(*this, place.outer_file) + ":" + std::to_string(place.outer_line);
  }
  return text;
}

}  // namespace ptx
