// Exact integer Gram matrix on int8 tensor cores, and from it similarities or cosines.
//
// q = 64 hi + lo. With the digit planes hi, lo and hi + lo, three int8 products give the exact
// 12-bit inner product (numerics.h: gram_from_digits); int32 accumulators hold any C below 2^19.
// Only tiles on or above the diagonal are computed; the epilogue writes both halves.
//
// Operations: 3 R^2 C / 2 multiply-adds an image. Bytes: 3 R C digits read R / 64 times from L2,
// 4 R^2 written. A block: 64 x 64 outputs, 4 warps of 32 x 32 with 96 accumulators a lane, 64
// channels a step, three steps in flight. Where that leaves most of a GPU idle, twice as many
// blocks take 32 x 64 outputs each.
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "batch.cuh"
#include "vispruner/cuda.h"

namespace vispruner::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 64;       // columns of a block
constexpr int kFewBlocks = 64;  // so few blocks are halved: the smallest GPUs have that many SMs
constexpr int kStep = 64;       // channels a stage
constexpr int kStages = 3;
constexpr int kChunk = 16;  // bytes of one asynchronous copy
constexpr int kChunks = kStep / kChunk;
constexpr int kOutStride = kTile + 1;  // no bank conflicts down a column either
static_assert(kChannelAlign % kStep == 0, "digit rows are whole steps");

// Bytes of a stage: rows or columns of one plane, of all planes, of both sides.
VP_HD constexpr int plane_bytes(int rows) { return rows * kStep; }
VP_HD constexpr int side_bytes(int rows) { return kDigitPlanes * plane_bytes(rows); }
VP_HD constexpr int stage_bytes(int rows) { return side_bytes(rows) + side_bytes(kTile); }
VP_HD constexpr int shared_bytes(int rows) { return kStages * stage_bytes(rows); }
static_assert(shared_bytes(32) >= 32 * kOutStride * 4, "the epilogue reuses the pipeline's memory");
static_assert(shared_bytes(64) >= 64 * kOutStride * 4, "the epilogue reuses the pipeline's memory");

// Where chunk `chunk` of row `row` lies in a plane: eight rows of one chunk, which one matrix load
// reads, fall into eight different groups of banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kStep + (chunk ^ ((row >> 1) & (kChunks - 1))) * kChunk;
}

template <int kRows>
__device__ __forceinline__ void load_side(unsigned char* shared, const int8_t* digits,
                                          int64_t plane, int64_t padded_channels, int first_row,
                                          int rows, int64_t channel) {
  constexpr int kCopies = kDigitPlanes * kRows * kChunks;
#pragma unroll
  for (int i = threadIdx.x; i < kCopies; i += kThreads) {
    const int p = i / (kRows * kChunks), row = i / kChunks % kRows, chunk = i % kChunks;
    const int from = min(first_row + row, rows - 1);  // rows past the last one are not used
    copy_async_16(shared + p * plane_bytes(kRows) + chunk_offset(row, chunk),
                  digits + p * plane + from * padded_channels + channel + chunk * kChunk);
  }
}

// Products of one plane: sums[m][n] += rows . columns, kRowTiles x 4 tiles of 16 x 8 a warp.
template <int kRowTiles>
__device__ __forceinline__ void multiply_plane(const unsigned char* rows,
                                               const unsigned char* columns, int row0, int column0,
                                               int half, int (&sums)[kRowTiles][4][4]) {
  const int lane = threadIdx.x % kWarp;
  uint32_t a[kRowTiles][4], b[2][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const int row = row0 + 16 * m + lane % 16;
    load_matrices(a[m], rows + chunk_offset(row, 2 * half + lane / 16));
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int column = column0 + 16 * n + lane % 8 + lane / 16 * 8;
    load_matrices(b[n], columns + chunk_offset(column, 2 * half + lane / 8 % 2));
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      multiply_add_s8(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

// The part of the matrix that block `t` computes: column by column of 64, `kParts` blocks for each
// 64 x 64 tile on or above the diagonal.
template <int kParts>
__device__ __forceinline__ void tile_of(int t, int* row_part, int* column) {
  const int pair = t / kParts;
  int c = static_cast<int>((sqrtf(8.0f * pair + 1.0f) - 1.0f) * 0.5f);
  while (c * (c + 1) / 2 > pair) --c;
  while ((c + 1) * (c + 2) / 2 <= pair) ++c;
  *column = c;
  *row_part = (pair - c * (c + 1) / 2) * kParts + t % kParts;
}

// kRowTiles: 16-row tiles of a warp, of which two are above each other in a block.
template <bool kCosine, int kRowTiles>
__global__ void __launch_bounds__(kThreads)
    gram_kernel(Batch batch, int64_t channels, float* cosines, unsigned char* workspace) {
  begin_dependent();
  VP_SHARED_MEMORY(shared);
  constexpr int kRows = 32 * kRowTiles;  // of the block
  const Image image = batch[blockIdx.y];
  const int rows = image.shape.residual();
  int row_part, tile_column;
  tile_of<kTile / kRows>(blockIdx.x, &row_part, &tile_column);
  const int row0 = row_part * kRows, column0 = tile_column * kTile;
  if (column0 >= rows || row0 >= rows) return;

  const WorkspaceLayout at = workspace_layout(image.shape.tokens, rows, channels, !kCosine);
  unsigned char* own = workspace + image.workspace;
  const auto* digits = reinterpret_cast<const int8_t*>(own + at.digits);
  const int64_t plane = rows * at.padded_channels;
  const auto steps = static_cast<int>(at.padded_channels / kStep);

  const auto load_stage = [&](int step) {
    unsigned char* stage = shared + step % kStages * stage_bytes(kRows);
    const int64_t channel = int64_t{step} * kStep;
    load_side<kRows>(stage, digits, plane, at.padded_channels, row0, rows, channel);
    load_side<kTile>(stage + side_bytes(kRows), digits, plane, at.padded_channels, column0, rows,
                     channel);
  };

  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / 2 * 16 * kRowTiles, warp_column = warp % 2 * 32;
  int sums[kDigitPlanes][kRowTiles][4][4] = {};

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load_stage(step);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage is here for all, and the one before it is free
    if (step + kStages - 1 < steps) load_stage(step + kStages - 1);
    copy_async_commit();
    const unsigned char* stage = shared + step % kStages * stage_bytes(kRows);
#pragma unroll
    for (int half = 0; half < kChunks / 2; ++half) {
#pragma unroll
      for (int p = 0; p < kDigitPlanes; ++p) {
        multiply_plane(stage + p * plane_bytes(kRows),
                       stage + side_bytes(kRows) + p * plane_bytes(kTile), warp_row, warp_column,
                       half, sums[p]);
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // the last stage has been read: its memory becomes the output tile

  auto* out = reinterpret_cast<float*>(shared);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp_row + 16 * m + lane / 4 + e / 2 * 8;
        const int column = warp_column + 8 * n + lane % 4 * 2 + e % 2;
        out[row * kOutStride + column] =
            gram_to_float(gram_from_digits(sums[0][m][n][e], sums[2][m][n][e], sums[1][m][n][e]));
      }
    }
  }
  __syncthreads();

  const auto* inv = reinterpret_cast<const float*>(own + at.inv);
  float* matrix = kCosine ? cosines + int64_t{blockIdx.y} * rows * rows
                          : reinterpret_cast<float*>(own + at.gram);
  const int64_t ld = kCosine ? rows : at.ld;
  const auto write = [&](int i, int j, float gram) {
    if (i >= rows || j >= rows) return;
    const float s = similarity(gram, inv[j]);
    matrix[i * ld + j] = kCosine ? s * inv[i] : s;
  };
  for (int e = threadIdx.x; e < kRows * kTile; e += kThreads) {
    const int r = e / kTile, c = e % kTile;
    write(row0 + r, column0 + c, out[r * kOutStride + c]);
  }
  if (row0 >= column0) return;  // on the diagonal, blocks compute both halves
  for (int e = threadIdx.x; e < kRows * kTile; e += kThreads) {
    const int c = e / kRows, r = e % kRows;
    write(column0 + c, row0 + r, out[r * kOutStride + c]);
  }
}

// VISPRUNER_GRAM_PLAN=tiles_64|tiles_32 asks for blocks of so many rows.
bool halve_blocks(int64_t blocks) {
  if (const char* wanted = std::getenv("VISPRUNER_GRAM_PLAN")) {
    if (std::strcmp(wanted, "tiles_64") == 0) return false;
    if (std::strcmp(wanted, "tiles_32") == 0) return true;
  }
  return blocks <= kFewBlocks;
}

}  // namespace

int gram(const Batch& batch, const WaveSize& size, int64_t channels, float* out, void* workspace,
         void* stream) {
  const int tiles = (size.residual + kTile - 1) / kTile;
  const int pairs = tiles * (tiles + 1) / 2;
  auto* ws = static_cast<unsigned char*>(workspace);
  const auto run = [&](auto cosine, auto row_tiles) {
    constexpr int kRows = 32 * row_tiles();
    const dim3 grid(pairs * (kTile / kRows), size.images);
    return launch_dependent<gram_kernel<cosine(), row_tiles()>>(grid, kThreads, shared_bytes(kRows),
                                                                stream, batch, channels, out, ws);
  };
  const auto halves = [&](auto cosine) {
    return halve_blocks(int64_t{pairs} * size.images)
               ? run(cosine, std::integral_constant<int, 1>{})
               : run(cosine, std::integral_constant<int, 2>{});
  };
  return out ? halves(std::true_type{}) : halves(std::false_type{});
}

}  // namespace vispruner::cuda
