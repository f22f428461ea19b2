// Errors of the input: text that is not PTX, unknown PTX, misused binding functions.
#pragma once
#include <stdexcept>
#include <string>

namespace ptx {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace ptx
