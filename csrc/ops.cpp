// Torch operators: schemas, memory-safety checks, dispatch to the CPU and CUDA kernels.
//
// The only file that uses torch, and only its stable ABI, so one binary works with every torch >=
// 2.10. Errors for bad input that users see (TypeError and ValueError with names, shapes and
// expected values) are raised by vispruner_cuda/_checks.py. The checks here prevent out-of-bounds
// accesses in direct calls of torch.ops.vispruner.*.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "vispruner/cpu.h"
#include "vispruner/method.h"
#if defined(VP_WITH_CUDA)
#include "vispruner/cuda.h"

// Defined in libtorch_cuda only: weak, so that the library also loads into a torch without CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));
#endif

namespace vispruner {
namespace {

using torch::stable::Tensor;

// ---- memory -----------------------------------------------------------------------------------
// Types are compared as the integers of torch's C interface: the methods of Tensor translate them
// to ScalarType and DeviceType, which takes a tenth of the time of a small call.
int32_t dtype_number(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

struct Place {
  int32_t type, index;

  explicit Place(const Tensor& t) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  }
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

// An uninitialized tensor on the device of `like`, by the fastest call: new_empty takes four times
// as long.
template <size_t kDims>
Tensor empty(const Tensor& like, const int64_t (&sizes)[kDims], int32_t dtype) {
  int64_t strides[kDims];
  int64_t stride = 1;
  for (size_t d = kDims; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const Place place(like);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError failed =
      aoti_torch_empty_strided(kDims, sizes, strides, dtype, place.type, place.index, &handle);
  // Exceptions do not cross torch's C interface, which logs their messages and returns a code.
  // Libraries that retry with a smaller batch look for these words.
  STD_TORCH_CHECK(!failed, place.type == aoti_torch_device_type_cuda() ? "CUDA " : "",
                  "out of memory. vispruner could not allocate ",
                  stride * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)),
                  " bytes (torch's message is on standard error)");
  return Tensor(handle);
}

// Host memory for the duration of a call; small amounts come from the stack.
class HostMemory {
 public:
  static constexpr int64_t kAlign = 64;

  explicit HostMemory(int64_t bytes) {
    if (bytes <= static_cast<int64_t>(sizeof little_)) return;
    data_ = static_cast<char*>(
        ::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlign}, std::nothrow));
    STD_TORCH_CHECK(data_ != nullptr, "out of memory. vispruner: the host has no ", bytes,
                    " bytes for the workspace");
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  ~HostMemory() { ::operator delete(data_, std::align_val_t{kAlign}); }
  char* data() { return data_ ? data_ : little_; }

 private:
  alignas(kAlign) char little_[16384];
  char* data_ = nullptr;
};

// ---- tensors to views -------------------------------------------------------------------------
DType dtype_of(const Tensor& t, const char* name) {
  const int32_t dtype = dtype_number(t);
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  STD_TORCH_CHECK(dtype == aoti_torch_dtype_bfloat16(), name,
                  " must have dtype float16, bfloat16 or float32");
  return DType::kBFloat16;
}

// Channels contiguous; images and tokens may be strided (feats[:, 1:] needs no copy).
Tensor with_contiguous_channels(const Tensor& feats) {
  const int64_t last = feats.dim() - 1;
  const bool fine = feats.stride(last) == 1 || feats.size(last) == 1;
  return fine ? feats : torch::stable::contiguous(feats);
}

// (B, N, C) or, packed, (T, C).
FeatureView feature_view(const Tensor& feats) {
  const bool packed = feats.dim() == 2;
  return {feats.const_data_ptr(), dtype_of(feats, "feats"), feats.size(packed ? 1 : 2),
          packed ? 0 : feats.stride(0), feats.stride(packed ? 0 : 1)};
}

// (B, N) or (B, H, N); packed: (T) or (H, T).
AttentionView attention_view(const Tensor& attn, bool packed) {
  const int64_t batch_dims = packed ? 0 : 1;
  const bool heads = attn.dim() == batch_dims + 2;
  return {attn.const_data_ptr(),
          dtype_of(attn, "cls_attn"),
          heads ? attn.size(batch_dims) : 1,
          packed ? 0 : attn.stride(0),
          heads ? attn.stride(batch_dims) : 0,
          attn.stride(attn.dim() - 1)};
}

int64_t tokens_of(const Tensor& attn) { return attn.size(attn.dim() - 1); }

// ---- checks -----------------------------------------------------------------------------------
void check_tokens(int64_t n) {
  STD_TORCH_CHECK(n <= kMaxTokens, "an image has ", n, " tokens, at most ", kMaxTokens,
                  " are supported");
}

void check_feats(const Tensor& feats, int64_t dim) {
  (void)dtype_of(feats, "feats");
  STD_TORCH_CHECK(feats.dim() == dim, "feats must have ", dim, " dimensions, got ", feats.dim());
  STD_TORCH_CHECK(feats.size(dim - 1) >= 1, "feats must have at least one channel");
  STD_TORCH_CHECK(feats.size(dim - 1) <= kMaxChannels, "feats has ", feats.size(dim - 1),
                  " channels, at most ", kMaxChannels, " are supported");
  if (dim == 3) check_tokens(feats.size(1));
}

void check_number_of_heads(int64_t heads) {
  STD_TORCH_CHECK(heads >= 1 && heads <= kMaxHeads, "there must be 1 to ", kMaxHeads,
                  " heads, got ", heads);
}

void check_attention(const Tensor& attn, int64_t batch_dims) {
  (void)dtype_of(attn, "cls_attn");
  STD_TORCH_CHECK(attn.dim() == batch_dims + 1 || attn.dim() == batch_dims + 2,
                  "cls_attn must have ", batch_dims + 1, " or ", batch_dims + 2,
                  " dimensions, got ", attn.dim());
  if (attn.dim() == batch_dims + 2) check_number_of_heads(attn.size(batch_dims));
  if (batch_dims) check_tokens(tokens_of(attn));
}

void check_one_device(const Tensor& feats, const Tensor& attn) {
  STD_TORCH_CHECK(Place(feats) == Place(attn), "feats and cls_attn must be on one device");
}

Selection check_vispruner(double important_ratio, int64_t step) {
  STD_TORCH_CHECK(important_ratio >= 0.0 && important_ratio <= 1.0,
                  "important_ratio must be in [0, 1], got ", important_ratio);
  STD_TORCH_CHECK(step >= 1, "step must be at least 1, got ", step);
  return vispruner_selection(important_ratio, step);
}

Selection check_method(const std::string& method, double parameter) {
  Selection selection{};
  const std::string wrong = parse_selection(method, parameter, &selection);
  STD_TORCH_CHECK(wrong.empty(), "vispruner: ", wrong);
  return selection;
}

void check_k(int64_t k) { STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k); }

void check_prune(const Tensor& feats, const Tensor& attn, int64_t k) {
  check_feats(feats, 3);
  check_attention(attn, 1);
  STD_TORCH_CHECK(attn.size(0) == feats.size(0) && tokens_of(attn) == feats.size(1),
                  "cls_attn must match feats in images and tokens");
  check_k(k);
  check_one_device(feats, attn);
}

// One image of a ragged batch: rows [first_token, ...) of the input, [first_kept, ...) of the
// output.
struct PackedImage {
  int64_t first_token, first_kept;
  ImageShape shape;
};

std::vector<PackedImage> check_packed(const Tensor& feats, const Tensor& attn,
                                      const std::vector<int64_t>& bounds,
                                      const std::vector<int64_t>& ks, const Selection& selection) {
  check_feats(feats, 2);
  check_attention(attn, 0);
  STD_TORCH_CHECK(tokens_of(attn) == feats.size(0), "cls_attn must match feats in tokens");
  check_one_device(feats, attn);
  STD_TORCH_CHECK(!bounds.empty() && bounds.front() == 0 && bounds.back() == feats.size(0) &&
                      ks.size() + 1 == bounds.size(),
                  "cu_seqlens must begin with 0, end with the rows of feats and have one entry "
                  "more than k");
  std::vector<PackedImage> images;
  images.reserve(ks.size());
  int64_t kept = 0;
  for (size_t i = 0; i < ks.size(); ++i) {
    const int64_t tokens = bounds[i + 1] - bounds[i];
    STD_TORCH_CHECK(tokens >= 0, "cu_seqlens must not decrease");
    check_tokens(tokens);
    check_k(ks[i]);
    images.push_back({bounds[i], kept, image_shape(tokens, ks[i], selection)});
    kept += images.back().shape.kept();
  }
  return images;
}

int64_t kept_rows(const std::vector<PackedImage>& images) {
  return images.empty() ? 0 : images.back().first_kept + images.back().shape.kept();
}

// ---- attention scores -------------------------------------------------------------------------
void check_heads(const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(dtype_number(q) == dtype_number(k) && Place(q) == Place(k),
                  "q and k must have one dtype and be on one device");
}

void check_head_dim(int64_t channels) {
  STD_TORCH_CHECK(channels <= kMaxChannels, "a head has ", channels, " channels, at most ",
                  kMaxChannels, " are supported");
}

void check_scale(double scale) {
  STD_TORCH_CHECK(std::isfinite(static_cast<float>(scale)), "scale must be finite in float32, got ",
                  scale);
}

ClsAttentionArgs cls_attention_args(const Tensor& q_cls, const Tensor& k, double scale) {
  check_heads(q_cls, k);
  STD_TORCH_CHECK(q_cls.dim() == 3 && k.dim() == 4 && k.size(0) == q_cls.size(0) &&
                      k.size(1) == q_cls.size(1) && k.size(3) == q_cls.size(2) && k.size(2) >= 1 &&
                      q_cls.size(2) >= 1,
                  "q_cls must have shape (B, H, D) and k (B, H, 1 + N, D)");
  check_number_of_heads(q_cls.size(1));
  check_head_dim(q_cls.size(2));
  check_tokens(k.size(2) - 1);
  check_scale(scale);
  return {{q_cls.const_data_ptr(), q_cls.stride(0), q_cls.stride(1), 0},
          {k.const_data_ptr(), k.stride(0), k.stride(1), k.stride(2)},
          dtype_of(k, "k"),
          q_cls.size(0),
          static_cast<int>(k.size(1)),
          static_cast<int>(k.size(2)),
          static_cast<int>(k.size(3)),
          scale};
}

ReceivedAttentionArgs received_attention_args(const Tensor& q, const Tensor& k, double scale,
                                              const std::vector<int64_t>& bounds,
                                              const std::optional<Tensor>& lse) {
  check_heads(q, k);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(0) == k.size(0) &&
                      q.size(1) == k.size(1) && q.size(2) == k.size(2) && q.size(2) >= 1,
                  "q and k must have one shape, (T, H, D)");
  check_number_of_heads(q.size(1));
  check_head_dim(q.size(2));
  STD_TORCH_CHECK(!bounds.empty() && bounds.front() == 0 && bounds.back() == q.size(0),
                  "cu_seqlens must begin with 0 and end with the rows of q");
  for (size_t i = 1; i < bounds.size(); ++i) {
    STD_TORCH_CHECK(bounds[i] >= bounds[i - 1], "cu_seqlens must not decrease");
    check_tokens(bounds[i] - bounds[i - 1]);
  }
  check_scale(scale);
  ReceivedAttentionArgs args{{q.const_data_ptr(), 0, q.stride(1), q.stride(0)},
                             {k.const_data_ptr(), 0, k.stride(1), k.stride(0)},
                             dtype_of(q, "q"),
                             static_cast<int>(q.size(1)),
                             static_cast<int>(q.size(2)),
                             static_cast<float>(scale),
                             nullptr,
                             0,
                             0,
                             static_cast<int64_t>(bounds.size()) - 1,
                             bounds.data()};
  if (lse) {
    STD_TORCH_CHECK(dtype_number(*lse) == aoti_torch_dtype_float32() && lse->dim() == 2 &&
                        lse->size(0) == q.size(1) && lse->size(1) == q.size(0) &&
                        Place(*lse) == Place(q),
                    "lse must be float32 of shape (H, T) on the device of q");
    args.lse = lse->const_data_ptr<float>();
    args.lse_head_stride = lse->stride(0);
    args.lse_token_stride = lse->stride(1);
  }
  return args;
}

// ---- CPU --------------------------------------------------------------------------------------
int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* at_element(const void* data, DType dtype, int64_t element) {
  return static_cast<const char*>(data) + element * element_bytes(dtype);
}

// Exceptions do not cross torch's parallel_for. The only one of a task is bad_alloc.
cpu::Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t tasks, const std::function<void(int64_t)>& body) {
            std::atomic<bool> failed{false};
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              try {
                for (int64_t i = begin; i < end; ++i) body(i);
              } catch (const std::bad_alloc&) {
                failed = true;
              }
            });
            STD_TORCH_CHECK(!failed,
                            "out of memory. vispruner: the host has none for the workspace");
          }};
}

cpu::Threads one_thread() {
  return {1, [](int64_t tasks, const std::function<void(int64_t)>& body) {
            for (int64_t i = 0; i < tasks; ++i) body(i);
          }};
}

// A large allocation is mapped on every call, and its page faults take a fifth of the time of a
// large image. Pages of 2 MiB cause few faults.
void prefer_huge_pages(char* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = int64_t{2} << 20;
  const auto skip = round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory)), kPage) -
                    static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory));
  const int64_t whole = (bytes - skip) / kPage * kPage;
  if (whole > 0) (void)madvise(memory + skip, static_cast<size_t>(whole), MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// If there are enough images and they are small, they run in parallel, with one workspace each.
// Otherwise they run one after the other, each on all threads, or on one thread if there is little
// work. Calls body(image, threads, workspace); bytes(threads) are those of one workspace.
template <typename Bytes, typename Body>
void for_each_image(int64_t images, int largest_residual, int64_t channels, const Bytes& bytes,
                    const Body& body) {
  constexpr int kSmall = 2048;                   // residual tokens; 16 MiB of Gram matrix
  constexpr int64_t kLittle = int64_t{1} << 17;  // multiplications: about 10 us
  const int64_t work = channels * largest_residual * largest_residual;
  const cpu::Threads all = work * images <= kLittle ? one_thread() : torch_threads();
  const bool side_by_side = all.count > 1 && images >= all.count && largest_residual <= kSmall;
  const int64_t lanes = side_by_side ? all.count : 1;
  const int64_t each = round_up(bytes(side_by_side ? 1 : all.count), HostMemory::kAlign);
  HostMemory memory(lanes * each);
  char* base = memory.data();
  prefer_huge_pages(base, lanes * each);
  if (!side_by_side) {
    for (int64_t image = 0; image < images; ++image) body(image, all, base);
    return;
  }
  all.run(lanes, [&](int64_t lane) {
    const cpu::Threads one = one_thread();
    for (int64_t image = lane; image < images; image += lanes) {
      body(image, one, base + lane * each);
    }
  });
}

// `image_at(i)` describes image i; feats and attention give layout and dtype.
template <typename ImageAt>
void prune_images_cpu(const FeatureView& feats, const AttentionView& attention, int64_t images,
                      const Selection& selection, const ImageAt& image_at) {
  int largest = 0;
  for (int64_t i = 0; i < images; ++i) largest = std::max(largest, image_at(i).shape.residual());
  const auto bytes = [&](int threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < images; ++i) {
      most = std::max(
          most, cpu::prune_workspace_bytes(image_at(i).shape, feats.channels, selection, threads));
    }
    return most;
  };
  for_each_image(images, largest, feats.channels, bytes,
                 [&](int64_t i, const cpu::Threads& threads, void* workspace) {
                   cpu::prune_image(feats, attention, image_at(i), selection, threads, workspace);
                 });
}

// The operators on the CPU. `like` is an input: outputs have its device.
struct OnCpu {
  static void check_plans() {
    STD_TORCH_CHECK(cpu::isa_supported(plan::current_cpu()),
                    "vispruner: VISPRUNER_CPU_ISA names an instruction set that this processor or "
                    "build does not have: use one of auto,",
                    cpu::isa_usable());
  }

  static void topk(const Tensor&, const AttentionView& attention, int64_t images, int tokens,
                   int kept, int64_t* indices, float* scores) {
    torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        cpu::topk(attention, i, tokens, kept, indices + i * kept, scores + i * kept);
      }
    });
  }

  static void pairwise_cosine(const Tensor&, const FeatureView& view, int64_t images, int tokens,
                              float* cosines) {
    for_each_image(
        images, tokens, view.channels,
        [&](int threads) { return cpu::cosine_workspace_bytes(tokens, view.channels, threads); },
        [&](int64_t i, const cpu::Threads& threads, void* workspace) {
          cpu::pairwise_cosine(view, at_element(view.data, view.dtype, i * view.image_stride),
                               tokens, cosines + i * tokens * tokens, threads, workspace);
        });
  }

  static void prune_batch(const Tensor&, const FeatureView& feats, const AttentionView& attention,
                          int64_t images, const ImageShape& shape, const Selection& selection,
                          int64_t* indices, void* kept_feats) {
    prune_images_cpu(feats, attention, images, selection, [&](int64_t i) {
      const int64_t row = i * shape.kept();
      cpu::PruneImage image{};
      image.feats = at_element(feats.data, feats.dtype, i * feats.image_stride);
      image.attention =
          attention.data ? at_element(attention.data, attention.dtype, i * attention.image_stride)
                         : nullptr;
      image.shape = shape;
      image.indices = indices + row;
      image.kept_feats = kept_feats ? static_cast<char*>(kept_feats) +
                                          row * feats.channels * element_bytes(feats.dtype)
                                    : nullptr;
      return image;
    });
  }

  static void prune_packed(const Tensor&, const FeatureView& feats, const AttentionView& attention,
                           const std::vector<PackedImage>& packed, const Selection& selection,
                           int64_t* indices, void* kept_feats) {
    prune_images_cpu(
        feats, attention, static_cast<int64_t>(packed.size()), selection, [&](int64_t i) {
          const PackedImage& p = packed[static_cast<size_t>(i)];
          cpu::PruneImage image{};
          image.feats = at_element(feats.data, feats.dtype, p.first_token * feats.token_stride);
          image.attention =
              at_element(attention.data, attention.dtype, p.first_token * attention.token_stride);
          image.shape = p.shape;
          image.index_base = p.first_token;
          image.indices = indices + p.first_kept;
          image.kept_feats = static_cast<char*>(kept_feats) +
                             p.first_kept * feats.channels * element_bytes(feats.dtype);
          return image;
        });
  }

  static void cls_attention(const Tensor&, const ClsAttentionArgs& args, float* out) {
    cpu::cls_attention(args, out, torch_threads());
  }

  static void received_attention(const Tensor&, const ReceivedAttentionArgs& args, float* out) {
    cpu::received_attention(args, out, torch_threads());
  }
};

// ---- CUDA -------------------------------------------------------------------------------------
#if defined(VP_WITH_CUDA)

// Images run in waves whose workspaces fit this limit; one image may exceed it. 160 images of
// LLaVA-1.5 fit, enough to fill any GPU.
constexpr int64_t kWorkspaceLimit = int64_t{512} << 20;

void check_cuda(int error) {
  STD_TORCH_CHECK(error == 0, "vispruner: ", cuda::error_string(error));
}

// Makes the tensor's device current (for torch and for our own runtime) and provides its stream.
class Launch {
 public:
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    stream_.device = t.get_device_index();
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "vispruner: this torch has no CUDA");
    check_cuda(cuda::set_device(stream_.device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(stream_.device, &stream_.handle));
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_{};
};

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, aoti_torch_dtype_uint8());
}

// The same on the current stream of the inputs' GPU.
struct OnCuda {
  static void check_plans() {}

  static void topk(const Tensor& like, const AttentionView& attention, int64_t images, int tokens,
                   int kept, int64_t* indices, float* scores) {
    const Launch launch(like);
    check_cuda(cuda::topk(attention, images, tokens, kept, indices, scores, launch.stream()));
  }

  static void pairwise_cosine(const Tensor& like, const FeatureView& view, int64_t images,
                              int tokens, float* cosines) {
    const Launch launch(like);
    const Tensor ws =
        workspace(like, cuda::cosine_workspace_bytes(view, images, tokens, kWorkspaceLimit));
    check_cuda(cuda::pairwise_cosine(view, images, tokens, cosines, kWorkspaceLimit,
                                     ws.mutable_data_ptr(), launch.stream()));
  }

  static void prune(const Tensor& like, const cuda::PruneArgs& args) {
    const Launch launch(like);
    const Tensor ws = workspace(like, cuda::prune_workspace_bytes(args));
    check_cuda(cuda::prune(args, ws.mutable_data_ptr(), launch.stream()));
  }

  static void prune_batch(const Tensor& like, const FeatureView& feats,
                          const AttentionView& attention, int64_t images, const ImageShape& shape,
                          const Selection& selection, int64_t* indices, void* kept_feats) {
    prune(like, {feats, attention, images, shape, nullptr, selection, indices, kept_feats,
                 kWorkspaceLimit});
  }

  static void prune_packed(const Tensor& like, const FeatureView& feats,
                           const AttentionView& attention, const std::vector<PackedImage>& packed,
                           const Selection& selection, int64_t* indices, void* kept_feats) {
    std::vector<cuda::RaggedImage> images;
    images.reserve(packed.size());
    for (const PackedImage& p : packed) images.push_back({p.first_token, p.first_kept, p.shape});
    prune(like, {feats, attention, static_cast<int64_t>(images.size()), ImageShape{}, images.data(),
                 selection, indices, kept_feats, kWorkspaceLimit});
  }

  static void cls_attention(const Tensor& like, const ClsAttentionArgs& args, float* out) {
    const Launch launch(like);
    const cuda::ClsAttentionLayout layout = cuda::cls_attention_layout(args);
    const Tensor ws = workspace(like, layout.workspace_bytes);
    check_cuda(cuda::cls_attention(args, layout, out, ws.mutable_data_ptr(), launch.stream()));
  }

  static void received_attention(const Tensor& like, const ReceivedAttentionArgs& args,
                                 float* out) {
    const Launch launch(like);
    const Tensor ws = workspace(like, cuda::received_attention_workspace_bytes(args));
    check_cuda(cuda::received_attention(args, out, ws.mutable_data_ptr(), launch.stream()));
  }
};

#endif

// ---- the operators ----------------------------------------------------------------------------
template <typename Backend>
std::tuple<Tensor, Tensor> topk(const Tensor& cls_attn, int64_t k) {
  Backend::check_plans();
  check_attention(cls_attn, 1);
  check_k(k);
  const int64_t images = cls_attn.size(0), tokens = tokens_of(cls_attn);
  const int64_t kept = std::min(k, tokens);
  Tensor scores = empty(cls_attn, {images, kept}, aoti_torch_dtype_float32());
  Tensor indices = empty(cls_attn, {images, kept}, aoti_torch_dtype_int64());
  if (indices.numel() > 0) {
    Backend::topk(cls_attn, attention_view(cls_attn, false), images, static_cast<int>(tokens),
                  static_cast<int>(kept), indices.mutable_data_ptr<int64_t>(),
                  scores.mutable_data_ptr<float>());
  }
  return {scores, indices};
}

template <typename Backend>
Tensor pairwise_cosine(const Tensor& feats_) {
  Backend::check_plans();
  check_feats(feats_, 3);
  const Tensor feats = with_contiguous_channels(feats_);
  const int64_t images = feats.size(0), tokens = feats.size(1);
  Tensor out = empty(feats, {images, tokens, tokens}, aoti_torch_dtype_float32());
  if (out.numel() > 0) {
    Backend::pairwise_cosine(feats, feature_view(feats), images, static_cast<int>(tokens),
                             out.mutable_data_ptr<float>());
  }
  return out;
}

template <typename Backend>
Tensor dedup(const Tensor& feats_, int64_t k, int64_t step) {
  Backend::check_plans();
  check_feats(feats_, 3);
  check_k(k);
  const Selection selection = check_vispruner(0.0, step);
  const Tensor feats = with_contiguous_channels(feats_);
  const int64_t images = feats.size(0);
  const ImageShape shape = image_shape(feats.size(1), k, selection);
  Tensor indices = empty(feats, {images, shape.kept()}, aoti_torch_dtype_int64());
  if (indices.numel() > 0) {
    Backend::prune_batch(feats, feature_view(feats), AttentionView{}, images, shape, selection,
                         indices.mutable_data_ptr<int64_t>(), nullptr);
  }
  return indices;
}

template <typename Backend>
std::tuple<Tensor, Tensor> prune_images(const Tensor& feats_, const Tensor& cls_attn, int64_t k,
                                        const Selection& selection) {
  Backend::check_plans();
  check_prune(feats_, cls_attn, k);
  const Tensor feats = with_contiguous_channels(feats_);
  const int64_t images = feats.size(0);
  const ImageShape shape = image_shape(feats.size(1), k, selection);
  Tensor indices = empty(feats, {images, shape.kept()}, aoti_torch_dtype_int64());
  Tensor kept = empty(feats, {images, shape.kept(), feats.size(2)}, dtype_number(feats));
  if (indices.numel() > 0) {
    Backend::prune_batch(feats, feature_view(feats), attention_view(cls_attn, false), images, shape,
                         selection, indices.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr());
  }
  return {kept, indices};
}

template <typename Backend>
std::tuple<Tensor, Tensor> prune(const Tensor& feats, const Tensor& cls_attn, int64_t k,
                                 double important_ratio, int64_t step) {
  return prune_images<Backend>(feats, cls_attn, k, check_vispruner(important_ratio, step));
}

template <typename Backend>
std::tuple<Tensor, Tensor> prune_by(const Tensor& feats, const Tensor& cls_attn, int64_t k,
                                    const std::string& method, double parameter) {
  return prune_images<Backend>(feats, cls_attn, k, check_method(method, parameter));
}

template <typename Backend>
std::tuple<Tensor, Tensor> prune_packed(const Tensor& feats_, const Tensor& cls_attn,
                                        const std::vector<int64_t>& cu_seqlens,
                                        const std::vector<int64_t>& k, const Selection& selection) {
  Backend::check_plans();
  const auto packed = check_packed(feats_, cls_attn, cu_seqlens, k, selection);
  const Tensor feats = with_contiguous_channels(feats_);
  const int64_t rows = kept_rows(packed);
  Tensor indices = empty(feats, {rows}, aoti_torch_dtype_int64());
  Tensor kept = empty(feats, {rows, feats.size(1)}, dtype_number(feats));
  if (rows > 0) {
    Backend::prune_packed(feats, feature_view(feats), attention_view(cls_attn, true), packed,
                          selection, indices.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr());
  }
  return {kept, indices};
}

template <typename Backend>
std::tuple<Tensor, Tensor> prune_varlen(const Tensor& feats, const Tensor& cls_attn,
                                        const std::vector<int64_t>& cu_seqlens,
                                        const std::vector<int64_t>& k, double important_ratio,
                                        int64_t step) {
  return prune_packed<Backend>(feats, cls_attn, cu_seqlens, k,
                               check_vispruner(important_ratio, step));
}

template <typename Backend>
std::tuple<Tensor, Tensor> prune_varlen_by(const Tensor& feats, const Tensor& cls_attn,
                                           const std::vector<int64_t>& cu_seqlens,
                                           const std::vector<int64_t>& k, const std::string& method,
                                           double parameter) {
  return prune_packed<Backend>(feats, cls_attn, cu_seqlens, k, check_method(method, parameter));
}

template <typename Backend>
Tensor cls_attention(const Tensor& q_, const Tensor& k_, double scale) {
  Backend::check_plans();
  const Tensor q = with_contiguous_channels(q_), k = with_contiguous_channels(k_);
  const ClsAttentionArgs args = cls_attention_args(q, k, scale);
  Tensor out = empty(k, {args.images, args.tokens - 1}, aoti_torch_dtype_float32());
  if (out.numel() > 0) Backend::cls_attention(k, args, out.mutable_data_ptr<float>());
  return out;
}

template <typename Backend>
Tensor received_attention(const Tensor& q_, const Tensor& k_, double scale,
                          const std::vector<int64_t>& cu_seqlens,
                          const std::optional<Tensor>& lse) {
  Backend::check_plans();
  const Tensor q = with_contiguous_channels(q_), k = with_contiguous_channels(k_);
  const ReceivedAttentionArgs args = received_attention_args(q, k, scale, cu_seqlens, lse);
  Tensor out = empty(q, {q.size(0)}, aoti_torch_dtype_float32());
  if (out.numel() > 0) Backend::received_attention(q, args, out.mutable_data_ptr<float>());
  return out;
}

template <typename Backend, typename Library>
void register_on(Library& m) {
  m.impl("topk", TORCH_BOX(&topk<Backend>));
  m.impl("pairwise_cosine", TORCH_BOX(&pairwise_cosine<Backend>));
  m.impl("dedup", TORCH_BOX(&dedup<Backend>));
  m.impl("prune", TORCH_BOX(&prune<Backend>));
  m.impl("prune_by", TORCH_BOX(&prune_by<Backend>));
  m.impl("prune_varlen", TORCH_BOX(&prune_varlen<Backend>));
  m.impl("prune_varlen_by", TORCH_BOX(&prune_varlen_by<Backend>));
  m.impl("cls_attention", TORCH_BOX(&cls_attention<Backend>));
  m.impl("received_attention", TORCH_BOX(&received_attention<Backend>));
}

// ---- build report -----------------------------------------------------------------------------
#if !defined(VP_VERSION)
#define VP_VERSION "unknown"
#endif
#if !defined(VP_SOURCES)
#define VP_SOURCES ""
#endif
#if !defined(VP_BUILD_CUDA_ARCHS)
#define VP_BUILD_CUDA_ARCHS ""
#endif
#if !defined(VP_BUILD_CUDA_VERSION)
#define VP_BUILD_CUDA_VERSION ""
#endif

std::string build_info() {
#if defined(VP_WITH_CUDA)
  const bool cuda = true;
  const int state = aoti_torch_get_current_cuda_stream ? 2 : 1;
#else
  const bool cuda = false;
  const int state = 0;
#endif
  // Bytes beyond ASCII become the characters of Latin-1: an environment variable may hold any.
  const auto quoted = [](const std::string& s) {
    std::string json = "\"";
    for (const char c : s) {
      char escape[8] = "";
      if (c == '"' || c == '\\') {
        json += '\\';
      } else if (c < 0x20 || c > 0x7e) {
        std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned char>(c));
      }
      json += *escape ? std::string(escape) : std::string(1, c);
    }
    return json + "\"";
  };
  const auto list = [&](const std::string& names) {  // "a,b" as "a","b"
    std::string json = quoted(names);
    for (size_t at = 0; (at = json.find(',', at)) != std::string::npos; at += 3) {
      json.replace(at, 1, "\",\"");
    }
    return json;
  };
  return std::string("{\"version\":") + quoted(VP_VERSION) + ",\"sources\":" + quoted(VP_SOURCES) +
         ",\"cuda\":" + (cuda ? "true" : "false") +
         ",\"cuda_version\":" + quoted(VP_BUILD_CUDA_VERSION) +
         ",\"cuda_archs\":" + quoted(VP_BUILD_CUDA_ARCHS) +
         ",\"cuda_runtime_state\":" + std::to_string(state) +
         ",\"environment_error\":" + quoted(plan::environment_error()) +
         ",\"cpu_isa\":" + quoted(cpu::isa_name()) + ",\"cpu_isas\":[" + list(cpu::isa_built()) +
         "],\"cpu_isas_usable\":[" + list(cpu::isa_usable()) + "]}";
}

// ---- launch plans -----------------------------------------------------------------------------
std::string plans() {
#if defined(VP_WITH_CUDA)
  return plan::describe(true);
#else
  return plan::describe(false);
#endif
}

void set_plan(const std::string& stage, const std::string& name) {
  const std::string wrong = plan::set(stage, name);
  STD_TORCH_CHECK(wrong.empty(), "vispruner: ", wrong);
}

}  // namespace
}  // namespace vispruner

STABLE_TORCH_LIBRARY(vispruner, m) {
  m.def("topk(Tensor cls_attn, int k) -> (Tensor scores, Tensor indices)");
  m.def("pairwise_cosine(Tensor feats) -> Tensor");
  m.def("dedup(Tensor feats, int k, int step) -> Tensor");
  m.def(
      "prune(Tensor feats, Tensor cls_attn, int k, float important_ratio, int step) -> "
      "(Tensor feats, Tensor indices)");
  // With a method other than VisPruner, and its parameter, or 0 if it has none.
  m.def(
      "prune_by(Tensor feats, Tensor cls_attn, int k, str method, float parameter) -> "
      "(Tensor feats, Tensor indices)");
  m.def(
      "prune_varlen(Tensor feats, Tensor cls_attn, int[] cu_seqlens, int[] k, "
      "float important_ratio, int step) -> (Tensor feats, Tensor indices)");
  m.def(
      "prune_varlen_by(Tensor feats, Tensor cls_attn, int[] cu_seqlens, int[] k, str method, "
      "float parameter) -> (Tensor feats, Tensor indices)");
  m.def("cls_attention(Tensor q_cls, Tensor k, float scale) -> Tensor");
  m.def(
      "received_attention(Tensor q, Tensor k, float scale, int[] cu_seqlens, Tensor? lse) -> "
      "Tensor");
  m.def("build_info() -> str");
  m.def("plans() -> str");
  m.def("set_plan(str stage, str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vispruner, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&vispruner::build_info));
  m.impl("plans", TORCH_BOX(&vispruner::plans));
  m.impl("set_plan", TORCH_BOX(&vispruner::set_plan));
}

STABLE_TORCH_LIBRARY_IMPL(vispruner, CPU, m) { vispruner::register_on<vispruner::OnCpu>(m); }

#if defined(VP_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(vispruner, CUDA, m) { vispruner::register_on<vispruner::OnCuda>(m); }
#endif
