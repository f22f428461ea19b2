// Findings of the checkers, each place once.
#pragma once
#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ptx.h"

namespace ptx {

class Findings {
 public:
  void add(const std::string& kind, const std::string& text) {
    texts_.push_back("[" + kind + "] " + text);
  }
  // Whether this is the first one of its kind at this instruction.
  bool is_new(const char* kind, const Kernel& kernel, uint32_t pc) {
    return seen_.emplace(kind, &kernel, pc).second;
  }
  std::vector<std::string> take() {
    seen_.clear();
    return std::exchange(texts_, {});
  }

 private:
  std::vector<std::string> texts_;
  std::set<std::tuple<std::string, const Kernel*, uint32_t>> seen_;
};

// Reports findings of one launch.
class Reporter {
 public:
  Reporter(Findings& findings, const Kernel& kernel) : findings_(findings), kernel_(kernel) {}

  void begin_block(uint32_t block) { block_ = block; }
  const Kernel& kernel() const { return kernel_; }

  // `text` is a function: most findings are of a place that has been reported already.
  template <typename F>
  void report(const char* kind, uint32_t pc, uint32_t thread, const F& text) {
    if (!findings_.is_new(kind, kernel_, pc)) return;
    findings_.add(kind, kernel_.pretty_name + " at " + kernel_.where(pc) + ", block " +
                            std::to_string(block_) + ", thread " + std::to_string(thread) + ": " +
                            text());
  }

 private:
  Findings& findings_;
  const Kernel& kernel_;
  uint32_t block_ = 0;
};

}  // namespace ptx
