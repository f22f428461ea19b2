// Inner loops of the CPU path. This file is compiled once per instruction set, with VP_ISA naming
// the set, and must not use templates of the standard library: the linker would keep one copy,
// perhaps one that this processor cannot run.
#include "isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef VP_ISA
#define VP_ISA portable
#endif
#define VP_STRING_(x) #x
#define VP_STRING(x) VP_STRING_(x)

namespace vispruner::cpu::VP_ISA {
namespace {

// ---- quantization -----------------------------------------------------------------------------
void load_row(const void* row, DType dtype, int64_t channels, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(out, row, static_cast<size_t>(channels) * sizeof(float));
      return;
    case DType::kBFloat16: {
      const auto* x = static_cast<const BFloat16*>(row);
      for (int64_t c = 0; c < channels; ++c) out[c] = to_float(x[c]);
      return;
    }
    case DType::kFloat16: {
      const auto* x = static_cast<const Half*>(row);
      int64_t c = 0;
#if defined(__F16C__)
      for (; c + 8 <= channels; c += 8) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + c));
        _mm256_storeu_ps(out + c, _mm256_cvtph_ps(bits));
      }
#endif
      for (; c < channels; ++c) out[c] = to_float(x[c]);
      return;
    }
  }
}

int64_t quantize_token(const void* row, DType dtype, int64_t channels, int slot, int16_t* panel,
                       float* scratch) {
  load_row(row, dtype, channels, scratch);
  uint32_t peak = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const uint32_t m = magnitude_bits(scratch[c]);
    peak = m > peak ? m : peak;
  }
  const float scale = quantization_scale(peak);
  if (channels % 2) scratch[channels] = 0.0f;
  const int64_t pairs = (channels + 1) / 2;
  auto* words = reinterpret_cast<uint32_t*>(panel) + slot;
  if (scale == 0.0f) {
    for (int64_t p = 0; p < pairs; ++p) words[p * kPanelTokens] = 0;
    return 0;
  }
  int64_t squared = 0;
  for (int64_t p0 = 0; p0 < pairs; p0 += 256) {  // 512 squares stay below 2^31
    const int64_t p1 = p0 + 256 < pairs ? p0 + 256 : pairs;
    int32_t sum = 0;
    for (int64_t p = p0; p < p1; ++p) {
      const int lo = quantize(scratch[2 * p], scale);
      const int hi = quantize(scratch[2 * p + 1], scale);
      sum += lo * lo + hi * hi;
      words[p * kPanelTokens] =
          (static_cast<uint32_t>(lo) & 0xffffu) | (static_cast<uint32_t>(hi) << 16);
    }
    squared += sum;
  }
  return squared;
}

// ---- Gram -------------------------------------------------------------------------------------
// int32 sums hold 512 products (2047^2 * 512 < 2^31); then they are added to float64 sums, which
// hold any Gram entry exactly (< 2^53).
constexpr int64_t kFoldPairs = 256;

const int16_t* token_words(const int16_t* panels, int64_t panel_size, int token) {
  return panels + token / kPanelTokens * panel_size + token % kPanelTokens * 2;
}

#if defined(__AVX512BW__)

inline __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

inline void fold(__m512i sum, double* out) {
  const __m512d lo = _mm512_cvtepi32_pd(_mm512_castsi512_si256(sum));
  const __m512d hi = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sum, 1));
  _mm512_storeu_pd(out, _mm512_add_pd(_mm512_loadu_pd(out), lo));
  _mm512_storeu_pd(out + 8, _mm512_add_pd(_mm512_loadu_pd(out + 8), hi));
}

void gram_tile(const int16_t* panels, int64_t panel_size, int64_t pairs, int row0, int col0,
               double* tile) {
  std::memset(tile, 0, sizeof(double) * kTileRows * kTileCols);
  const int16_t* a = token_words(panels, panel_size, row0);
  const int16_t* b0 = token_words(panels, panel_size, col0);
  const int16_t* b1 = b0 + panel_size;
  for (int64_t p0 = 0; p0 < pairs; p0 += kFoldPairs) {
    const int64_t p1 = p0 + kFoldPairs < pairs ? p0 + kFoldPairs : pairs;
    __m512i sum[kTileRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t at = p * kPanelTokens * 2;
      const __m512i x0 = _mm512_loadu_si512(b0 + at);
      const __m512i x1 = _mm512_loadu_si512(b1 + at);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        int32_t word;
        std::memcpy(&word, a + at + 2 * r, sizeof word);
        const __m512i y = _mm512_set1_epi32(word);
        sum[r][0] = multiply_add(sum[r][0], y, x0);
        sum[r][1] = multiply_add(sum[r][1], y, x1);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      fold(sum[r][0], tile + r * kTileCols);
      fold(sum[r][1], tile + r * kTileCols + 16);
    }
  }
}

#elif defined(__AVX2__)

inline void fold(__m256i sum, double* out) {
  const __m256d lo = _mm256_cvtepi32_pd(_mm256_castsi256_si128(sum));
  const __m256d hi = _mm256_cvtepi32_pd(_mm256_extracti128_si256(sum, 1));
  _mm256_storeu_pd(out, _mm256_add_pd(_mm256_loadu_pd(out), lo));
  _mm256_storeu_pd(out + 4, _mm256_add_pd(_mm256_loadu_pd(out + 4), hi));
}

void gram_tile(const int16_t* panels, int64_t panel_size, int64_t pairs, int row0, int col0,
               double* tile) {
  std::memset(tile, 0, sizeof(double) * kTileRows * kTileCols);
  constexpr int kRows = 4;  // 4 x 2 sums, 2 columns and a broadcast fit 16 registers
  for (int c0 = 0; c0 < kTileCols; c0 += kPanelTokens) {
    const int16_t* b = token_words(panels, panel_size, col0 + c0);
    for (int r0 = 0; r0 < kTileRows; r0 += kRows) {
      const int16_t* a = token_words(panels, panel_size, row0 + r0);
      for (int64_t p0 = 0; p0 < pairs; p0 += kFoldPairs) {
        const int64_t p1 = p0 + kFoldPairs < pairs ? p0 + kFoldPairs : pairs;
        __m256i sum[kRows][2];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t at = p * kPanelTokens * 2;
          const __m256i x0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + at));
          const __m256i x1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + at + 16));
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            int32_t word;
            std::memcpy(&word, a + at + 2 * r, sizeof word);
            const __m256i y = _mm256_set1_epi32(word);
            sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(y, x0));
            sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(y, x1));
          }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          double* out = tile + (r0 + r) * kTileCols + c0;
          fold(sum[r][0], out);
          fold(sum[r][1], out + 8);
        }
      }
    }
  }
}

#else

void gram_tile(const int16_t* panels, int64_t panel_size, int64_t pairs, int row0, int col0,
               double* tile) {
  std::memset(tile, 0, sizeof(double) * kTileRows * kTileCols);
  for (int c0 = 0; c0 < kTileCols; c0 += kPanelTokens) {
    const int16_t* b = token_words(panels, panel_size, col0 + c0);
    for (int r = 0; r < kTileRows; ++r) {
      const int16_t* a = token_words(panels, panel_size, row0 + r);
      double* out = tile + r * kTileCols + c0;
      for (int64_t p0 = 0; p0 < pairs; p0 += kFoldPairs) {
        const int64_t p1 = p0 + kFoldPairs < pairs ? p0 + kFoldPairs : pairs;
        int32_t sum[kPanelTokens] = {};
        for (int64_t p = p0; p < p1; ++p) {
          const int16_t* x = b + p * kPanelTokens * 2;
          const int32_t y0 = a[p * kPanelTokens * 2], y1 = a[p * kPanelTokens * 2 + 1];
          for (int c = 0; c < kPanelTokens; ++c) sum[c] += y0 * x[2 * c] + y1 * x[2 * c + 1];
        }
        for (int c = 0; c < kPanelTokens; ++c) out[c] += sum[c];
      }
    }
  }
}

#endif

// ---- neighbour lists --------------------------------------------------------------------------
// Signed integers in the order of the floats: compares of 32-bit signed integers vectorize on
// every instruction set.
inline int32_t signed_key(float x) {
  const auto bits = static_cast<int32_t>(float_bits(x + 0.0f));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline int count_at_least(const int32_t* keys, int n, int32_t threshold) {
  int count = 0;
  for (int j = 0; j < n; ++j) count += keys[j] >= threshold;
  return count;
}

int neighbours(const float* gram, const float* inv, int n, int self, uint16_t* ids,
               float* redundancy, int32_t* guess, int32_t* keys) {
  constexpr int kMost = kListStride - 1;
  constexpr int kEnough = kMost / 2;
  constexpr int32_t kNever = INT32_MIN;  // below the key of -inf
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int j = 0; j < n; ++j) keys[j] = signed_key(similarity(gram[j], inv[j]));
  keys[self] = keys[self ? 0 : n - 1];  // no outlier in the range below
  for (int j = 0; j < n; ++j) {
    low = keys[j] < low ? keys[j] : low;
    high = keys[j] > high ? keys[j] : high;
  }
  keys[self] = kNever;

  // Bisect for a threshold that kEnough to kMost keys reach. Invariant: more than kMost keys are
  // >= low, fewer than kEnough are > high.
  int32_t threshold = low;
  int32_t ties = 0;  // keys equal to `tied` to be taken as well
  int32_t tied = 0;
  if (n - 1 > kMost) {
    int32_t probe = *guess;
    for (;;) {
      if (low == high) {  // one value straddles the limit: take some of its ties
        tied = low;
        threshold = low + 1;
        ties = kMost - count_at_least(keys, n, threshold);
        break;
      }
      if (probe <= low || probe > high) {
        probe = static_cast<int32_t>((static_cast<int64_t>(low) + high + 1) >> 1);
      }
      const int count = count_at_least(keys, n, probe);
      if (count > kMost) {
        low = probe;
      } else if (count < kEnough) {
        high = probe - 1;
      } else {
        threshold = probe;
        break;
      }
      probe = low;  // the guess was one probe; bisect from now on
    }
    *guess = threshold;
  }

  int32_t sorted[kListStride];
  int count = 0;
  const int32_t least = ties > 0 ? tied : threshold;
  for (int j = 0; j < n; ++j) {
    constexpr int kSkip = 16;  // most tokens are in no list: pass over them by the vector
    if (j % kSkip == 0 && j + kSkip <= n && count_at_least(keys + j, kSkip, least) == 0) {
      j += kSkip - 1;
      continue;
    }
    const int32_t key = keys[j];
    if (key < threshold) {
      if (ties == 0 || key != tied) continue;
      --ties;
    }
    if (key == kNever) continue;
    int at = count++;  // insertion sort: short, and mostly in cache
    for (; at > 0 && sorted[at - 1] < key; --at) {
      sorted[at] = sorted[at - 1];
      ids[at] = ids[at - 1];
    }
    sorted[at] = key;
    ids[at] = static_cast<uint16_t>(j);
  }
  for (int e = 0; e < count; ++e) {
    redundancy[e] = similarity(gram[ids[e]], inv[ids[e]]) * inv[self];
  }
  return count;
}

// ---- attention ----------------------------------------------------------------------------------
void exact_logits(const float* q, const float* keys, int tokens, int dim, double scale,
                  double* out) {
  constexpr int kLanes = 16;  // partial sums: what a compiler may keep in a few vectors
  for (int t = 0; t < tokens; ++t) {
    const float* k = keys + int64_t{t} * dim;
    double sums[kLanes] = {};
    for (int d = 0; d < dim; d += kLanes) {
      for (int l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(q[d + l]) * k[d + l];
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) sums[l] += sums[l + width];
    }
    out[t] = sums[0] * scale;
  }
}

// One vector of this instruction set.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

Floats all(float x) { return Floats{} + x; }
Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// a * b + c, of which only scores depend: one rounding or two are both good.
Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// e^x to about one unit in the last place; 0 below -87, NaN for NaN.
Floats exponential(Floats x) {
  const Ints tiny = x < -87.0f;
  x = tiny ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * 1.44269504f + kRound) - kRound;
  // ln 2 in two parts, the first of so few bits that its product is exact.
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  // Minimax polynomial of (e^r - 1 - r) / r^2 (Cephes, expf).
  Floats p = all(1.9875691500e-4f);
  p = multiply_add(p, r, all(1.3981999507e-3f));
  p = multiply_add(p, r, all(8.3334519073e-3f));
  p = multiply_add(p, r, all(4.1665795894e-2f));
  p = multiply_add(p, r, all(1.6666665459e-1f));
  p = multiply_add(p, r, all(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return tiny ? Floats{} : p * reinterpret_cast<Floats>(power);
}

// A tile has as many sums as there are registers for.
#if defined(__AVX512F__)
constexpr int kTileQueries = kQueryTile;
#else
constexpr int kTileQueries = kQueryTile / 2;
#endif
constexpr int kTileVectors = 2;
static_assert(kPanelKeys % kLanes == 0 && kQueryTile % kTileQueries == 0);

// out[i][t] = scale * (q_i . k_t) of kTileQueries queries and kVectors vectors of keys from `first`
// on. A sum runs over the channels in order, whatever stands beside it.
template <int kVectors>
void logit_tile(const float* q, const float* panels, int64_t first, int dim, float scale,
                int64_t stride, float* out) {
  const float* keys[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t key = first + v * kLanes;
    keys[v] = panels + key / kPanelKeys * kPanelKeys * dim + key % kPanelKeys;
  }
  Floats sums[kTileQueries][kVectors] = {};
  for (int64_t d = 0; d < dim; ++d) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats k = load(keys[v] + d * kPanelKeys);
      for (int i = 0; i < kTileQueries; ++i) {
        sums[i][v] = multiply_add(all(q[i * dim + d]), k, sums[i][v]);
      }
    }
  }
  for (int i = 0; i < kTileQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      store(out + i * stride + first + v * kLanes, sums[i][v] * scale);
    }
  }
}

void add_weights(const float* q, int queries, const float* panels, int tokens, int dim, float scale,
                 const float* lse, float* scratch, float* columns) {
  constexpr int kFloatSums = 64;  // terms of a float32 sum before float64 takes over
  constexpr int kTileKeys = kTileVectors * kLanes;
  const int64_t width = int64_t{(tokens + kPanelKeys - 1) / kPanelKeys} * kPanelKeys;
  for (int i = 0; i < kQueryTile; i += kTileQueries) {
    const float* rows = q + int64_t{i} * dim;
    float* out = scratch + i * width;
    int64_t t = 0;
    for (; t + kTileKeys <= width; t += kTileKeys) {
      logit_tile<kTileVectors>(rows, panels, t, dim, scale, width, out);
    }
    for (; t < width; t += kLanes) logit_tile<1>(rows, panels, t, dim, scale, width, out);
  }
  for (int i = 0; i < queries; ++i) {
    float* row = scratch + i * width;
    for (int64_t t = tokens; t < width; ++t) row[t] = -__builtin_inff();  // weight 0
    if (lse) {
      for (int64_t t = 0; t < width; t += kLanes) {
        store(columns + t, load(columns + t) + exponential(load(row + t) - lse[i]));
      }
      continue;
    }
    Floats high = load(row);
    for (int64_t t = kLanes; t < width; t += kLanes) {
      const Floats x = load(row + t);
      high = x > high ? x : high;
    }
    float highest = high[0];
    for (int l = 1; l < kLanes; ++l) highest = high[l] > highest ? high[l] : highest;
    double sum = 0.0;
    for (int64_t begin = 0; begin < width; begin += kFloatSums * kLanes) {
      const int64_t end = begin + kFloatSums * kLanes;
      Floats partial = {};
      for (int64_t t = begin; t < (end < width ? end : width); t += kLanes) {
        const Floats weight = exponential(load(row + t) - highest);
        store(row + t, weight);
        partial += weight;
      }
      for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(partial[l]);
    }
    const auto share = static_cast<float>(1.0 / sum);
    for (int64_t t = 0; t < width; t += kLanes) {
      store(columns + t, load(columns + t) + load(row + t) * share);
    }
  }
}

}  // namespace

extern const IsaKernels kKernels;
const IsaKernels kKernels = {VP_STRING(VP_ISA), quantize_token, gram_tile,  neighbours,
                             load_row,          exact_logits,   add_weights};

}  // namespace vispruner::cpu::VP_ISA
