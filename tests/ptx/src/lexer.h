// PTX text to tokens.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

struct Token {
  enum class Kind : uint8_t { kWord, kPunctuation, kString, kEnd };
  Kind kind;
  std::string_view text;  // into the PTX text
  uint32_t line;
};

// The last token has kind kEnd.
std::vector<Token> tokenize(std::string_view text);

}  // namespace ptx
