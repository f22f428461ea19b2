// Exact integer Gram matrix on int8 tensor cores, and from it similarities, cosines or coverage.
//
// q + 2080 = 64 high + low, both digits unsigned bytes. Three int8 products, of the high digits, of
// the low digits and of their sums, give the exact 12-bit inner product (numerics.h: gram); 32-bit
// accumulators hold any C below 2^18. The sums are made in registers, by one addition of words: no
// byte carries into the next. Only tiles on or above the diagonal are computed; the epilogue writes
// both halves.
//
// Operations: 3 R^2 C / 2 multiply-adds per image. Bytes: 2 R C digits, read R / 64 times from L2,
// 4 R^2 written. A block: 64 x 64 outputs, 4 warps of 32 x 32 with 96 accumulators per lane, 64
// channels per step, three steps in flight (48 KiB: three blocks per multiprocessor on an H100, two
// with 100 KiB). If that leaves most of a GPU idle, twice as many blocks compute 32 x 64 outputs
// each, with more steps in flight. Blocks of 128 x 128, 8 warps of 64 x 32 each, read half as much
// from L2 and exist for measurements.
#include <type_traits>

#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kStep = 64;   // channels per stage
constexpr int kChunk = 16;  // bytes of one asynchronous copy
constexpr int kChunks = kStep / kChunk;
static_assert(kChannelAlign % kStep == 0, "digit rows are whole steps");

// The output of the kernel: the values of Matrix as types, so that kernels have readable names.
struct Similarities {};
struct Cosines {};
struct Coverages {};

// The shape of a block: warps of 16 kRowTiles x 32 outputs.
template <int kRows_, int kColumns_, int kRowTiles_, int kStages_, int kBlocks_>
struct Shape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kRowTiles = kRowTiles_;
  static constexpr int kWarpRows = 16 * kRowTiles, kWarpColumns = 32;
  static constexpr int kThreads = kRows / kWarpRows * (kColumns / kWarpColumns) * kWarp;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;                        // resident per multiprocessor
  static constexpr int kRowBytes = kDigitPlanes * kRows * kStep;  // per stage
  static constexpr int kStageBytes = kRowBytes + kDigitPlanes * kColumns * kStep;
  static constexpr int kOutStride = kColumns + 1;  // no bank conflicts down a column either
  static constexpr int kOutBytes = kRows * kOutStride * 4;  // reuses the memory of the stages
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kOutBytes ? kStages* kStageBytes : kOutBytes;
};
using Tiles32 = Shape<32, 64, 1, 6, 1>;
using Tiles64 = Shape<64, 64, 2, 3, 3>;
using Tiles128 = Shape<128, 128, 4, 3, 1>;

// Offset of chunk `chunk` of row `row` in a plane. One matrix load reads eight rows of one chunk,
// which are in eight different groups of banks. Eight rows further is a constant distance; two
// chunks further is the offset with 32 bytes flipped (exclusive or).
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * kStep + (chunk ^ ((row >> 1) & (kChunks - 1))) * kChunk;
}
constexpr uint32_t kOtherHalf = 2 * kChunk;

// The async copies one thread issues for one side of a stage (kRows rows of both planes). Rows and
// 16-byte chunks stay the same; only the channel offset advances, by kStep per stage.
template <int kRows, int kThreads>
struct SideCopies {
  static constexpr int kEach = kRows * kChunks / kThreads;  // per plane
  static constexpr int kApart = kThreads / kChunks;         // rows between them
  static_assert(kRows * kChunks % kThreads == 0 && kApart % 8 == 0, "");
  const int8_t* from[kEach];
  uint32_t to;

  __device__ __forceinline__ SideCopies(const int8_t* digits, int first_row, int rows,
                                        int64_t row_bytes, uint32_t shared) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      // Rows past the last one are not used.
      from[i] = digits + min(first_row + row + i * kApart, rows - 1) * row_bytes + chunk * kChunk;
    }
    to = shared + chunk_offset(row, chunk);
  }

  // Starts the copies of the next step.
  __device__ __forceinline__ void start(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int p = 0; p < kDigitPlanes; ++p) {
        copy_async_16(to + stage + (p * kRows + i * kApart) * kStep, from[i] + p * kStep);
      }
      from[i] += kDigitPlanes * kStep;
    }
  }
};

// 32 channels of a plane in the layout of the matrix instruction, of 16 rows or of two times 16
// columns. Each lane gives the address of one chunk.
struct RowOperand {
  uint32_t of[4];

  __device__ __forceinline__ static uint32_t chunk_of_lane(int row0) {
    const int lane = threadIdx.x % kWarp;
    return chunk_offset(row0 + lane % 16, lane / 16);
  }
  __device__ __forceinline__ void load(uint32_t chunk) { load_matrices(of, chunk); }
  __device__ __forceinline__ void add(const RowOperand& other) {
#pragma unroll
    for (int e = 0; e < 4; ++e) of[e] += other.of[e];
  }
};

struct ColumnOperand {
  uint32_t of[2][4];

  __device__ __forceinline__ static uint32_t chunk_of_lane(int column0) {
    const int lane = threadIdx.x % kWarp;
    return chunk_offset(column0 + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  __device__ __forceinline__ void load(uint32_t chunk) {
#pragma unroll
    for (int n = 0; n < 2; ++n) load_matrices(of[n], chunk + 16 * n * kStep);
  }
  __device__ __forceinline__ ColumnOperand plus(const ColumnOperand& other) const {
    ColumnOperand sum;
#pragma unroll
    for (int e = 0; e < 8; ++e) sum.of[e / 4][e % 4] = of[e / 4][e % 4] + other.of[e / 4][e % 4];
    return sum;
  }
};

// sums += rows . columns: four tiles of 16 x 8
__device__ __forceinline__ void multiply(const RowOperand& rows, const ColumnOperand& columns,
                                         int (&sums)[4][4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    multiply_add_s8(sums[n], rows.of, columns.of[n / 2][n % 2 * 2],
                    columns.of[n / 2][n % 2 * 2 + 1]);
  }
}

// Blocks per column of the matrix: down to the diagonal.
template <typename S>
VP_HD int blocks_of_column(int column) {
  return ((column + 1) * S::kColumns + S::kRows - 1) / S::kRows;
}

// The part of the matrix that block `t` computes.
template <typename S>
__device__ __forceinline__ void tile_of(int t, int* row0, int* column0) {
  int column = 0;
  for (; t >= blocks_of_column<S>(column); ++column) t -= blocks_of_column<S>(column);
  *row0 = t * S::kRows;
  *column0 = column * S::kColumns;
}

template <typename Output, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    gram_kernel(Batch batch, int64_t channels, float* cosines, unsigned char* workspace) {
  begin_dependent(batch.more);
  constexpr bool kCosine = std::is_same_v<Output, Cosines>;
  constexpr bool kCoverage = std::is_same_v<Output, Coverages>;
  VP_SHARED_MEMORY(shared);
  const Image image = batch[blockIdx.y];
  const int rows = image.shape.residual();
  int row0, column0;
  tile_of<S>(blockIdx.x, &row0, &column0);
  if (column0 >= rows || row0 >= rows) return;

  const WorkspaceLayout at = workspace_layout(image.shape.tokens, rows, channels, !kCosine);
  unsigned char* own = workspace + image.workspace;
  const auto* digits = reinterpret_cast<const int8_t*>(own + at.digits);
  const int64_t row_bytes = kDigitPlanes * at.padded_channels;
  const auto steps = static_cast<int>(at.padded_channels / kStep);

  const auto stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  SideCopies<S::kRows, S::kThreads> row_copies(digits, row0, rows, row_bytes, stages);
  SideCopies<S::kColumns, S::kThreads> column_copies(digits, column0, rows, row_bytes,
                                                     stages + S::kRowBytes);
#pragma unroll
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) {
      row_copies.start(step * S::kStageBytes);
      column_copies.start(step * S::kStageBytes);
    }
    copy_async_commit();
  }
  // The epilogue's values per row and column are loaded while the first stages are.
  __shared__ int own_sums[S::kRows + S::kColumns];
  __shared__ float own_inv[S::kRows + S::kColumns];
  for (int t = threadIdx.x; t < S::kRows + S::kColumns; t += S::kThreads) {
    const int row = min(t < S::kRows ? row0 + t : column0 + t - S::kRows, rows - 1);
    own_sums[t] = reinterpret_cast<const int*>(own + at.sums)[row];
    own_inv[t] = reinterpret_cast<const float*>(own + at.inv)[row];
  }

  const int warp = threadIdx.x / kWarp;
  constexpr int kAcross = S::kColumns / S::kWarpColumns;  // warps across the block's columns
  const int warp_row = warp / kAcross * S::kWarpRows;
  const int warp_column = warp % kAcross * S::kWarpColumns;
  int high_sums[S::kRowTiles][4][4] = {}, low_sums[S::kRowTiles][4][4] = {};
  int both_sums[S::kRowTiles][4][4] = {};

  const uint32_t row_chunk = stages + RowOperand::chunk_of_lane(warp_row);
  const uint32_t column_chunk = stages + S::kRowBytes + ColumnOperand::chunk_of_lane(warp_column);
  uint32_t stage = 0, free_stage = (S::kStages - 1) * S::kStageBytes;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<S::kStages - 2>();
    __syncthreads();  // all threads see the stage, and the one before it is free
    if (step + S::kStages - 1 < steps) {
      row_copies.start(free_stage);
      column_copies.start(free_stage);
    }
    copy_async_commit();
#pragma unroll
    for (int half = 0; half < kChunks / 2; ++half) {
      const uint32_t rows_at = (row_chunk + stage) ^ (half * kOtherHalf);
      const uint32_t columns_at = (column_chunk + stage) ^ (half * kOtherHalf);
      ColumnOperand high_columns, low_columns;
      high_columns.load(columns_at);
      low_columns.load(columns_at + S::kColumns * kStep);
      const ColumnOperand both_columns = high_columns.plus(low_columns);
#pragma unroll
      for (int m = 0; m < S::kRowTiles; ++m) {
        RowOperand high, low;
        high.load(rows_at + 16 * m * kStep);
        low.load(rows_at + (S::kRows + 16 * m) * kStep);
        multiply(high, high_columns, high_sums[m]);
        multiply(low, low_columns, low_sums[m]);
        high.add(low);
        multiply(high, both_columns, both_sums[m]);
      }
    }
    free_stage = stage;
    stage = stage == (S::kStages - 1) * S::kStageBytes ? 0 : stage + S::kStageBytes;
  }
  copy_async_wait<0>();
  __syncthreads();  // the last stage has been read: the output tile reuses its memory

  auto* out = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // One after the other: all at once would spill registers.
        not_before(high_sums[m][n][e]);
        not_before(both_sums[m][n][e]);
        not_before(low_sums[m][n][e]);
        const int row = warp_row + 16 * m + lane / 4 + e / 2 * 8;
        const int column = warp_column + 8 * n + lane % 4 * 2 + e % 2;
        out[row * S::kOutStride + column] = gram_to_float(
            gram_from_digits(high_sums[m][n][e], both_sums[m][n][e], low_sums[m][n][e],
                             own_sums[row], own_sums[S::kRows + column]));
      }
    }
  }
  __syncthreads();

  float* matrix = kCosine ? cosines + int64_t{blockIdx.y} * rows * rows
                          : reinterpret_cast<float*>(own + at.matrix);
  const int64_t ld = kCosine ? rows : at.ld;
  // The output for the inner product of token i and a token j >= i: of element (i, j) or, with
  // `mirrored`, of (j, i).
  const auto value = [&](float g, float inv_i, float inv_j, bool mirrored) {
    if constexpr (kCoverage) {
      return bits_float(coverage(similarity(g, inv_j) * inv_i));
    } else {
      const float s = similarity(g, mirrored ? inv_i : inv_j);
      return kCosine ? s * (mirrored ? inv_j : inv_i) : s;
    }
  };
  // A thread stays in its column of the matrix. Below the tile on the diagonal, the block of the
  // mirrored tile writes. Methods read whole vectors of coverage, so zeros follow the last column.
  const int own_column = threadIdx.x % S::kColumns, j = column0 + own_column;
  if (j < (kCoverage ? ld : rows)) {
    constexpr int kApart = S::kThreads / S::kColumns;
    const float inv_j = j < rows ? own_inv[S::kRows + own_column] : 0.0f;
    const int begin = threadIdx.x / S::kColumns;
    const int end = min(min(rows, column0 + S::kColumns) - row0, S::kRows);
    float* to = matrix + (row0 + begin) * ld + j;
    for (int r = begin; r < end; r += kApart, to += kApart * ld) {
      const float g = out[r * S::kOutStride + own_column];
      if (kCoverage && row0 + r > j) {  // below the diagonal
        *to = value(g, inv_j, own_inv[r], true);
      } else {
        *to = value(g, own_inv[r], inv_j, false);
      }
    }
  }
  const int own_row = threadIdx.x % S::kRows, i = row0 + own_row;
  if (i < column0) {  // above that tile
    constexpr int kApart = S::kThreads / S::kRows;
    const float inv_i = own_inv[own_row];
    const int begin = threadIdx.x / S::kRows, end = min(rows - column0, S::kColumns);
    float* to = matrix + (column0 + begin) * ld + i;
    for (int c = begin; c < end; c += kApart, to += kApart * ld) {
      *to = value(out[own_row * S::kOutStride + c], inv_i, own_inv[S::kRows + c], true);
    }
  }
}

}  // namespace

int gram(const Batch& batch, const WaveSize& size, int64_t channels, Matrix matrix, float* out,
         void* workspace, Stream stream) {
  const auto run = [&](auto of, auto shape) {
    using S = decltype(shape);
    int blocks = 0;
    for (int column = 0; column * S::kColumns < size.residual; ++column) {
      blocks += blocks_of_column<S>(column);
    }
    return launch_dependent<gram_kernel<decltype(of), S>>(
        dim3(blocks, size.images), S::kThreads, S::kSharedBytes, stream, batch, channels, out,
        static_cast<unsigned char*>(workspace));
  };
  const int64_t tiles = (size.residual + 63) / 64;
  const plan::Gram plan = plan::choose(plan::current().gram, tiles * (tiles + 1) / 2 * size.images);
  const auto shaped = [&](auto of) {
    switch (plan) {
      case plan::Gram::kTiles32: return run(of, Tiles32{});
      case plan::Gram::kTiles128: return run(of, Tiles128{});
      default: return run(of, Tiles64{});
    }
  };
  switch (matrix) {
    case Matrix::kCosine: return shaped(Cosines{});
    case Matrix::kCoverage: return shaped(Coverages{});
    default: return shaped(Similarities{});
  }
}

}  // namespace vispruner::cuda
