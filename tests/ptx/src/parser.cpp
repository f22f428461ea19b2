#include "parser.h"

#include <cxxabi.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "decoder.h"
#include "error.h"
#include "kernel_builder.h"
#include "lexer.h"
#include "static_checks.h"

namespace ptx {
namespace {

// The newest PTX that the project's kernels have been run from.
constexpr uint64_t kNewestMajor = 9, kNewestMinor = 5;

// A readable form of a mangled name: without "void", namespaces of the project and parameters.
std::string pretty_name(const std::string& mangled) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = demangled ? demangled : mangled;
  std::free(demangled);
  for (const char* noise : {"vispruner::cuda::", "(anonymous namespace)::", "vispruner::"}) {
    for (size_t at; (at = name.find(noise)) != std::string::npos;) {
      name.erase(at, std::strlen(noise));
    }
  }
  if (name.compare(0, 5, "void ") == 0) name.erase(0, 5);
  int depth = 0;
  for (size_t at = 0; at < name.size(); ++at) {
    depth += name[at] == '<' ? 1 : name[at] == '>' ? -1 : 0;
    if (name[at] == '(' && depth == 0) {
      name.resize(at);
      break;
    }
  }
  return name;
}

// One line, and the long names of symbols by their ends.
std::string shortened(std::string_view text) {
  constexpr size_t kLongest = 60, kKept = 24;
  std::string result, word;
  const auto flush = [&] {
    result += word.size() > kLongest ? "..." + word.substr(word.size() - kKept) : word;
    word.clear();
  };
  for (const char c : text) {
    if (std::isalnum(static_cast<unsigned char>(c)) || c == '_') {
      word += c;
      continue;
    }
    flush();
    const bool space = std::isspace(static_cast<unsigned char>(c));
    if (!space || (!result.empty() && result.back() != ' ')) result += space ? ' ' : c;
  }
  flush();
  return result;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text), tokens_(tokenize(text)) {}

  std::unique_ptr<Module> run() {
    version();
    while (peek().kind != Token::Kind::kEnd) top_level();
    // At the end, because the names of the files may come last.
    for (auto& [name, kernel] : module_->kernels) check_statically(*kernel);
    return std::move(module_);
  }

 private:
  const Token& peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  Token next() {
    const Token token = peek();
    if (token.kind != Token::Kind::kEnd) ++at_;
    return token;
  }
  bool is(std::string_view text) const {
    return peek().text == text && peek().kind != Token::Kind::kString;
  }
  bool accept(std::string_view text) {
    if (!is(text)) return false;
    next();
    return true;
  }
  [[noreturn]] void fail(const std::string& text) const {
    throw Error("PTX line " + std::to_string(peek().line) + ": " + text +
                (kernel_ ? " in " + kernel_->pretty_name : ""));
  }
  void expect(std::string_view text) {
    if (!accept(text)) {
      fail("expected " + std::string(text) + ", found " + std::string(peek().text));
    }
  }
  std::string word() {
    if (peek().kind != Token::Kind::kWord) {
      fail("expected a name, found " + std::string(peek().text));
    }
    return std::string(next().text);
  }
  uint32_t count() {
    uint64_t value = 0;
    if (peek().kind != Token::Kind::kWord || !parse_number(std::string(peek().text), &value) ||
        value > UINT32_MAX) {
      fail("expected a number, found " + std::string(peek().text));
    }
    next();
    return static_cast<uint32_t>(value);
  }
  Type type() {
    const Type found = is(".") ? Type::kNone : type_named(std::string(peek().text.substr(1)));
    if (peek().text[0] != '.' || found == Type::kNone) {
      fail("unknown type or attribute " + std::string(peek().text));
    }
    next();
    return found;
  }
  bool more_attributes() const {
    return peek().kind == Token::Kind::kWord && peek().text[0] == '.';
  }

  void version() {
    if (!accept(".version")) fail("this is not PTX: it does not begin with .version");
    const std::string number = word();
    const size_t dot = number.find('.');
    uint64_t major = 0, minor = 0;
    if (dot == std::string::npos || !parse_number(number.substr(0, dot), &major) ||
        !parse_number(number.substr(dot + 1), &minor)) {
      fail("bad .version " + number);
    }
    if (major > kNewestMajor || (major == kNewestMajor && minor > kNewestMinor)) {
      fail("PTX .version " + number + " is newer than " + std::to_string(kNewestMajor) + "." +
           std::to_string(kNewestMinor) + ", the newest that the executor has been tested with");
    }
  }

  void top_level() {
    if (accept(".target")) {
      target();
    } else if (accept(".address_size")) {
      if (count() != 64) fail("only .address_size 64 is known");
    } else if (accept(".file")) {
      file();
    } else if (accept(".section")) {
      section();
    } else if (accept(".visible") || accept(".weak")) {
      if (!is(".entry")) fail("unknown directive " + std::string(peek().text));
    } else if (accept(".extern")) {
      if (!is(".shared")) fail("unknown directive .extern " + std::string(peek().text));
      module_shared_.push_back(shared_variable());
      if (module_shared_.back().bytes) fail("an .extern .shared variable with a size");
      module_shared_.back().dynamic = true;
    } else if (accept(".entry")) {
      entry();
    } else {
      fail("unknown directive " + std::string(peek().text));
    }
  }

  void target() {
    const std::string name = word();
    uint64_t number = 0;
    std::string digits = name.substr(0, name.find_last_of("0123456789") + 1);
    if (digits.compare(0, 3, "sm_") != 0 || !parse_number(digits.substr(3), &number)) {
      fail("unknown .target " + name);
    }
    target_ = static_cast<uint32_t>(number);
    if (accept(",") && !accept("debug")) fail("unknown .target option " + word());
  }

  void file() {
    const uint32_t number = count();
    if (peek().kind != Token::Kind::kString) fail("expected the name of a file");
    const std::string_view path = next().text;
    const size_t slash = path.find_last_of('/');
    (*files_)[number] =
        std::string(slash == std::string_view::npos ? path : path.substr(slash + 1));
    while (accept(",")) count();
  }

  void section() {  // debug information
    word();
    expect("{");
    while (!accept("}")) {
      if (peek().kind == Token::Kind::kEnd) fail("a .section without an end");
      next();
    }
  }

  SharedVariable shared_variable() {
    expect(".shared");
    SharedVariable variable;
    while (more_attributes()) {
      if (accept(".align")) {
        variable.alignment = count();
      } else {
        variable.bytes = bytes_of(type());
        variable.alignment = std::max(variable.alignment, variable.bytes);
      }
    }
    variable.name = word();
    if (accept("[")) {
      variable.bytes = is("]") ? 0 : variable.bytes * count();
      expect("]");
    }
    expect(";");
    return variable;
  }

  void entry() {
    auto kernel = std::make_unique<Kernel>();
    kernel_ = kernel.get();
    kernel_->name = word();
    kernel_->pretty_name = pretty_name(kernel_->name);
    kernel_->target = target_;
    builder_ = std::make_unique<KernelBuilder>(*kernel_, module_shared_);
    place_ = {};
    if (accept("(")) parameters();
    while (!is("{")) launch_bound();
    next();
    body();
    builder_->finish(peek().line);
    kernel_->files = files_;
    builder_.reset();
    kernel_ = nullptr;
    const std::string name = kernel->name;
    if (!module_->kernels.emplace(name, std::move(kernel)).second) {
      fail("two kernels are called " + name);
    }
  }

  void parameters() {
    while (!accept(")")) {
      expect(".param");
      uint32_t alignment = 1, bytes = 0;
      while (more_attributes()) {
        if (accept(".align")) {
          alignment = count();
        } else if (accept(".ptr")) {  // describes the pointee
          if (is(".global") || is(".shared") || is(".const") || is(".local")) next();
          if (accept(".align")) count();
        } else {
          bytes = bytes_of(type());
          alignment = std::max(alignment, bytes);
        }
      }
      const std::string name = word();
      if (accept("[")) {
        bytes *= count();
        expect("]");
      }
      if (!bytes) fail("parameter " + name + " without a size");
      builder_->declare_parameter(name, alignment, bytes);
      if (!is(")")) expect(",");
    }
  }

  void launch_bound() {
    if (accept(".maxntid")) {
      uint32_t threads = count();
      while (accept(",")) threads *= count();
      kernel_->max_threads = threads;
    } else if (accept(".reqntid")) {
      kernel_->required_block[0] = count();
      for (int d = 1; d < 3; ++d) kernel_->required_block[d] = accept(",") ? count() : 1;
    } else if (accept(".minnctapersm")) {  // a hint for ptxas
      count();
    } else {
      fail("unknown directive " + std::string(peek().text));
    }
  }

  void body() {
    for (int depth = 1; depth;) {
      if (peek().kind == Token::Kind::kEnd) fail("a kernel without an end");
      if (accept("{")) {
        ++depth;
        builder_->open_scope();
      } else if (accept("}")) {
        --depth;
        builder_->close_scope();
      } else if (accept(".reg")) {
        registers();
      } else if (is(".shared")) {
        builder_->declare_shared(shared_variable());
      } else if (accept(".loc")) {
        location();
      } else if (accept(".pragma")) {
        pragma();
      } else if (peek().kind == Token::Kind::kWord && peek(1).text == ":") {
        const uint32_t line = peek().line;
        builder_->declare_label(word(), line);
        next();
      } else if (more_attributes()) {
        fail("unknown directive " + std::string(peek().text));
      } else {
        instruction();
      }
    }
    // Threads that reach the end of the text.
    Instruction end;
    end.kind = Kind::kExit;
    place_.text = "(end)";
    place_.ptx_line = peek().line;
    builder_->add(end, place_);
  }

  void registers() {
    const Type register_type = type();
    do {
      const std::string name = word();
      if (accept("<")) {
        builder_->declare_registers(name, register_type, count());
        expect(">");
      } else {
        builder_->declare_register(name, register_type);
      }
    } while (accept(","));
    expect(";");
  }

  // .loc file line column [, function_name label, inlined_at file line column]
  void location() {
    const uint32_t ptx_line = peek().line;
    place_ = {};
    place_.file = count();
    place_.line = count();
    count();
    while (peek().line == ptx_line && peek().kind != Token::Kind::kEnd) {
      if (!accept("inlined_at")) {
        next();
        continue;
      }
      place_.outer_file = count();
      place_.outer_line = count();
      count();
    }
  }

  void pragma() {
    const Token name = next();
    if (name.kind != Token::Kind::kString || name.text != "nounroll") {
      fail("unknown .pragma " + std::string(name.text));
    }
    expect(";");
  }

  void instruction() {
    const char* begin = peek().text.data();
    Statement statement;
    statement.line = peek().line;
    if (accept("@")) {
      statement.negate_guard = accept("!");
      statement.guard = word();
    }
    statement.opcode = word();
    if (!is(";")) {
      do {
        statement.operands.push_back(operand());
      } while (accept(","));
    }
    const char* end = peek().text.data() + 1;
    expect(";");
    place_.ptx_line = statement.line;
    place_.text = shortened(
        text_.substr(static_cast<size_t>(begin - text_.data()), static_cast<size_t>(end - begin)));
    builder_->add(decode(statement, *builder_), place_);
  }

  Operand operand() {
    Operand result;
    if (accept("!")) {
      result = operand();
      result.negated = true;
      return result;
    }
    if (accept("{")) {
      result.kind = Operand::Kind::kVector;
      do {
        result.parts.push_back(operand());
      } while (accept(","));
      expect("}");
      return result;
    }
    if (accept("[")) {
      result.kind = Operand::Kind::kAddress;
      result.text = word();
      if (is("+") || is("-")) {
        bool minus = false;
        while (is("+") || is("-")) minus ^= next().text == "-";
        uint64_t offset = 0;
        const std::string number = word();
        if (!parse_number(number, &offset)) fail("bad offset " + number);
        result.offset = minus ? -static_cast<int64_t>(offset) : static_cast<int64_t>(offset);
      }
      expect("]");
      return result;
    }
    bool minus = false;
    while (accept("-")) minus = !minus;
    result.text = word();
    if (std::isdigit(static_cast<unsigned char>(result.text[0]))) {
      result.kind = Operand::Kind::kNumber;
      if (minus) result.text.insert(0, 1, '-');
      return result;
    }
    if (minus) fail("a negated register");
    result.kind = result.text[0] == '%' ? Operand::Kind::kRegister : Operand::Kind::kSymbol;
    if (is("+") || is("-")) fail("a symbol with an offset");
    if (!accept("|")) return result;
    Operand pair;
    pair.kind = Operand::Kind::kPair;
    pair.parts = {result, operand()};
    return pair;
  }

  std::string_view text_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::unique_ptr<Module> module_ = std::make_unique<Module>();
  std::shared_ptr<FileNames> files_ = std::make_shared<FileNames>();
  std::vector<SharedVariable> module_shared_;
  uint32_t target_ = 0;
  // of the current kernel
  Kernel* kernel_ = nullptr;
  std::unique_ptr<KernelBuilder> builder_;
  Place place_;
};

}  // namespace

std::unique_ptr<Module> parse(std::string_view text) { return Parser(text).run(); }

}  // namespace ptx
