// The Python module ptx_executor: PTX from text, without CUDA.
#include "binding.h"

PYBIND11_MODULE(ptx_executor, m) {
  m.doc() = "Executes PTX on the host, under checkers.";
  ptx::bind_executor(m);
}
