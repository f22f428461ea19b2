// The Python module vispruner_ptx: the executor, and the project's operators with their real host
// code. Tensors are passed as addresses, shapes and strides; tests/support/compiled_kernels.py owns
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "binding.h"
#include "device.h"
#include "executor.h"
#include "vispruner/cuda.h"
#include "vispruner/plan.h"

namespace py = pybind11;
using namespace vispruner;

namespace {

struct TensorArg {  // (address, dtype code, strides in elements)
  uintptr_t address;
  int dtype;
  std::vector<int64_t> strides;
};

TensorArg tensor_arg(const py::tuple& t) {
  return {t[0].cast<uintptr_t>(), t[1].cast<int>(), t[2].cast<std::vector<int64_t>>()};
}

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The memory that one call may use: exactly the inputs, outputs and the workspace.
class CallMemory {
 public:
  CallMemory() { ptx::machine().memory.clear(); }
  ~CallMemory() {
    ptx::machine().memory.clear();
    std::free(workspace_);
  }
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;

  // From the first element of a tensor of these sizes to its last one.
  void input(const char* name, const TensorArg& t, DType dtype, const std::vector<int64_t>& sizes) {
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 0) return;
      last += (sizes[d] - 1) * t.strides[d];
    }
    add(name, t.address, (last + 1) * element_bytes(dtype), false, true);
  }
  void output(const char* name, uintptr_t address, int64_t bytes) {
    if (!address || bytes <= 0) return;
    add(name, address, bytes, true, false).is_output = true;
  }
  void* workspace(int64_t bytes) {
    constexpr size_t kAlignment = 512;  // the minimum of torch's allocator
    if (bytes <= 0) return nullptr;
    const auto size = static_cast<size_t>(bytes);
    workspace_ = std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
    std::memset(workspace_, 0xa5, size);
    add("workspace", reinterpret_cast<uintptr_t>(workspace_), bytes, true, false);
    return workspace_;
  }

  // Called after the call, with its error.
  void finish(int error) {
    if (error) {
      throw std::runtime_error("error " + std::to_string(error) + ": " + cuda::error_string(error));
    }
    for (const std::string& text : ptx::missing_outputs(ptx::machine().memory)) {
      ptx::machine().findings.add("output", text);
    }
  }

 private:
  static ptx::Allocation& add(const char* name, uintptr_t address, int64_t bytes, bool writable,
                              bool initialized) {
    return ptx::machine().memory.add(name, address, reinterpret_cast<uint8_t*>(address),
                                     static_cast<uint64_t>(bytes), writable, initialized);
  }

  void* workspace_ = nullptr;
};

// The default stream of the current device.
cuda::Stream stream() { return {nullptr, ptx::current_device_number()}; }

// (B, N, C)
FeatureView feature_view(CallMemory& memory, const py::tuple& tuple, int64_t images, int64_t tokens,
                         int64_t channels) {
  const TensorArg t = tensor_arg(tuple);
  const auto dtype = static_cast<DType>(t.dtype);
  memory.input("feats", t, dtype, {images, tokens, channels});
  return {reinterpret_cast<const void*>(t.address), dtype, channels, t.strides[0], t.strides[1]};
}

// (B, H, N), or None
AttentionView attention_view(CallMemory& memory, const py::object& object, int64_t images,
                             int64_t heads, int64_t tokens) {
  if (object.is_none()) return {};
  const TensorArg t = tensor_arg(object.cast<py::tuple>());
  const auto dtype = static_cast<DType>(t.dtype);
  memory.input("attention", t, dtype, {images, heads, tokens});
  return {reinterpret_cast<const void*>(t.address),
          dtype,
          heads,
          t.strides[0],
          t.strides[1],
          t.strides[2]};
}

void topk(const py::object& attention, int64_t images, int64_t heads, int tokens, int k,
          uintptr_t indices, uintptr_t scores) {
  CallMemory memory;
  const int64_t kept = std::min(k, tokens);
  memory.output("indices", indices, images * kept * 8);
  memory.output("scores", scores, images * kept * 4);
  memory.finish(cuda::topk(attention_view(memory, attention, images, heads, tokens), images, tokens,
                           k, reinterpret_cast<int64_t*>(indices), reinterpret_cast<float*>(scores),
                           stream()));
}

void pairwise_cosine(const py::tuple& feats, int64_t images, int tokens, int64_t channels,
                     uintptr_t out, int64_t workspace_limit) {
  CallMemory memory;
  const FeatureView view = feature_view(memory, feats, images, tokens, channels);
  memory.output("cosines", out, images * tokens * tokens * 4);
  void* workspace =
      memory.workspace(cuda::cosine_workspace_bytes(view, images, tokens, workspace_limit));
  memory.finish(cuda::pairwise_cosine(view, images, tokens, reinterpret_cast<float*>(out),
                                      workspace_limit, workspace, stream()));
}

void run_prune(CallMemory& memory, cuda::PruneArgs& args, int64_t kept) {
  memory.output("indices", reinterpret_cast<uintptr_t>(args.indices), kept * 8);
  memory.output("kept_feats", reinterpret_cast<uintptr_t>(args.kept_feats),
                kept * args.feats.channels * element_bytes(args.feats.dtype));
  void* workspace = memory.workspace(cuda::prune_workspace_bytes(args));
  memory.finish(cuda::prune(args, workspace, stream()));
}

// (important_ratio, step) of VisPruner, or (name, parameter) of another method.
Selection selection_of(const py::tuple& method) {
  if (!py::isinstance<py::str>(method[0])) {
    return vispruner_selection(method[0].cast<double>(), method[1].cast<int64_t>());
  }
  Selection selection{};
  const std::string wrong =
      parse_selection(method[0].cast<std::string>(), method[1].cast<double>(), &selection);
  if (!wrong.empty()) throw std::invalid_argument(wrong);
  return selection;
}

void prune(const py::tuple& feats, const py::object& attention, int64_t images, int64_t heads,
           int tokens, int64_t channels, int64_t k, const py::tuple& method, uintptr_t indices,
           uintptr_t kept_feats, int64_t workspace_limit) {
  CallMemory memory;
  const Selection selection = selection_of(method);
  cuda::PruneArgs args{feature_view(memory, feats, images, tokens, channels),
                       attention_view(memory, attention, images, heads, tokens),
                       images,
                       image_shape(tokens, k, selection),
                       nullptr,
                       selection,
                       reinterpret_cast<int64_t*>(indices),
                       reinterpret_cast<void*>(kept_feats),
                       workspace_limit};
  run_prune(memory, args, images * args.shape.kept());
}

void prune_varlen(const py::tuple& feats, const py::object& attention, int64_t heads,
                  int64_t channels, const std::vector<int64_t>& bounds,
                  const std::vector<int64_t>& ks, const py::tuple& method, uintptr_t indices,
                  uintptr_t kept_feats, int64_t workspace_limit) {
  CallMemory memory;
  const Selection selection = selection_of(method);
  std::vector<cuda::RaggedImage> images;
  int64_t kept = 0;
  for (size_t i = 0; i < ks.size(); ++i) {
    images.push_back({bounds[i], kept, image_shape(bounds[i + 1] - bounds[i], ks[i], selection)});
    kept += images.back().shape.kept();
  }
  cuda::PruneArgs args{feature_view(memory, feats, 1, bounds.back(), channels),
                       attention_view(memory, attention, 1, heads, bounds.back()),
                       static_cast<int64_t>(images.size()),
                       {},
                       images.data(),
                       selection,
                       reinterpret_cast<int64_t*>(indices),
                       reinterpret_cast<void*>(kept_feats),
                       workspace_limit};
  run_prune(memory, args, kept);
}

void cls_attention(const py::tuple& q, const py::tuple& k, int64_t images, int heads, int tokens,
                   int head_dim, double scale, uintptr_t out) {
  CallMemory memory;
  const TensorArg tq = tensor_arg(q), tk = tensor_arg(k);
  const auto dtype = static_cast<DType>(tk.dtype);
  memory.input("q", tq, dtype, {images, heads, head_dim});
  memory.input("k", tk, dtype, {images, heads, tokens, head_dim});
  memory.output("attention", out, images * (tokens - 1) * 4);
  const ClsAttentionArgs args{
      {reinterpret_cast<const void*>(tq.address), tq.strides[0], tq.strides[1], 0},
      {reinterpret_cast<const void*>(tk.address), tk.strides[0], tk.strides[1], tk.strides[2]},
      dtype,
      images,
      heads,
      tokens,
      head_dim,
      scale};
  const cuda::ClsAttentionLayout layout = cuda::cls_attention_layout(args);
  void* workspace = memory.workspace(layout.workspace_bytes);
  memory.finish(
      cuda::cls_attention(args, layout, reinterpret_cast<float*>(out), workspace, stream()));
}

void received_attention(const py::tuple& q, const py::tuple& k, int heads, int head_dim,
                        float scale, const std::vector<int64_t>& bounds, const py::object& lse,
                        uintptr_t out) {
  CallMemory memory;
  const TensorArg tq = tensor_arg(q), tk = tensor_arg(k);
  const auto dtype = static_cast<DType>(tq.dtype);
  const int64_t rows = bounds.back();
  memory.input("q", tq, dtype, {rows, heads, head_dim});
  memory.input("k", tk, dtype, {rows, heads, head_dim});
  memory.output("attention", out, rows * 4);
  ReceivedAttentionArgs args{
      {reinterpret_cast<const void*>(tq.address), 0, tq.strides[1], tq.strides[0]},
      {reinterpret_cast<const void*>(tk.address), 0, tk.strides[1], tk.strides[0]},
      dtype,
      heads,
      head_dim,
      scale,
      nullptr,
      0,
      0,
      static_cast<int64_t>(bounds.size()) - 1,
      bounds.data()};
  if (!lse.is_none()) {
    const TensorArg t = tensor_arg(lse.cast<py::tuple>());
    args.lse = reinterpret_cast<const float*>(t.address);
    args.lse_head_stride = t.strides[0];
    args.lse_token_stride = t.strides[1];
    memory.input("lse", t, DType::kFloat32, {heads, rows});
  }
  void* workspace = memory.workspace(cuda::received_attention_workspace_bytes(args));
  memory.finish(cuda::received_attention(args, reinterpret_cast<float*>(out), workspace, stream()));
}

}  // namespace

PYBIND11_MODULE(vispruner_ptx, m) {
  m.doc() = "The operators of vispruner_cuda; the PTX of their kernels is executed on the host.";
  ptx::bind_executor(m);
  m.def("plans", [] { return plan::describe(true); });
  m.def("set_plan", &plan::set);
  m.def("topk", &topk);
  m.def("pairwise_cosine", &pairwise_cosine);
  m.def("prune", &prune);
  m.def("prune_varlen", &prune_varlen);
  m.def("cls_attention", &cls_attention);
  m.def("received_attention", &received_attention);
}
