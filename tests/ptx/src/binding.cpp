#include "binding.h"

#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "executor.h"
#include "fat_binary.h"
#include "launch.h"
#include "parser.h"

namespace py = pybind11;

namespace ptx {
namespace {

// ---- options and devices
void configure(const py::kwargs& given) {
  Options options;
  const auto set = [](auto& option, const py::handle& value) {
    option = value.cast<std::decay_t<decltype(option)>>();
  };
  for (const auto& [key, value] : given) {
    const auto name = key.cast<std::string>();
    if (name == "seed") {
      set(options.seed, value);
    } else if (name == "lockstep") {
      set(options.lockstep, value);
    } else if (name == "quantum") {
      set(options.quantum, value);
    } else if (name == "strict") {
      set(options.strict, value);
    } else if (name == "races") {
      set(options.races, value);
    } else if (name == "global_races") {
      set(options.global_races, value);
    } else if (name == "initialized") {
      set(options.initialized, value);
    } else if (name == "land_early") {
      set(options.land_early, value);
    } else if (name == "profile") {
      set(options.profile, value);
    } else if (name == "step_limit") {
      set(options.step_limit, value);
    } else {
      throw py::type_error("unknown option " + name +
                           "; known are seed, lockstep, quantum, strict, races, global_races, "
                           "initialized, land_early, profile, step_limit");
    }
  }
  machine().options = options;
}

void choose_device(int major, int minor, int shared_bytes, std::optional<int> driver,
                   std::optional<int> newest_ptx) {
  set_device({major, minor, shared_bytes, driver.value_or(0), newest_ptx.value_or(0)});
}

// ---- memory
void add_memory(const std::string& name, uint64_t address, uint64_t bytes, bool writable,
                bool initialized) {
  if (!bytes) return;
  machine().memory.add(name, address, reinterpret_cast<uint8_t*>(address), bytes, writable,
                       initialized);
}
std::vector<std::string> check_outputs() {
  std::vector<std::string> missing = missing_outputs(machine().memory);
  for (const std::string& text : missing) machine().findings.add("output", text);
  return missing;
}

// ---- kernels from text
struct Loaded {
  std::vector<std::unique_ptr<Module>> modules;  // counters and findings refer to their kernels
};
Loaded& loaded() {
  static Loaded one;
  return one;
}
std::vector<std::string> load_ptx(const std::string& text) {
  loaded().modules.push_back(parse(text));
  std::vector<std::string> names;
  for (const auto& [name, kernel] : loaded().modules.back()->kernels) names.push_back(name);
  return names;
}
std::vector<std::string> load_fat_binary(const py::bytes& bytes) {
  const std::string data = bytes;
  const auto entries = read_fat_binary(reinterpret_cast<const uint8_t*>(data.data()));
  return load_ptx(std::string(choose_ptx(entries, static_cast<uint32_t>(device().capability()),
                                         static_cast<uint32_t>(device().newest_ptx))
                                  .text));
}

void pack(const py::handle& value, const Parameter& parameter, uint8_t* to) {
  if (py::isinstance<py::bytes>(value)) {
    const std::string data = value.cast<std::string>();
    if (data.size() != parameter.bytes) throw py::value_error("an argument of another size");
    std::memcpy(to, data.data(), data.size());
  } else if (py::isinstance<py::float_>(value)) {
    const auto wide = value.cast<double>();
    const auto narrow = static_cast<float>(wide);
    if (parameter.bytes == 8) {
      std::memcpy(to, &wide, 8);
    } else if (parameter.bytes == 4) {
      std::memcpy(to, &narrow, 4);
    } else {
      throw py::value_error("a float for a parameter that has neither 4 nor 8 bytes");
    }
  } else {
    if (parameter.bytes > 8) throw py::value_error("a number for a structure");
    const uint64_t number = py::cast<py::int_>(value) < py::int_(0)
                                ? static_cast<uint64_t>(value.cast<int64_t>())
                                : value.cast<uint64_t>();
    std::memcpy(to, &number, parameter.bytes);
  }
}

// Raises RuntimeError with the name of the CUDA error.
void launch_loaded(const std::string& name, const std::array<uint32_t, 3>& grid,
                   const std::array<uint32_t, 3>& block, uint64_t shared_bytes,
                   const py::sequence& arguments, bool dependent, int64_t allowed_shared) {
  const Kernel* kernel = nullptr;
  if (!loaded().modules.empty()) {
    const auto& kernels = loaded().modules.back()->kernels;
    if (const auto found = kernels.find(name); found != kernels.end()) {
      kernel = found->second.get();
    }
  }
  if (!kernel) throw py::value_error("no kernel " + name + " in the PTX that was loaded last");
  if (arguments.size() != kernel->parameters.size()) {
    throw py::value_error("kernel " + name + " has " + std::to_string(kernel->parameters.size()) +
                          " parameters");
  }
  std::vector<uint8_t> parameters(kernel->parameter_bytes);
  for (size_t n = 0; n < kernel->parameters.size(); ++n) {
    pack(arguments[n], kernel->parameters[n], &parameters[kernel->parameters[n].offset]);
  }
  LaunchRequest request;
  std::copy(grid.begin(), grid.end(), request.grid);
  std::copy(block.begin(), block.end(), request.block);
  request.shared_bytes = shared_bytes;
  request.dependent = dependent;
  request.allowed_shared = allowed_shared;
  if (const int error = launch(*kernel, request, parameters)) {
    throw std::runtime_error(std::string(error_name(error)) + ": " + error_text(error));
  }
}

// ---- logs and counters
py::tuple triple(const uint32_t (&of)[3]) { return py::make_tuple(of[0], of[1], of[2]); }

py::list take_launches() {
  py::list launches;
  for (const LaunchRecord& record : std::exchange(log().launches, {})) {
    py::dict launch;
    launch["kernel"] = record.kernel;
    launch["grid"] = triple(record.request.grid);
    launch["block"] = triple(record.request.block);
    launch["shared_bytes"] = record.request.shared_bytes;
    launch["dependent"] = record.request.dependent;
    launch["ptx"] = record.target;
    launches.append(launch);
  }
  return launches;
}

void add_traffic(py::dict& to, const std::string& name, const Traffic& traffic, const char* unit) {
  const auto set = [&](const char* what, uint64_t value) {
    to[py::str(name + "_" + what)] = value;
  };
  set("requests", traffic.requests);
  set(unit, traffic.actual);
  set("ideal", traffic.ideal);
  set("bytes", traffic.bytes);
}

py::dict counters_of(const Kernel& kernel, const Counters& c) {
  py::dict result;
  result["launches"] = c.launches;
  result["blocks"] = c.blocks;
  result["threads"] = c.threads;
  result["static_shared"] = c.static_shared;
  result["dynamic_shared"] = c.dynamic_shared;
  result["longest_block"] = c.longest_block;

  uint64_t warps = 0, threads = 0;
  std::map<std::string, uint64_t> warps_by_category, threads_by_category, lines;
  std::vector<uint64_t> executed;
  for (size_t pc = 0; pc < c.executed.size(); ++pc) {
    const Counters::Executed& count = c.executed[pc];
    executed.push_back(count.warps);
    warps += count.warps;
    threads += count.threads;
    const char* category = name_of(kernel.code[pc].category);
    warps_by_category[category] += count.warps;
    threads_by_category[category] += count.threads;
    if (count.warps) lines[kernel.source_line(static_cast<uint32_t>(pc))] += count.warps;
  }
  result["warp_instructions"] = warps;
  result["thread_instructions"] = threads;
  result["warp"] = warps_by_category;
  result["thread"] = threads_by_category;
  result["executed"] = executed;
  result["lines"] = lines;

  result["branches"] = c.branches;
  result["divergent_branches"] = c.divergent_branches;
  result["barriers"] = c.barriers;
  result["warp_syncs"] = c.warp_syncs;
  add_traffic(result, "shared", c.shared, "wavefronts");
  add_traffic(result, "matrix", c.matrix, "wavefronts");
  add_traffic(result, "atomic", c.atomic, "serial");
  add_traffic(result, "load", c.load, "sectors");
  add_traffic(result, "store", c.store, "sectors");
  add_traffic(result, "async", c.async_global, "sectors");
  add_traffic(result, "async_shared", c.async_shared, "wavefronts");
  py::dict spots;
  for (const auto& [pc, traffic] : c.by_instruction) {
    spots[py::int_(pc)] = py::make_tuple(traffic.requests, traffic.actual, traffic.ideal);
  }
  result["spots"] = spots;
  return result;
}

const Kernel& counted_kernel(const std::string& name) {
  const auto found = machine().kernels.find(name);
  if (found == machine().kernels.end()) throw py::key_error("no launch of kernel " + name);
  return *found->second;
}

py::dict counters() {
  py::dict result;
  for (const auto& [name, c] : machine().counters) {
    result[py::str(name)] = counters_of(counted_kernel(name), c);
  }
  return result;
}
std::string where(const std::string& name, uint32_t pc) {
  const Kernel& kernel = counted_kernel(name);
  if (pc >= kernel.code.size()) throw py::index_error("no such instruction");
  return kernel.source_line(pc) + "  " + kernel.places[pc].text;
}
std::vector<std::string> lines(const std::string& name) {
  const Kernel& kernel = counted_kernel(name);
  std::vector<std::string> result;
  for (uint32_t pc = 0; pc < kernel.code.size(); ++pc) result.push_back(kernel.source_line(pc));
  return result;
}

}  // namespace

void bind_executor(py::module_& m) {
  m.def("configure", &configure);
  m.def("set_device", &choose_device, py::arg("major") = 9, py::arg("minor") = 0,
        py::arg("shared_bytes") = 227 * 1024, py::arg("driver") = py::none(),
        py::arg("newest_ptx") = py::none());

  m.def("load_ptx", &load_ptx, py::arg("text"));
  m.def("load_fat_binary", &load_fat_binary, py::arg("data"));
  m.def("launch", &launch_loaded, py::arg("kernel"), py::arg("grid"), py::arg("block"),
        py::arg("shared_bytes") = 0, py::arg("args") = py::tuple(), py::arg("dependent") = false,
        py::arg("allowed_shared") = -1);
  m.def("add_memory", &add_memory, py::arg("name"), py::arg("address"), py::arg("bytes"),
        py::arg("writable") = true, py::arg("initialized") = true);
  m.def("add_output", [](const std::string& name, uint64_t address, uint64_t bytes) {
    add_memory(name, address, bytes, true, false);
    if (bytes) machine().memory.allocations().back()->is_output = true;
  });
  m.def("check_outputs", &check_outputs);
  m.def("clear_memory", [] { machine().memory.clear(); });

  m.def("take_findings", [] { return machine().findings.take(); });
  m.def("take_launches", &take_launches);
  m.def("take_runtime_calls", [] { return std::exchange(log().runtime_calls, {}); });
  m.def("counters", &counters);
  m.def("clear_counters", [] { machine().counters.clear(); });
  m.def("lines", &lines, py::arg("kernel"));
  m.def("where", &where, py::arg("kernel"), py::arg("pc"));
}

}  // namespace ptx
