// The table of a ragged batch.
#include "batch.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace vispruner::cuda {
namespace {

constexpr int kTableChunk = 48;  // images per launch parameter (below 4 KiB)
constexpr int kTableThreads = 64;

struct TableChunk {
  Image images[kTableChunk];
};
static_assert(sizeof(TableChunk) + 64 <= 4096 && kTableChunk <= kTableThreads, "");

__global__ void table_kernel(TableChunk chunk, int count, Image* table) {
  if (static_cast<int>(threadIdx.x) < count) table[threadIdx.x] = chunk.images[threadIdx.x];
}

}  // namespace

// Launch parameters are the only way to copy host data to the device without a wait and without
// pinned memory. A captured graph keeps them.
int write_table(const Image* images, int count, Image* table, Stream stream) {
  for (int first = 0; first < count; first += kTableChunk) {
    TableChunk chunk{};
    const int now = count - first < kTableChunk ? count - first : kTableChunk;
    for (int i = 0; i < now; ++i) chunk.images[i] = images[first + i];
    if (const int e =
            launch<table_kernel>(1, kTableThreads, 0, stream, chunk, now, table + first)) {
      return e;
    }
  }
  return 0;
}

}  // namespace vispruner::cuda
