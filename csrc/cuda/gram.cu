// Exact integer Gram matrix on int8 tensor cores, and from it similarities or cosines.
//
// q = 64 hi + lo. Three int8 products, of the digits hi, of the digits lo and of their sums
// hi + lo, give the exact 12-bit inner product (numerics.h: gram_from_digits); int32 accumulators
// hold any C below 2^19. The sums are made in registers: what is scarce in a batch is not
// arithmetic but bytes from L2. Only tiles on or above the diagonal are computed; the epilogue
// writes both halves.
//
// Operations: 3 R^2 C / 2 multiply-adds an image. Bytes: 2 R C digits, read R / 64 times from L2,
// 4 R^2 written. A block: 64 x 64 outputs, 4 warps of 32 x 32 with 96 accumulators a lane, 64
// channels a step, four steps in flight. Where that leaves most of a GPU idle, twice as many
// blocks take 32 x 64 outputs each, with more steps in flight. Blocks of 128 x 64 read a quarter
// less from L2 and are there to be measured.
#include <type_traits>

#include "batch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kTile = 64;   // columns of a block
constexpr int kStep = 64;   // channels a stage
constexpr int kChunk = 16;  // bytes of one asynchronous copy
constexpr int kChunks = kStep / kChunk;
constexpr int kOutStride = kTile + 1;  // no bank conflicts down a column either
static_assert(kChannelAlign % kStep == 0, "digit rows are whole steps");

// What a block of so many rows is made of.
template <int kRows_>
struct Shape {
  static constexpr int kRows = kRows_;
  static constexpr int kRowTiles = kRows == 32 ? 1 : 2;  // 16-row tiles of a warp
  static constexpr int kThreads = kRows / (16 * kRowTiles) * (kTile / 32) * kWarp;
  static constexpr int kBlocks = kRows == 64 ? 3 : 1;  // side by side on a multiprocessor
  static constexpr int kStages = kRows == 32 ? 6 : 4;
  static constexpr int kRowBytes = kDigitPlanes * kRows * kStep;  // of a stage
  static constexpr int kStageBytes = kRowBytes + kDigitPlanes * kTile * kStep;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes >= kRows * kOutStride * 4, "the epilogue reuses the memory");
};

// Where chunk `chunk` of row `row` lies in a plane: eight rows of one chunk, which one matrix load
// reads, fall into eight different groups of banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kStep + (chunk ^ ((row >> 1) & (kChunks - 1))) * kChunk;
}

// Copies of one side of a stage, kRows rows of both planes, which a thread makes: each time of the
// same chunk of 16 bytes of the same rows, kStep channels further on.
template <int kRows, int kThreads>
struct SideCopies {
  static constexpr int kEach = kRows * kChunks / kThreads;  // of a plane
  static_assert(kRows * kChunks % kThreads == 0 && kThreads % kChunks == 0, "");
  uint32_t from[kEach];  // in 16 bytes: 32 bits are enough for any image

  __device__ __forceinline__ SideCopies(int first_row, int rows, int64_t padded_channels) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = min(first_row + row_of(i), rows - 1);  // those past the last are not used
      from[i] = static_cast<uint32_t>(row * (padded_channels / kChunk)) + threadIdx.x % kChunks;
    }
  }

  __device__ __forceinline__ static int row_of(int i) {
    return (threadIdx.x + i * kThreads) / kChunks;
  }

  __device__ __forceinline__ void start(unsigned char* shared, const int8_t* digits, int64_t plane,
                                        int step) const {
#pragma unroll
    for (int p = 0; p < kDigitPlanes; ++p) {
      const int8_t* channels = digits + p * plane + step * kStep;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        copy_async_16(shared + p * kRows * kStep + chunk_offset(row_of(i), threadIdx.x % kChunks),
                      channels + uint64_t{from[i]} * kChunk);
      }
    }
  }
};

// Four int8 sums in a word; none of them overflows.
__device__ __forceinline__ uint32_t add_bytes(uint32_t a, uint32_t b) {
  constexpr uint32_t kSigns = 0x80808080u;
  return ((a & ~kSigns) + (b & ~kSigns)) ^ ((a ^ b) & kSigns);
}

// A warp's operands of one plane: 32 channels of its rows and of its 32 columns.
template <int kRowTiles>
struct Operands {
  uint32_t rows[kRowTiles][4];
  uint32_t columns[2][4];

  __device__ __forceinline__ void load(const unsigned char* row_plane,
                                       const unsigned char* column_plane, int row0, int column0,
                                       int half) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int row = row0 + 16 * m + lane % 16;
      load_matrices(rows[m], row_plane + chunk_offset(row, 2 * half + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = column0 + 16 * n + lane % 8 + lane / 16 * 8;
      load_matrices(columns[n], column_plane + chunk_offset(column, 2 * half + lane / 8 % 2));
    }
  }

  __device__ __forceinline__ void add(const Operands& other) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) rows[m][e] = add_bytes(rows[m][e], other.rows[m][e]);
#pragma unroll
      for (int n = 0; n < 2; ++n) columns[n][e] = add_bytes(columns[n][e], other.columns[n][e]);
    }
  }

  // sums[m][n] += rows . columns, kRowTiles x 4 tiles of 16 x 8
  __device__ __forceinline__ void multiply(int (&sums)[kRowTiles][4][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        multiply_add_s8(sums[m][n], rows[m], columns[n / 2][n % 2 * 2],
                        columns[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
};

// Blocks of a column of the matrix: down to the diagonal.
template <int kRows>
VP_HD int blocks_of_column(int column) {
  return ((column + 1) * kTile + kRows - 1) / kRows;
}

// The part of the matrix that block `t` computes.
template <int kRows>
__device__ __forceinline__ void tile_of(int t, int* row0, int* column0) {
  int column = 0;
  for (; t >= blocks_of_column<kRows>(column); ++column) t -= blocks_of_column<kRows>(column);
  *row0 = t * kRows;
  *column0 = column * kTile;
}

template <bool kCosine, typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    gram_kernel(Batch batch, int64_t channels, float* cosines, unsigned char* workspace) {
  begin_dependent();
  VP_SHARED_MEMORY(shared);
  const Image image = batch[blockIdx.y];
  const int rows = image.shape.residual();
  int row0, column0;
  tile_of<S::kRows>(blockIdx.x, &row0, &column0);
  if (column0 >= rows || row0 >= rows) return;

  const WorkspaceLayout at = workspace_layout(image.shape.tokens, rows, channels, !kCosine);
  unsigned char* own = workspace + image.workspace;
  const auto* digits = reinterpret_cast<const int8_t*>(own + at.digits);
  const int64_t plane = rows * at.padded_channels;
  const auto steps = static_cast<int>(at.padded_channels / kStep);

  const SideCopies<S::kRows, S::kThreads> row_copies(row0, rows, at.padded_channels);
  const SideCopies<kTile, S::kThreads> column_copies(column0, rows, at.padded_channels);
  const auto load_stage = [&](int step) {
    unsigned char* stage = shared + step % S::kStages * S::kStageBytes;
    row_copies.start(stage, digits, plane, step);
    column_copies.start(stage + S::kRowBytes, digits, plane, step);
  };

  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / 2 * 16 * S::kRowTiles, warp_column = warp % 2 * 32;
  int high_sums[S::kRowTiles][4][4] = {}, low_sums[S::kRowTiles][4][4] = {};
  int both_sums[S::kRowTiles][4][4] = {};

#pragma unroll
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) load_stage(step);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<S::kStages - 2>();
    __syncthreads();  // the stage is here for all, and the one before it is free
    if (step + S::kStages - 1 < steps) load_stage(step + S::kStages - 1);
    copy_async_commit();
    const unsigned char* row_planes = shared + step % S::kStages * S::kStageBytes;
    const unsigned char* column_planes = row_planes + S::kRowBytes;
#pragma unroll
    for (int half = 0; half < kChunks / 2; ++half) {
      Operands<S::kRowTiles> high, low;
      high.load(row_planes, column_planes, warp_row, warp_column, half);
      low.load(row_planes + S::kRows * kStep, column_planes + kTile * kStep, warp_row, warp_column,
               half);
      high.multiply(high_sums);
      low.multiply(low_sums);
      high.add(low);
      high.multiply(both_sums);
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // the last stage has been read: its memory becomes the output tile

  auto* out = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // One after the other: all at once, they would spill registers.
        not_before(high_sums[m][n][e], both_sums[m][n][e], low_sums[m][n][e]);
        const int row = warp_row + 16 * m + lane / 4 + e / 2 * 8;
        const int column = warp_column + 8 * n + lane % 4 * 2 + e % 2;
        out[row * kOutStride + column] = gram_to_float(
            gram_from_digits(high_sums[m][n][e], both_sums[m][n][e], low_sums[m][n][e]));
      }
    }
  }
  __syncthreads();

  const auto* inv = reinterpret_cast<const float*>(own + at.inv);
  float* matrix = kCosine ? cosines + int64_t{blockIdx.y} * rows * rows
                          : reinterpret_cast<float*>(own + at.gram);
  const int64_t ld = kCosine ? rows : at.ld;
  const auto write = [&](int i, int j, float gram, float inv_j) {
    const float s = similarity(gram, inv_j);
    matrix[i * ld + j] = kCosine ? s * inv[i] : s;
  };
  // A thread stays in its column of the matrix. Below the tile on the diagonal, the mirrored half
  // of another block writes.
  const int j = column0 + threadIdx.x % kTile;
  if (j < rows) {
    const float inv_j = inv[j];
    const int end = min(min(rows, column0 + kTile) - row0, S::kRows);
    for (int r = threadIdx.x / kTile; r < end; r += S::kThreads / kTile) {
      write(row0 + r, j, out[r * kOutStride + threadIdx.x % kTile], inv_j);
    }
  }
  const int mirrored = row0 + threadIdx.x % S::kRows;
  if (mirrored < column0) {  // above that tile
    const float inv_j = inv[mirrored];
    const int end = min(rows - column0, kTile);
    for (int c = threadIdx.x / S::kRows; c < end; c += S::kThreads / S::kRows) {
      write(column0 + c, mirrored, out[threadIdx.x % S::kRows * kOutStride + c], inv_j);
    }
  }
}

}  // namespace

// VISPRUNER_GRAM_PLAN=tiles_128|tiles_64|tiles_32 asks for blocks of so many rows.
int gram(const Batch& batch, const WaveSize& size, int64_t channels, float* out, void* workspace,
         void* stream) {
  constexpr const char* kPlan = "VISPRUNER_GRAM_PLAN";
  const auto run = [&](auto cosine, auto shape) {
    using S = decltype(shape);
    int blocks = 0;
    for (int column = 0; column * kTile < size.residual; ++column) {
      blocks += blocks_of_column<S::kRows>(column);
    }
    return launch_dependent<gram_kernel<cosine(), S>>(dim3(blocks, size.images), S::kThreads,
                                                      S::kSharedBytes, stream, batch, channels, out,
                                                      static_cast<unsigned char*>(workspace));
  };
  const int64_t tiles = (size.residual + kTile - 1) / kTile;
  const bool few = tiles * (tiles + 1) / 2 * size.images <= kFewBlocks;
  const auto shaped = [&](auto cosine) {
    if (plan_asked(kPlan, "tiles_128")) return run(cosine, Shape<128>{});
    if (plan_asked(kPlan, "tiles_32")) return run(cosine, Shape<32>{});
    return few && !plan_asked(kPlan, "tiles_64") ? run(cosine, Shape<32>{})
                                                 : run(cosine, Shape<64>{});
  };
  return out ? shaped(std::true_type{}) : shaped(std::false_type{});
}

}  // namespace vispruner::cuda
