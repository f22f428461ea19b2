#include "lexer.h"

#include <cctype>

#include "error.h"

namespace ptx {
namespace {

bool in_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

}  // namespace

std::vector<Token> tokenize(std::string_view text) {
  std::vector<Token> tokens;
  uint32_t line = 1;
  size_t at = 0;
  const auto fail = [&](const std::string& what) {
    throw Error("PTX line " + std::to_string(line) + ": " + what);
  };
  while (at < text.size() && text[at] != '\0') {
    const char c = text[at];
    if (c == '\n') {
      ++line;
      ++at;
    } else if (std::isspace(static_cast<unsigned char>(c))) {
      ++at;
    } else if (text.compare(at, 2, "//") == 0) {
      while (at < text.size() && text[at] != '\n') ++at;
    } else if (text.compare(at, 2, "/*") == 0) {
      const size_t end = text.find("*/", at + 2);
      if (end == std::string_view::npos) fail("a comment without an end");
      for (; at < end + 2; ++at) line += text[at] == '\n';
    } else if (c == '"') {
      const size_t end = text.find('"', at + 1);
      if (end == std::string_view::npos) fail("a string without an end");
      tokens.push_back({Token::Kind::kString, text.substr(at + 1, end - at - 1), line});
      at = end + 1;
    } else if (in_word(c)) {
      size_t end = at;
      // "::" belongs to modifiers such as .L1::no_allocate.
      while (end < text.size() && (in_word(text[end]) || text.compare(end, 2, "::") == 0)) {
        end += text[end] == ':' ? 2 : 1;
      }
      tokens.push_back({Token::Kind::kWord, text.substr(at, end - at), line});
      at = end;
    } else if (std::ispunct(static_cast<unsigned char>(c))) {
      tokens.push_back({Token::Kind::kPunctuation, text.substr(at, 1), line});
      ++at;
    } else {
      fail("this is not PTX: a character of code " + std::to_string(static_cast<unsigned char>(c)));
    }
  }
  tokens.push_back({Token::Kind::kEnd, "the end of the text", line});
  return tokens;
}

}  // namespace ptx
