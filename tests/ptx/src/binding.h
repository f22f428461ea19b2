// The executor's Python functions, part of both modules.
#pragma once
#include <pybind11/pybind11.h>

namespace ptx { void bind_executor(pybind11::module_& module); }  // namespace ptx
