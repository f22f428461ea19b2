// The functions of the CUDA runtime that the project's host code and the objects of nvcc call.
// Launches go to the executor, with the PTX from the objects' fat binaries.
#include <cuda_runtime_api.h>

#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device.h"
#include "fat_binary.h"
#include "launch.h"
#include "parser.h"

namespace {

using ptx::Kernel;
using ptx::log;
using ptx::machine;
using ptx::report_launch;

struct FatBinary {
  const uint8_t* data;
  std::map<uint32_t, std::unique_ptr<ptx::Module>> modules;  // by target, once they are used
};
struct Function {
  FatBinary* binary;
  std::string name;
  std::map<int, int> allowed_shared;  // by device number
};
struct CallConfiguration {  // of a <<<>>> launch
  dim3 grid, block;
  size_t shared_bytes;
};

std::vector<std::unique_ptr<FatBinary>>& binaries() {
  static std::vector<std::unique_ptr<FatBinary>> all;
  return all;
}
std::unordered_map<const void*, Function>& functions() {  // by host function
  static std::unordered_map<const void*, Function> all;
  return all;
}
std::vector<CallConfiguration> configurations;
int selected_device = 0;  // of kDevices
cudaError_t last_error = cudaSuccess;

int device_number() { return ptx::first_device_number() + selected_device; }

// cudaSetDevice(3) is device 3 of the current eight, and cudaGetDevice returns its number.
bool is_device(int number, int* index) {
  *index = number < ptx::kDevices ? number : number - ptx::first_device_number();
  return *index >= 0 && *index < ptx::kDevices;
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t result(int error) { return result(static_cast<cudaError_t>(error)); }

int driver_version() { return ptx::device().driver ? ptx::device().driver : CUDART_VERSION; }

// Records a call. False: it needs a newer driver. A runtime works with every driver of its major
// version (minor version compatibility, CUDA compatibility guide).
bool enter(const char* name) {
  ++log().runtime_calls[name];
  if (driver_version() / 1000 >= CUDART_VERSION / 1000) return true;
  result(cudaErrorInsufficientDriver);
  return false;
}

const Kernel* load(const Function& function, cudaError_t* error) {
  try {
    const auto entries = ptx::read_fat_binary(function.binary->data);
    const ptx::FatEntry& entry =
        ptx::choose_ptx(entries, static_cast<uint32_t>(ptx::device().capability()),
                        static_cast<uint32_t>(ptx::device().newest_ptx));
    auto& module = function.binary->modules[entry.target];
    if (!module) module = ptx::parse(entry.text);
    const auto found = module->kernels.find(function.name);
    if (found != module->kernels.end()) return found->second.get();
    report_launch("the PTX for compute_" + std::to_string(entry.target) + " has no kernel " +
                  function.name);
    *error = cudaErrorInvalidDeviceFunction;
  } catch (const ptx::NoFittingPtx& e) {
    report_launch(e.what());
    *error = cudaErrorNoKernelImageForDevice;
  } catch (const ptx::Error& e) {
    report_launch(e.what());
    *error = cudaErrorInvalidPtx;
  }
  return nullptr;
}

// The kernel of a host function, in the PTX that fits the device; null: with an error.
const Kernel* find_kernel(const void* host, Function** function, cudaError_t* error) {
  const auto found = functions().find(host);
  if (found == functions().end()) {
    *error = cudaErrorInvalidDeviceFunction;
    return nullptr;
  }
  *function = &found->second;
  return load(found->second, error);
}

cudaError_t launch(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                   bool dependent) {
  Function* function = nullptr;
  cudaError_t error = cudaSuccess;
  const Kernel* kernel = find_kernel(host, &function, &error);
  if (!kernel) return result(error);
  ptx::LaunchRequest request;
  request.grid[0] = grid.x;
  request.grid[1] = grid.y;
  request.grid[2] = grid.z;
  request.block[0] = block.x;
  request.block[1] = block.y;
  request.block[2] = block.z;
  request.shared_bytes = shared_bytes;
  request.dependent = dependent;
  const auto allowed = function->allowed_shared.find(device_number());
  if (allowed != function->allowed_shared.end()) request.allowed_shared = allowed->second;
  std::vector<uint8_t> parameters(kernel->parameter_bytes);
  for (size_t n = 0; n < kernel->parameters.size(); ++n) {
    const ptx::Parameter& parameter = kernel->parameters[n];
    std::memcpy(&parameters[parameter.offset], arguments[n], parameter.bytes);
  }
  return result(ptx::launch(*kernel, request, parameters));
}

}  // namespace

int ptx::current_device_number() { return device_number(); }

extern "C" {

// ---- registration by nvcc's host code
void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
    void* file;
  };
  auto binary = std::make_unique<FatBinary>();
  binary->data = static_cast<const uint8_t*>(static_cast<const Wrapper*>(wrapper)->data);
  binaries().push_back(std::move(binary));
  return reinterpret_cast<void**>(binaries().back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  functions()[host] = {reinterpret_cast<FatBinary*>(handle), name, {}};
}

// ---- <<<>>>
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void*) {
  configurations.push_back({grid, block, shared_bytes});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  if (configurations.empty()) return result(cudaErrorInvalidConfiguration);
  *grid = configurations.back().grid;
  *block = configurations.back().block;
  *shared_bytes = configurations.back().shared_bytes;
  *static_cast<cudaStream_t*>(stream) = nullptr;
  configurations.pop_back();
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  if (!enter("cudaLaunchKernel")) return cudaErrorInsufficientDriver;
  return launch(host, grid, block, arguments, shared_bytes, false);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host,
                                void** arguments) {
  if (!enter("cudaLaunchKernelExC")) return cudaErrorInsufficientDriver;
  bool dependent = false;
  for (unsigned n = 0; n < config->numAttrs; ++n) {
    const cudaLaunchAttribute& attribute = config->attrs[n];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      dependent = attribute.val.programmaticStreamSerializationAllowed != 0;
    } else {
      report_launch("unknown launch attribute " + std::to_string(attribute.id));
      return result(cudaErrorNotSupported);
    }
  }
  return launch(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                dependent);
}

// ---- devices
cudaError_t cudaDriverGetVersion(int* version) {
  ++log().runtime_calls["cudaDriverGetVersion"];
  *version = driver_version();
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  ++log().runtime_calls["cudaRuntimeGetVersion"];
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  if (!enter("cudaGetDeviceCount")) return cudaErrorInsufficientDriver;
  *count = ptx::kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
  if (!enter("cudaGetDevice")) return cudaErrorInsufficientDriver;
  *number = device_number();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  if (!enter("cudaSetDevice")) return cudaErrorInsufficientDriver;
  int index = 0;
  if (!is_device(number, &index)) return result(cudaErrorInvalidDevice);
  selected_device = index;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (!enter("cudaDeviceGetAttribute")) return cudaErrorInsufficientDriver;
  int index = 0;
  if (!is_device(number, &index)) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = ptx::device().major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = ptx::device().minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = ptx::device().shared_bytes;
      return cudaSuccess;
    default:
      report_launch("unknown device attribute " + std::to_string(attribute));
      return result(cudaErrorInvalidValue);
  }
}

// ---- functions
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  if (!enter("cudaFuncGetAttributes")) return cudaErrorInsufficientDriver;
  Function* function = nullptr;
  cudaError_t error = cudaSuccess;
  const Kernel* kernel = find_kernel(host, &function, &error);
  if (!kernel) return result(error);
  *attributes = {};
  attributes->sharedSizeBytes = kernel->static_shared_bytes;
  attributes->maxThreadsPerBlock = static_cast<int>(kernel->max_threads);
  attributes->ptxVersion = static_cast<int>(kernel->target);
  attributes->binaryVersion = ptx::device().capability();  // the driver compiles the PTX for it
  const auto allowed = function->allowed_shared.find(device_number());
  attributes->maxDynamicSharedSizeBytes =
      allowed != function->allowed_shared.end()
          ? allowed->second
          : 48 * 1024 - static_cast<int>(kernel->static_shared_bytes);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (!enter("cudaFuncSetAttribute")) return cudaErrorInsufficientDriver;
  Function* function = nullptr;
  cudaError_t error = cudaSuccess;
  const Kernel* kernel = find_kernel(host, &function, &error);
  if (!kernel) return result(error);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    report_launch("unknown function attribute " + std::to_string(attribute));
    return result(cudaErrorInvalidValue);
  }
  const int fixed = static_cast<int>(kernel->static_shared_bytes);
  if (value < 0 || value > ptx::device().shared_bytes - fixed) {
    report_launch("cudaFuncSetAttribute of " + kernel->pretty_name + ": " + std::to_string(value) +
                  " bytes and " + std::to_string(fixed) +
                  " static ones are more than the device has");
    return result(cudaErrorInvalidValue);
  }
  function->allowed_shared[device_number()] = value;
  return cudaSuccess;
}

// ---- errors
const char* cudaGetErrorName(cudaError_t error) { return ptx::error_name(error); }
const char* cudaGetErrorString(cudaError_t error) { return ptx::error_text(error); }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

}  // extern "C"
