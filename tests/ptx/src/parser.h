// PTX text to a module: directives, declarations, and instructions by way of the decoder.
#pragma once
#include <memory>
#include <string_view>

#include "ptx.h"

namespace ptx {

// Throws Error, with the line, at the first thing that it does not know.
std::unique_ptr<Module> parse(std::string_view text);

}  // namespace ptx
