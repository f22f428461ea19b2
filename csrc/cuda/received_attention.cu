// Received attention: column means of softmax(Q K^T) over all queries and heads, without
// materializing the N x N matrix.
//
// Two passes of one kernel over tiles of Q K^T. A block has 64 fixed rows of one head and iterates
// over all tiles of 64 columns. First pass: rows are queries, columns keys, and the running
// log-sum-exp of each row is stored (skipped if the caller has it from a flash forward). Second
// pass: rows are keys, columns queries, and exp(logit - lse of the query) is summed along the row.
// A last launch adds the heads in index order. Nothing depends on timing or on other images.
//
// A wide block has tiles of 64 columns. If these do not fit into shared memory (many channels per
// head on a GPU with 99 KiB), a narrow block has tiles of 16 columns.
//
// Operations: 2 N^2 D H multiply-adds on tensor cores (fp16, bf16) and 2 N^2 H exponentials, half
// of both with an lse. Bytes: N D elements of each operand N / 64 times from L2.
#include <cfloat>
#include <vector>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kWarpRows = kRows / (kThreads / kWarp);
constexpr int kVectorBytes = 16;
static_assert(kWarpRows == 16, "the rows of one matrix instruction");

// Channels of a row in shared memory: whole matrix instructions, and 16 bytes more, so that the
// eight rows of a matrix load are in different banks.
template <typename T>
VP_HD int row_elements(int head_dim) {
  constexpr int kStep = 32 / sizeof(T);
  return static_cast<int>(round_up(head_dim, kStep)) + kVectorBytes / static_cast<int>(sizeof(T));
}

// The column tiles of a block. With two buffers the next tile is loaded while this one is used.
template <typename T, int kColumns_, int kBuffers_>
struct Shape {
  static constexpr int kColumns = kColumns_;
  static constexpr int kBuffers = kBuffers_;
  static constexpr int kMatrices = kColumns / 8;

  VP_HD static int64_t shared_bytes(int head_dim) {
    return int64_t{kRows + kBuffers * kColumns} * row_elements<T>(head_dim) * sizeof(T);
  }
};
template <typename T>
using Wide = Shape<T, 64, sizeof(T) == 2 ? 2 : 1>;
template <typename T>
using Narrow = Shape<T, 16, 1>;

// Logits and their exponentials are to the base 2 for 16-bit inputs, whose rounding is far coarser
// than the 2^-22 of the instruction, and to the base e, by the accurate functions, for float32.
template <typename T>
struct Exponential {
  static constexpr bool kBase2 = sizeof(T) == 2;
  static constexpr float kOfNatural = kBase2 ? 1.4426950408889634f : 1.0f;  // logits, a factor

  __device__ __forceinline__ static float exp(float x) {
    if constexpr (kBase2) {
      return exp2_approximate(x);
    } else {
      return expf(x);
    }
  }
  __device__ __forceinline__ static float log(float x) {
    if constexpr (kBase2) {
      return log2f(x);
    } else {
      return logf(x);
    }
  }
};

// kTileRows rows of an operand from `first` on; zeros beyond `rows` rows, and to the end of the
// last vector of head_dim channels. (The rest up to the stride is cleared once.)
template <int kTileRows, typename T>
__device__ __forceinline__ void load_tile(T* shared, const T* data, int64_t token_stride, int first,
                                          int rows, int head_dim, bool aligned) {
  constexpr int kElements = kVectorBytes / sizeof(T);
  const int stride = row_elements<T>(head_dim);
  const int vectors = (head_dim + kElements - 1) / kElements;
  // Vector by vector, row by row; the next one of a thread is kThreads further on.
  const int down = kThreads / vectors, right = kThreads % vectors;
  int row = threadIdx.x / vectors, vector = threadIdx.x % vectors;
  const T* from = data + (first + row) * token_stride + vector * kElements;
  auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) +
            (row * stride + vector * kElements) * static_cast<uint32_t>(sizeof(T));
  const bool whole = aligned && head_dim % kElements == 0 && first + kTileRows <= rows;
  while (row < kTileRows) {
    if (whole) {
      copy_async_16(to, from);
    } else {
      const int d = vector * kElements;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const bool inside = first + row < rows && d + e < head_dim;
        shared[row * stride + d + e] = inside ? from[e] : T{};
      }
    }
    row += down;
    vector += right;
    from += down * token_stride + right * kElements;
    to += (down * stride + right * kElements) * static_cast<uint32_t>(sizeof(T));
    if (vector >= vectors) {
      vector -= vectors;
      ++row;
      from += token_stride - vectors * kElements;
      to += (stride - vectors * kElements) * static_cast<uint32_t>(sizeof(T));
    }
  }
}

// Zeros after the channels of all rows, which the matrix instructions read as well.
template <typename T>
__device__ __forceinline__ void clear_padding(T* shared, int rows, int head_dim) {
  constexpr int kElements = kVectorBytes / sizeof(T);
  const int stride = row_elements<T>(head_dim);
  const int begin = (head_dim + kElements - 1) / kElements * kElements;
  for (int d = begin; d < stride - kElements; ++d) {
    for (int row = threadIdx.x; row < rows; row += kThreads) shared[row * stride + d] = T{};
  }
}

// One warp: logits[n][e] = rows (16 from `row0`) . columns, in the layout of a matrix instruction:
// element e of tile n is row lane / 4 + 8 (e / 2), column 8 n + 2 (lane % 4) + e % 2.
template <int kMatrices, typename T>
__device__ __forceinline__ void tile_product(const T* rows, const T* columns, int head_dim,
                                             int row0, float (&logits)[kMatrices][4]) {
  const int stride = row_elements<T>(head_dim);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kMatrices; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) logits[n][e] = 0.0f;
  }
  if constexpr (sizeof(T) == 2) {
    const uint32_t row_bytes = stride * sizeof(T);
    uint32_t a_at = static_cast<uint32_t>(__cvta_generic_to_shared(rows)) +
                    (row0 + lane % 16) * row_bytes + lane / 16 * kVectorBytes;
    uint32_t b_at = static_cast<uint32_t>(__cvta_generic_to_shared(columns)) +
                    (lane % 8 + lane / 16 * 8) * row_bytes + lane / 8 % 2 * kVectorBytes;
    for (int d = 0; d < head_dim; d += 16) {
      uint32_t a[4];
      load_matrices(a, a_at);
#pragma unroll
      for (int n = 0; n < kMatrices; n += 2) {
        uint32_t b[4];
        load_matrices(b, b_at + n * (8 * row_bytes));
        multiply_add(logits[n], a, b[0], b[1], T{});
        multiply_add(logits[n + 1], a, b[2], b[3], T{});
      }
      a_at += 2 * kVectorBytes;
      b_at += 2 * kVectorBytes;
    }
  } else {  // float32 without tensor cores, which are not exact enough
    // Sums of sixteen channels, and the sum of those: a long chain of additions loses digits.
    constexpr int kChunk = 16;
    const int row = row0 + lane / 4, column = 2 * (lane % 4);
    for (int begin = 0; begin < head_dim; begin += kChunk) {
      float part[kMatrices][4] = {};
      const int end = begin + kChunk < head_dim ? begin + kChunk : head_dim;
      for (int d = begin; d < end; ++d) {
        const float upper = rows[row * stride + d], lower = rows[(row + 8) * stride + d];
#pragma unroll
        for (int n = 0; n < kMatrices; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float x = columns[(8 * n + column + c) * stride + d];
            part[n][c] = fmaf(upper, x, part[n][c]);
            part[n][2 + c] = fmaf(lower, x, part[n][2 + c]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kMatrices; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) logits[n][e] += part[n][e];
      }
    }
  }
}

// One operand of one image and head.
template <typename T>
struct Operand {
  const T* data;
  int64_t token_stride;
  bool aligned;
};

template <typename T>
__device__ __forceinline__ Operand<T> operand(const HeadsView& view, int64_t first_token,
                                              int head) {
  constexpr int kElements = kVectorBytes / sizeof(T);
  const T* data =
      static_cast<const T*>(view.data) + first_token * view.token_stride + head * view.head_stride;
  const bool aligned =
      reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && view.token_stride % kElements == 0;
  return {data, view.token_stride, aligned};
}

// kColumnSums = false: out = log-sum-exp of each query's logits, lse not used.
// kColumnSums = true: out = sum over queries of exp(logit - lse) for each key.
// out and lse are (heads, rows of all images). Everything is to the base of Exponential<T>: `scale`
// includes its factor, and `lse_scale` converts lse to it.
template <typename T, bool kColumnSums, typename S>
__global__ void __launch_bounds__(kThreads)
    pass_kernel(Batch batch, HeadsView row_view, HeadsView column_view, int head_dim, float scale,
                const float* lse, int64_t lse_head_stride, int64_t lse_token_stride,
                float lse_scale, float* out, int64_t out_head_stride) {
  VP_SHARED_MEMORY(shared);
  using E = Exponential<T>;
  constexpr int kMatrices = S::kMatrices;
  alignas(8) __shared__ float column_lse[2][S::kColumns];
  const Image image = batch[blockIdx.z];
  const int tokens = image.shape.tokens, head = blockIdx.y;
  const int first_row = blockIdx.x * kRows;
  if (first_row >= tokens) return;

  const int row_size = row_elements<T>(head_dim);
  T* row_tile = reinterpret_cast<T*>(shared);
  T* column_tiles = row_tile + kRows * row_size;
  const auto column_tile = [&](int tile) {
    return column_tiles + tile % S::kBuffers * S::kColumns * row_size;
  };
  const auto row_operand = operand<T>(row_view, image.first_kept, head);
  const auto column_operand = operand<T>(column_view, image.first_kept, head);

  // Starts the copies and commits them: a wait covers committed copies only.
  const auto load_columns = [&](int tile) {
    load_tile<S::kColumns>(column_tile(tile), column_operand.data, column_operand.token_stride,
                           tile * S::kColumns, tokens, head_dim, column_operand.aligned);
    copy_async_commit();
    if (kColumnSums && threadIdx.x < S::kColumns) {
      const int token = tile * S::kColumns + static_cast<int>(threadIdx.x);
      const float* from = lse + head * lse_head_stride + image.first_kept * lse_token_stride;
      column_lse[tile % 2][threadIdx.x] =
          token < tokens ? from[token * lse_token_stride] * lse_scale : 0.0f;
    }
  };
  clear_padding(row_tile, kRows + S::kBuffers * S::kColumns, head_dim);
  load_tile<kRows>(row_tile, row_operand.data, row_operand.token_stride, first_row, tokens,
                   head_dim, row_operand.aligned);
  load_columns(0);

  const int lane = threadIdx.x % kWarp;
  const int row0 = static_cast<int>(threadIdx.x) / kWarp * kWarpRows;
  // Of two rows per lane. The initial value is finite, so that its difference from columns which do
  // not exist is not NaN.
  float highest[2] = {-FLT_MAX, -FLT_MAX}, sum[2] = {0.0f, 0.0f};
  const int tiles = (tokens + S::kColumns - 1) / S::kColumns;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<0>();
    __syncthreads();  // all threads see this tile, and the one before it is free
    if (S::kBuffers == 2 && tile + 1 < tiles) load_columns(tile + 1);

    float logits[kMatrices][4];
    tile_product(row_tile, column_tile(tile), head_dim, row0, logits);
    if (S::kBuffers == 1) {
      __syncthreads();  // the tile has been read
      if (tile + 1 < tiles) load_columns(tile + 1);
    }
    struct alignas(8) Pair {
      float of[2];
    };
    const auto* lse_of_lane = reinterpret_cast<const Pair*>(column_lse[tile % 2]) + lane % 4;
#pragma unroll
    for (int n = 0; n < kMatrices; ++n) {
      Pair lse_of_query{};
      if (kColumnSums) lse_of_query = lse_of_lane[4 * n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& logit = logits[n][e];
        logit = kColumnSums ? fmaf(logit, scale, -lse_of_query.of[e % 2]) : logit * scale;
      }
    }
    if ((tile + 1) * S::kColumns > tokens) {  // the last one
      const int first_column = tile * S::kColumns + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kMatrices; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (first_column + 8 * n + e % 2 >= tokens) logits[n][e] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_sum = 0.0f, tile_highest = highest[half];
      if constexpr (!kColumnSums) {
#pragma unroll
        for (int i = 0; i < 2 * kMatrices; ++i) {
          tile_highest = fmaxf(tile_highest, logits[i / 2][2 * half + i % 2]);
        }
        sum[half] *= E::exp(highest[half] - tile_highest);
        highest[half] = tile_highest;
      }
#pragma unroll
      for (int i = 0; i < 2 * kMatrices; ++i) {
        const float logit = logits[i / 2][2 * half + i % 2];
        tile_sum += E::exp(kColumnSums ? logit : logit - tile_highest);
      }
      sum[half] += tile_sum;
    }
  }

  // Four lanes share a row.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      const float other_sum = __shfl_xor_sync(kAllLanes, sum[half], offset);
      if constexpr (kColumnSums) {
        sum[half] += other_sum;
      } else {
        const float other = __shfl_xor_sync(kAllLanes, highest[half], offset);
        const float both = fmaxf(highest[half], other);
        sum[half] = sum[half] * E::exp(highest[half] - both) + other_sum * E::exp(other - both);
        highest[half] = both;
      }
    }
    const int row = first_row + row0 + lane / 4 + 8 * half;
    if (lane % 4 == 0 && row < tokens) {
      out[head * out_head_stride + image.first_kept + row] =
          kColumnSums ? sum[half] : highest[half] + E::log(sum[half]);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    mean_kernel(Batch batch, const float* sums, int heads, int64_t head_stride, float* out) {
  const Image image = batch[blockIdx.y];
  const int token = blockIdx.x * kThreads + threadIdx.x;
  if (token >= image.shape.tokens) return;
  const float* in = sums + image.first_kept + token;
  float sum = 0.0f;
  for (int h = 0; h < heads; ++h) sum += in[h * head_stride];
  out[image.first_kept + token] =
      sum / (static_cast<float>(heads) * static_cast<float>(image.shape.tokens));
}

// Byte offsets in the workspace, which begins with the table of images.
struct Offsets {
  int64_t lse;   // float (heads, rows), unless the caller has it
  int64_t sums;  // float (heads, rows)
  int64_t bytes;
};

Offsets offsets(const ReceivedAttentionArgs& args) {
  const int64_t table = round_up(args.images * static_cast<int64_t>(sizeof(Image)), 256);
  const int64_t floats = round_up(args.heads * args.rows() * 4, 256);
  const int64_t sums = table + (args.lse ? 0 : floats);
  return {table, sums, sums + floats};
}

template <typename T, typename S>
int run(const ReceivedAttentionArgs& args, float* out, const Image* table, float* own_lse,
        float* sums, Stream stream) {
  constexpr int64_t kMostImages = 32768;  // grid.y and grid.z
  const auto shared = static_cast<int>(S::shared_bytes(args.head_dim));
  const int64_t rows = args.rows();
  const float scale = args.scale * Exponential<T>::kOfNatural;
  for (int64_t begin = 0; begin < args.images; begin += kMostImages) {
    const int64_t end = begin + kMostImages < args.images ? begin + kMostImages : args.images;
    const auto images = static_cast<unsigned>(end - begin);
    int64_t longest = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tokens = args.bounds[i + 1] - args.bounds[i];
      longest = tokens > longest ? tokens : longest;
    }
    if (longest == 0) continue;
    Batch batch{};
    batch.table = table + begin;
    const dim3 grid(static_cast<unsigned>((longest + kRows - 1) / kRows), args.heads, images);
    if (!args.lse) {
      if (const int e = launch<pass_kernel<T, false, S>>(
              grid, kThreads, shared, stream, batch, args.q, args.k, args.head_dim, scale,
              static_cast<const float*>(nullptr), int64_t{0}, int64_t{0}, 1.0f, own_lse, rows)) {
        return e;
      }
    }
    const float* lse = args.lse ? args.lse : own_lse;
    const int64_t head_stride = args.lse ? args.lse_head_stride : rows;
    const int64_t token_stride = args.lse ? args.lse_token_stride : 1;
    if (const int e = launch<pass_kernel<T, true, S>>(
            grid, kThreads, shared, stream, batch, args.k, args.q, args.head_dim, scale, lse,
            head_stride, token_stride, args.lse ? Exponential<T>::kOfNatural : 1.0f, sums, rows)) {
      return e;
    }
    const dim3 mean_grid(static_cast<unsigned>((longest + kThreads - 1) / kThreads), images);
    if (const int e = launch<mean_kernel>(mean_grid, kThreads, 0, stream, batch,
                                          static_cast<const float*>(sums), args.heads, rows, out)) {
      return e;
    }
  }
  return 0;
}

template <typename T>
int run_planned(const ReceivedAttentionArgs& args, float* out, const Image* table, float* lse,
                float* sums, Stream stream) {
  int limit = 0;
  if (const int e = shared_memory_limit(stream.device, &limit)) return e;
  const int64_t wide = Wide<T>::shared_bytes(args.head_dim);
  const plan::ReceivedAttention plan =
      plan::choose(plan::current().received_attention, wide, limit);
  const bool is_wide = plan == plan::ReceivedAttention::kWide;
  const int64_t bytes = is_wide ? wide : Narrow<T>::shared_bytes(args.head_dim);
  if (bytes > limit) {
    return refuse(
        "received_attention: head_dim = %d takes %lld bytes of shared memory per block%s, and this "
        "GPU has %d: use %s",
        args.head_dim, static_cast<long long>(bytes),
        is_wide ? " with received_attention=wide" : "", limit,
        is_wide ? "received_attention=auto" : "vispruner_cuda.reference.received_attention");
  }
  return is_wide ? run<T, Wide<T>>(args, out, table, lse, sums, stream)
                 : run<T, Narrow<T>>(args, out, table, lse, sums, stream);
}

}  // namespace

int64_t received_attention_workspace_bytes(const ReceivedAttentionArgs& args) {
  return offsets(args).bytes;
}

int received_attention(const ReceivedAttentionArgs& args, float* out, void* workspace,
                       Stream stream) {
  auto* base = static_cast<unsigned char*>(workspace);
  const Offsets at = offsets(args);
  auto* table = reinterpret_cast<Image*>(base);
  auto* lse = reinterpret_cast<float*>(base + at.lse);
  auto* sums = reinterpret_cast<float*>(base + at.sums);
  std::vector<Image> images(static_cast<size_t>(args.images));
  for (int64_t i = 0; i < args.images; ++i) {
    Image& image = images[static_cast<size_t>(i)];
    image.shape.tokens = static_cast<int>(args.bounds[i + 1] - args.bounds[i]);
    image.first_kept = args.bounds[i];
  }
  if (const int e = write_table(images.data(), static_cast<int>(args.images), table, stream)) {
    return e;
  }
  switch (args.dtype) {
    case DType::kFloat16: return run_planned<Half>(args, out, table, lse, sums, stream);
    case DType::kBFloat16: return run_planned<BFloat16>(args, out, table, lse, sums, stream);
    default: return run_planned<float>(args, out, table, lse, sums, stream);
  }
}

}  // namespace vispruner::cuda
