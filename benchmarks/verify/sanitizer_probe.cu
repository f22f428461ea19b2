// A faulty kernel in the namespace of this library's kernels: if memcheck finds the error, then
// compute-sanitizer works on this machine and its filter matches these kernels (gpu_check.sh).
#include <cuda_runtime.h>

namespace vispruner::cuda {
namespace {

__global__ void write_past_the_end(int* data, int count) { data[count] = 1; }

}  // namespace
}  // namespace vispruner::cuda

int main() {
  constexpr int kCount = 33;
  int* data = nullptr;
  if (cudaMalloc(&data, kCount * sizeof(int)) != cudaSuccess) return 1;
  vispruner::cuda::write_past_the_end<<<1, 1>>>(data, kCount);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 2;
}
