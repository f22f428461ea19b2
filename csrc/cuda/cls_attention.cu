// [CLS] attention: one query against all keys of each head, softmax, mean over heads.
//
// A block takes one head of one image: eight lanes per key compute its logit, four keys at a time
// (keys are read once, 16 bytes per lane and key), the logits stay in shared memory, and their
// softmax is written to the workspace. A second launch adds the heads in index order, so that the
// result does not depend on timing.
//
// If a head has too many keys for shared memory, its logits are in the workspace.
//
// float32 inputs are multiplied and added in float64: one weight can dominate a softmax, and plain
// float32 errors of it do not average out.
//
// Bytes: keys once, B H T D elements; the softmax, B H T floats, written and read (3 % of the keys
// at D = 64, bf16).
#include <type_traits>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLanes = 8;       // per key
constexpr int kKeysAtOnce = 4;  // per lane: loads in flight
constexpr int kVectorBytes = 16;

// Type of sums and logits.
template <typename T>
using Sum = std::conditional_t<sizeof(T) == 4, double, float>;

template <typename S>
__device__ __forceinline__ S warp_max(S x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmax(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}

template <typename S>
__device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// q . k of some keys over this lane's share of the channels.
template <typename T>
__device__ __forceinline__ void partial_dots(const float* q, const T* const (&keys)[kKeysAtOnce],
                                             int dim, bool aligned, int lane,
                                             Sum<T> (&sums)[kKeysAtOnce]) {
  constexpr int kElements = kVectorBytes / sizeof(T);
  struct alignas(kVectorBytes) Vector {
    T v[kElements];
  };
  struct alignas(kVectorBytes) Queries {
    float of[kElements];
  };
  using S = Sum<T>;
  for (int d = lane * kElements; d < dim; d += kLanes * kElements) {
    if (aligned) {
      Vector loaded[kKeysAtOnce];
#pragma unroll
      for (int i = 0; i < kKeysAtOnce; ++i) {
        loaded[i] = *reinterpret_cast<const Vector*>(keys[i] + d);
      }
      const Queries query = *reinterpret_cast<const Queries*>(q + d);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
#pragma unroll
        for (int i = 0; i < kKeysAtOnce; ++i) {
          sums[i] =
              fma(static_cast<S>(query.of[e]), static_cast<S>(to_float(loaded[i].v[e])), sums[i]);
        }
      }
    } else {
      for (int e = 0; e < kElements && d + e < dim; ++e) {
#pragma unroll
        for (int i = 0; i < kKeysAtOnce; ++i) {
          sums[i] =
              fma(static_cast<S>(q[d + e]), static_cast<S>(to_float(keys[i][d + e])), sums[i]);
        }
      }
    }
  }
}

// Sums four values over eight lanes. Each lane passes on two of its values, then one, and returns
// the sum of the value with index `value`.
template <typename S>
__device__ __forceinline__ S sum_of_four(const S (&values)[kKeysAtOnce], int* value) {
  static_assert(kKeysAtOnce == 4 && kLanes == 8, "");
  const bool upper = threadIdx.x & 4, second = threadIdx.x & 2;
  const S even = (upper ? values[2] : values[0]) +
                 __shfl_xor_sync(kAllLanes, upper ? values[0] : values[2], 4);
  const S odd = (upper ? values[3] : values[1]) +
                __shfl_xor_sync(kAllLanes, upper ? values[1] : values[3], 4);
  S sum = (second ? odd : even) + __shfl_xor_sync(kAllLanes, second ? even : odd, 2);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  *value = 2 * upper + second;
  return sum;
}

VP_HD int64_t query_bytes(int head_dim) { return round_up(int64_t{head_dim} * 4, kVectorBytes); }

// Shared memory: the query (head_dim floats, whole vectors), then the dots (tokens sums). kFar: the
// dots are in `far_dots`, one array per block.
template <typename T, bool kFar>
__global__ void __launch_bounds__(kThreads,
                                  sizeof(T) == 4 ? 3 : 4)  // more blocks would cause spills
    softmax_kernel(ClsAttentionArgs args, Sum<T>* far_dots, float* weights) {
  VP_SHARED_MEMORY(shared);
  using S = Sum<T>;
  __shared__ S warp_highest[kWarps];
  __shared__ S warp_sums[kWarps];
  auto* q = reinterpret_cast<float*>(shared);
  S* dots = reinterpret_cast<S*>(shared + query_bytes(args.head_dim));  // later the weights
  if constexpr (kFar) {
    dots = far_dots + (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * args.tokens;
  }
  const auto scale = static_cast<S>(args.scale);
  const int head = blockIdx.x;
  const int64_t image = blockIdx.y;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  const T* query =
      static_cast<const T*>(args.q.data) + image * args.q.image_stride + head * args.q.head_stride;
  const T* keys =
      static_cast<const T*>(args.k.data) + image * args.k.image_stride + head * args.k.head_stride;
  for (int d = threadIdx.x; d < args.head_dim; d += kThreads) q[d] = to_float(query[d]);
  __syncthreads();

  constexpr int kElements = kVectorBytes / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(keys) % kVectorBytes == 0 &&
                       args.k.token_stride % kElements == 0 && args.head_dim % kElements == 0;
  S highest = -INFINITY;
  // All lanes of a warp run every iteration, because all take part in the shuffles. For keys past
  // the last one the last key is read, and the result is not used.
  constexpr int kApart = kThreads / kLanes;
  for (int base = 0; base < args.tokens; base += kKeysAtOnce * kApart) {
    const int first = base + static_cast<int>(threadIdx.x) / kLanes;
    const T* rows[kKeysAtOnce];
#pragma unroll
    for (int i = 0; i < kKeysAtOnce; ++i) {
      rows[i] = keys + min(first + i * kApart, args.tokens - 1) * args.k.token_stride;
    }
    S parts[kKeysAtOnce] = {};
    partial_dots(q, rows, args.head_dim, aligned, threadIdx.x % kLanes, parts);
    int key;
    const S dot = sum_of_four(parts, &key);
    const int token = first + key * kApart;
    if (token < args.tokens) {
      highest = fmax(highest, dot * scale);
      if (threadIdx.x % 2 == 0) dots[token] = dot;
    }
  }

  highest = warp_max(highest);
  if (lane == 0) warp_highest[warp] = highest;
  __syncthreads();  // all dots are written
  for (int w = 0; w < kWarps; ++w) highest = fmax(highest, warp_highest[w]);
  S sum = 0;
  for (int t = threadIdx.x; t < args.tokens; t += kThreads) {
    // Fused, so that the logit is not rounded. An error of `highest` cancels; one of the logit
    // would not.
    const float weight = expf(static_cast<float>(fma(dots[t], scale, -highest)));
    dots[t] = weight;  // below, each thread reads only its own
    sum += weight;
  }
  sum = warp_sum(sum);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += warp_sums[w];

  const int patches = args.tokens - 1;
  float* out = weights + (image * args.heads + head) * patches;
  for (int t = threadIdx.x; t < args.tokens; t += kThreads) {
    if (t > 0) out[t - 1] = static_cast<float>(dots[t] / sum);
  }
}

__global__ void __launch_bounds__(kThreads)
    head_mean_kernel(const float* weights, int heads, int patches, float* out) {
  const int t = blockIdx.x * kThreads + threadIdx.x;
  if (t >= patches) return;
  const int64_t image = blockIdx.y;
  const float* in = weights + image * heads * patches + t;
  float sum = 0.0f;
  for (int h = 0; h < heads; ++h) sum += in[static_cast<int64_t>(h) * patches];
  out[image * patches + t] = sum / static_cast<float>(heads);
}

template <typename T, bool kFar>
int run(ClsAttentionArgs args, const ClsAttentionLayout& at, float* out, unsigned char* workspace,
        Stream stream) {
  constexpr int64_t kMostImages = 32768;  // grid.y
  const int patches = args.tokens - 1;
  const int64_t images = args.images;
  for (int64_t done = 0; done < images; done += kMostImages) {
    const auto now =
        static_cast<unsigned>(images - done < kMostImages ? images - done : kMostImages);
    const dim3 heads_grid(args.heads, now), mean_grid((patches + kThreads - 1) / kThreads, now);
    float* weights = reinterpret_cast<float*>(workspace) + done * args.heads * patches;
    Sum<T>* dots = nullptr;
    if (kFar) {
      dots = reinterpret_cast<Sum<T>*>(workspace + at.dots) + done * args.heads * args.tokens;
    }
    if (const int e = launch<softmax_kernel<T, kFar>>(
            heads_grid, kThreads, static_cast<int>(at.shared_bytes), stream, args, dots, weights)) {
      return e;
    }
    if (const int e = launch<head_mean_kernel>(mean_grid, kThreads, 0, stream,
                                               static_cast<const float*>(weights), args.heads,
                                               patches, out + done * patches)) {
      return e;
    }
    args.q.data = static_cast<const T*>(args.q.data) + now * args.q.image_stride;
    args.k.data = static_cast<const T*>(args.k.data) + now * args.k.image_stride;
  }
  return 0;
}

}  // namespace

ClsAttentionLayout cls_attention_layout(const ClsAttentionArgs& args) {
  const int64_t sum_bytes = args.dtype == DType::kFloat32 ? sizeof(double) : sizeof(float);
  const int64_t query = query_bytes(args.head_dim);
  const int64_t heads = args.images * args.heads;
  ClsAttentionLayout at{};
  at.shared_bytes = args.tokens * sum_bytes + query;
  at.far = plan::choose(plan::current().cls_attention, at.shared_bytes) ==
           plan::ClsAttention::kWorkspace;
  at.dots = round_up(heads * (args.tokens - 1) * static_cast<int64_t>(sizeof(float)), 256);
  at.workspace_bytes = at.dots + (at.far ? heads * args.tokens * sum_bytes : 0);
  if (at.far) at.shared_bytes = query;
  return at;
}

int cls_attention(const ClsAttentionArgs& args, const ClsAttentionLayout& at, float* out,
                  void* workspace, Stream stream) {
  int limit = 0;
  if (const int e = shared_memory_limit(stream.device, &limit)) return e;
  if (at.shared_bytes > limit) {
    return refuse(
        "cls_attention: %d tokens and head_dim = %d take %lld bytes of shared memory per block, "
        "and this GPU has %d: use %s",
        args.tokens, args.head_dim, static_cast<long long>(at.shared_bytes), limit,
        at.far ? "vispruner_cuda.reference.cls_attention" : "cls_attention=auto");
  }
  auto* ws = static_cast<unsigned char*>(workspace);
  const auto run_as = [&](auto element) {
    using T = decltype(element);
    return at.far ? run<T, true>(args, at, out, ws, stream)
                  : run<T, false>(args, at, out, ws, stream);
  };
  switch (args.dtype) {
    case DType::kFloat16: return run_as(Half{});
    case DType::kBFloat16: return run_as(BFloat16{});
    default: return run_as(float{});
  }
}

}  // namespace vispruner::cuda
