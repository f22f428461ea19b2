// Python binding of the host-run kernels. Tensors arrive as addresses, shapes and strides:
// host_kernels.py owns the memory and makes the arguments.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "simt.h"
#include "vispruner/cuda.h"

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

// (B, N, C)
FeatureView feature_view(const py::tuple& tuple, int64_t channels) {
  const TensorArg t = tensor_arg(tuple);
  return {reinterpret_cast<const void*>(t.address), static_cast<DType>(t.dtype), channels,
          t.strides[0], t.strides[1]};
}

// (B, H, N), or None
AttentionView attention_view(const py::object& object, int64_t heads) {
  if (object.is_none()) return {};
  const TensorArg t = tensor_arg(object.cast<py::tuple>());
  return {reinterpret_cast<const void*>(t.address),
          static_cast<DType>(t.dtype),
          heads,
          t.strides[0],
          t.strides[1],
          t.strides[2]};
}

void check(int error) {
  if (error) throw std::runtime_error("kernel launch failed: " + std::to_string(error));
}

// Uninitialized device memory holds anything.
std::vector<unsigned char> poisoned(int64_t bytes) {
  return std::vector<unsigned char>(static_cast<size_t>(bytes), 0xa5);
}

void topk(const py::object& attention, int64_t images, int64_t heads, int tokens, int k,
          uintptr_t indices, uintptr_t scores) {
  check(cuda::topk(attention_view(attention, heads), images, tokens, k,
                   reinterpret_cast<int64_t*>(indices), reinterpret_cast<float*>(scores), nullptr));
}

void pairwise_cosine(const py::tuple& feats, int64_t images, int tokens, int64_t channels,
                     uintptr_t out, int64_t workspace_limit) {
  const FeatureView view = feature_view(feats, channels);
  auto ws = poisoned(cuda::cosine_workspace_bytes(view, images, tokens, workspace_limit));
  check(cuda::pairwise_cosine(view, images, tokens, reinterpret_cast<float*>(out), workspace_limit,
                              ws.data(), nullptr));
}

void run_prune(cuda::PruneArgs& args) {
  auto ws = poisoned(cuda::prune_workspace_bytes(args));
  check(cuda::prune(args, ws.data(), nullptr));
}

void prune(const py::tuple& feats, const py::object& attention, int64_t images, int64_t heads,
           int tokens, int64_t channels, int64_t k, double important_ratio, int step,
           uintptr_t indices, uintptr_t kept_feats, int64_t workspace_limit) {
  cuda::PruneArgs args{feature_view(feats, channels),
                       attention_view(attention, heads),
                       images,
                       image_shape(tokens, k, important_ratio),
                       nullptr,
                       step,
                       reinterpret_cast<int64_t*>(indices),
                       reinterpret_cast<void*>(kept_feats),
                       workspace_limit};
  run_prune(args);
}

void prune_varlen(const py::tuple& feats, const py::object& attention, int64_t heads,
                  int64_t channels, const std::vector<int64_t>& bounds,
                  const std::vector<int64_t>& ks, double important_ratio, int step,
                  uintptr_t indices, uintptr_t kept_feats, int64_t workspace_limit) {
  std::vector<cuda::RaggedImage> images;
  int64_t kept = 0;
  for (size_t i = 0; i < ks.size(); ++i) {
    images.push_back(
        {bounds[i], kept, image_shape(bounds[i + 1] - bounds[i], ks[i], important_ratio)});
    kept += images.back().shape.kept();
  }
  cuda::PruneArgs args{feature_view(feats, channels),
                       attention_view(attention, heads),
                       static_cast<int64_t>(images.size()),
                       {},
                       images.data(),
                       step,
                       reinterpret_cast<int64_t*>(indices),
                       reinterpret_cast<void*>(kept_feats),
                       workspace_limit};
  run_prune(args);
}

void cls_attention(const py::tuple& q, const py::tuple& k, int64_t images, int heads, int tokens,
                   int head_dim, double scale, uintptr_t out) {
  const TensorArg tq = tensor_arg(q), tk = tensor_arg(k);
  const ClsAttentionArgs args{
      {reinterpret_cast<const void*>(tq.address), tq.strides[0], tq.strides[1], 0},
      {reinterpret_cast<const void*>(tk.address), tk.strides[0], tk.strides[1], tk.strides[2]},
      static_cast<DType>(tk.dtype),
      images,
      heads,
      tokens,
      head_dim,
      scale};
  auto ws = poisoned(cuda::cls_attention_workspace_bytes(args));
  check(cuda::cls_attention(args, reinterpret_cast<float*>(out), ws.data(), nullptr));
}

void received_attention(const py::tuple& q, const py::tuple& k, int heads, int head_dim,
                        float scale, const std::vector<int64_t>& bounds, const py::object& lse,
                        uintptr_t out) {
  const TensorArg tq = tensor_arg(q), tk = tensor_arg(k);
  ReceivedAttentionArgs args{
      {reinterpret_cast<const void*>(tq.address), 0, tq.strides[1], tq.strides[0]},
      {reinterpret_cast<const void*>(tk.address), 0, tk.strides[1], tk.strides[0]},
      static_cast<DType>(tq.dtype),
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
  }
  auto ws = poisoned(cuda::received_attention_workspace_bytes(args));
  check(cuda::received_attention(args, reinterpret_cast<float*>(out), ws.data(), nullptr));
}

}  // namespace

PYBIND11_MODULE(vispruner_simt, m) {
  m.doc() = "CUDA kernel source of vispruner_cuda, run on the host.";
  m.def("configure", [](unsigned schedule, int shared_limit) {
    simt::schedule = schedule;
    simt::shared_limit = shared_limit;
  });
  m.def("topk", &topk);
  m.def("pairwise_cosine", &pairwise_cosine);
  m.def("prune", &prune);
  m.def("prune_varlen", &prune_varlen);
  m.def("cls_attention", &cls_attention);
  m.def("received_attention", &received_attention);
}
