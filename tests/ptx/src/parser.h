// PTX text to a module: directives, declarations, and instructions through the decoder.
#pragma once
#include <memory>
#include <string_view>

#include "ptx.h"

namespace ptx {

// Throws Error, with the line, at the first unknown element.
std::unique_ptr<Module> parse(std::string_view text);

}  // namespace ptx
