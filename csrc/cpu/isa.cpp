// Inner loops of the CPU path. This file is compiled once per instruction set, with VP_ISA naming
// the set, and must not use templates of the standard library: the linker keeps one copy of each,
// which this processor may be unable to run.
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

// ---- vectors ------------------------------------------------------------------------------------
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

// a0 b0 a1 b1 ...: the first and the second half of it.
#if defined(__AVX512F__)
Floats interleave_low(Floats a, Floats b) {
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return reinterpret_cast<Floats>(
      _mm512_permutex2var_ps(reinterpret_cast<__m512>(a), order, reinterpret_cast<__m512>(b)));
}
Floats interleave_high(Floats a, Floats b) {
  const __m512i order =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return reinterpret_cast<Floats>(
      _mm512_permutex2var_ps(reinterpret_cast<__m512>(a), order, reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__)
template <int kHalves>
Floats interleave_halves(Floats a, Floats b) {
  const __m256 x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b);
  return reinterpret_cast<Floats>(
      _mm256_permute2f128_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y), kHalves));
}
Floats interleave_low(Floats a, Floats b) { return interleave_halves<0x20>(a, b); }
Floats interleave_high(Floats a, Floats b) { return interleave_halves<0x31>(a, b); }
#else
Floats interleave_low(Floats a, Floats b) { return Floats{a[0], b[0], a[1], b[1]}; }
Floats interleave_high(Floats a, Floats b) { return Floats{a[2], b[2], a[3], b[3]}; }
#endif

void transpose(const float* from, int64_t from_stride, int64_t columns, float* to,
               int64_t to_stride) {
  static_assert(kTransposedRows % kLanes == 0);
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    for (int r = 0; r < kTransposedRows; r += kLanes) {
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + (r + i) * from_stride + c);
      // Each step rotates the bits of an element's (row, lane) by one.
#pragma GCC unroll 4
      for (int step = 1; step < kLanes; step *= 2) {
        Floats next[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
          next[2 * i] = interleave_low(block[i], block[i + kLanes / 2]);
          next[2 * i + 1] = interleave_high(block[i], block[i + kLanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = next[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_stride + r, block[i]);
    }
  }
  for (; c < columns; ++c) {
    for (int r = 0; r < kTransposedRows; ++r) {
      std::memcpy(to + c * to_stride + r, from + r * from_stride + c, sizeof(float));
    }
  }
}

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

int64_t quantize_token(const void* row, DType dtype, int64_t channels, int16_t* quantized,
                       float* scratch) {
  load_row(row, dtype, channels, scratch);
  uint32_t peak = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const uint32_t m = magnitude_bits(scratch[c]);
    peak = m > peak ? m : peak;
  }
  const float scale = quantization_scale(peak);
  if (scale == 0.0f) {
    std::memset(quantized, 0, static_cast<size_t>(channels) * sizeof(int16_t));
    return 0;
  }
  int64_t squared = 0;
  for (int64_t c0 = 0; c0 < channels; c0 += kInt32Products) {
    const int64_t c1 = c0 + kInt32Products < channels ? c0 + kInt32Products : channels;
    int32_t sum = 0;
    for (int64_t c = c0; c < c1; ++c) {
      const int q = quantize(scratch[c], scale);
      quantized[c] = static_cast<int16_t>(q);
      sum += q * q;
    }
    squared += sum;
  }
  return squared;
}

// ---- Gram -------------------------------------------------------------------------------------
// products: sums[r][c] = q_r . q_c in int32 over `pairs` pairs of channels, of the 16 tokens of the
// panel `a` and the kTileCols tokens of the panels from `b` on.
constexpr int kTileSize = kTileRows * kTileCols;
constexpr int kWords = kPanelTokens * 2;  // int16 values of a pair of channels in a panel

#if defined(__AVX512BW__)

inline __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

void products(const int16_t* a, const int16_t* b, int64_t panel_size, int64_t pairs,
              int32_t* sums) {
  constexpr int kRows = 8;  // 8 x 2 sums hide the latency of one
  for (int r0 = 0; r0 < kTileRows; r0 += kRows) {
    __m512i sum[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int64_t at = 0; at < pairs * kWords; at += kWords) {
      const __m512i x0 = _mm512_loadu_si512(b + at);
      const __m512i x1 = _mm512_loadu_si512(b + panel_size + at);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t word;
        std::memcpy(&word, a + at + 2 * (r0 + r), sizeof word);
        const __m512i y = _mm512_set1_epi32(word);
        sum[r][0] = multiply_add(sum[r][0], y, x0);
        sum[r][1] = multiply_add(sum[r][1], y, x1);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      _mm512_storeu_si512(sums + (r0 + r) * kTileCols, sum[r][0]);
      _mm512_storeu_si512(sums + (r0 + r) * kTileCols + 16, sum[r][1]);
    }
  }
}

#elif defined(__AVX2__)

void products(const int16_t* a, const int16_t* b, int64_t panel_size, int64_t pairs,
              int32_t* sums) {
  constexpr int kRows = 4;  // 4 x 2 sums, 2 columns and a broadcast fit 16 registers
  for (int c0 = 0; c0 < kTileCols; c0 += kPanelTokens) {
    const int16_t* columns = b + c0 / kPanelTokens * panel_size;
    for (int r0 = 0; r0 < kTileRows; r0 += kRows) {
      __m256i sum[kRows][2];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
      for (int64_t at = 0; at < pairs * kWords; at += kWords) {
        const auto* x = reinterpret_cast<const __m256i*>(columns + at);
        const __m256i x0 = _mm256_loadu_si256(x);
        const __m256i x1 = _mm256_loadu_si256(x + 1);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          int32_t word;
          std::memcpy(&word, a + at + 2 * (r0 + r), sizeof word);
          const __m256i y = _mm256_set1_epi32(word);
          sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(y, x0));
          sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(y, x1));
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        auto* out = reinterpret_cast<__m256i*>(sums + (r0 + r) * kTileCols + c0);
        _mm256_storeu_si256(out, sum[r][0]);
        _mm256_storeu_si256(out + 1, sum[r][1]);
      }
    }
  }
}

#else

void products(const int16_t* a, const int16_t* b, int64_t panel_size, int64_t pairs,
              int32_t* sums) {
  for (int c0 = 0; c0 < kTileCols; c0 += kPanelTokens) {
    const int16_t* columns = b + c0 / kPanelTokens * panel_size;
    for (int r = 0; r < kTileRows; ++r) {
      int32_t sum[kPanelTokens] = {};
      for (int64_t at = 0; at < pairs * kWords; at += kWords) {
        const int16_t* x = columns + at;
        const int32_t y0 = a[at + 2 * r], y1 = a[at + 2 * r + 1];
        for (int c = 0; c < kPanelTokens; ++c) sum[c] += y0 * x[2 * c] + y1 * x[2 * c + 1];
      }
      std::memcpy(sums + r * kTileCols + c0, sum, sizeof sum);
    }
  }
}

#endif

void gram_tile(const int16_t* panels, int64_t panel_size, int64_t pairs, int64_t int32_pairs,
               int row0, int col0, float* tile) {
  const int16_t* a = panels + row0 / kPanelTokens * panel_size;
  const int16_t* b = panels + col0 / kPanelTokens * panel_size;
  int32_t sums[kTileSize];
  if (pairs <= int32_pairs) {
    products(a, b, panel_size, pairs, sums);
    for (int i = 0; i < kTileSize; ++i) tile[i] = static_cast<float>(sums[i]);
    return;
  }
  double exact[kTileSize] = {};  // any Gram entry is below 2^53
  for (int64_t p = 0; p < pairs; p += int32_pairs) {
    const int64_t count = p + int32_pairs < pairs ? int32_pairs : pairs - p;
    products(a + p * kWords, b + p * kWords, panel_size, count, sums);
    for (int i = 0; i < kTileSize; ++i) exact[i] += sums[i];
  }
  for (int i = 0; i < kTileSize; ++i) tile[i] = static_cast<float>(exact[i]);
}

// ---- neighbour lists --------------------------------------------------------------------------
constexpr int kKeyLanes = 16;  // keys per mask

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

// Bit l of the result: keys[l] >= threshold.
inline uint32_t at_least(const int32_t* keys, int32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(threshold));
#elif defined(__AVX2__)
  const __m256i least = _mm256_set1_epi32(threshold);
  const auto* vectors = reinterpret_cast<const __m256i*>(keys);
  uint32_t less = 0;
  for (int v = 0; v < 2; ++v) {
    const __m256i is_less = _mm256_cmpgt_epi32(least, _mm256_loadu_si256(vectors + v));
    less |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_less))) << (8 * v);
  }
  return ~less & 0xffffu;
#else
  uint32_t bits = 0;
  for (int l = 0; l < kKeyLanes; ++l) bits |= static_cast<uint32_t>(keys[l] >= threshold) << l;
  return bits;
#endif
}

// rank[e] = how many of the first `count` keys are ahead of keys[e]: highest first, ties by place.
inline void rank_by_counting(const int32_t (&keys)[kListStride], int count,
                             int32_t (&rank)[kListStride]) {
  for (int e = 0; e < kListStride; ++e) rank[e] = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t key = keys[i];
    for (int e = 0; e < kListStride; ++e) {
      rank[e] += static_cast<int32_t>(key > keys[e]) |
                 (static_cast<int32_t>(key == keys[e]) & static_cast<int32_t>(i < e));
    }
  }
}

int neighbours(const float* gram, const float* inv, int n, int self, uint16_t* ids,
               float* redundancy, int32_t* keys) {
  constexpr int kMost = kListStride - 1;
  constexpr int32_t kNever = INT32_MIN;  // below the key of -inf
  constexpr int kGroups = kListStride;   // tokens j, j + kGroups, ...
  const int width = (n + kGroups - 1) / kGroups * kGroups;
  for (int j = 0; j < n; ++j) keys[j] = signed_key(similarity(gram[j], inv[j]));
  for (int j = n; j < width; ++j) keys[j] = kNever;
  keys[self] = kNever;

  int32_t threshold = kNever + 1;
  int32_t tied = kNever;  // of the keys equal to it, the first `ties` are taken as well
  int ties = 0;
  if (n - 1 > kMost) {
    // The median of the highest keys of the groups: the number of keys that reach it is at least
    // half the number of groups, and about ln 2 times that number if the order is random.
    int32_t highest[kGroups], rank[kGroups];
    for (int g = 0; g < kGroups; ++g) highest[g] = keys[g];
    for (int j = kGroups; j < width; j += kGroups) {
      for (int g = 0; g < kGroups; ++g) {
        highest[g] = keys[j + g] > highest[g] ? keys[j + g] : highest[g];
      }
    }
    rank_by_counting(highest, kGroups, rank);
    int32_t high = kNever;
    for (int g = 0; g < kGroups; ++g) {
      if (rank[g] == kGroups / 2 - 1) threshold = highest[g];
      if (rank[g] == 0) high = highest[g];
    }
    if (count_at_least(keys, width, threshold) > kMost) {
      // Bisect. More than kMost keys are >= low, at most kMost are > high.
      int32_t low = threshold;
      while (low < high) {
        const auto probe = static_cast<int32_t>((static_cast<int64_t>(low) + high + 1) >> 1);
        const int count = count_at_least(keys, width, probe);
        if (count > kMost) {
          low = probe;
        } else {
          high = probe - 1;
          if (count >= kMost / 2) break;
        }
      }
      threshold = high + 1;
      if (low == high) {  // one value straddles the limit
        tied = low;
        ties = kMost - count_at_least(keys, width, threshold);
      }
    }
  }

  int32_t taken[kListStride], rank[kListStride];
  uint16_t tokens[kListStride];
  for (int e = 0; e < kListStride; ++e) taken[e] = kNever;
  int count = 0;
  for (int j = 0; j < width; j += kKeyLanes) {
    uint32_t bits = at_least(keys + j, ties > 0 ? tied : threshold);
    for (; bits != 0; bits &= bits - 1) {
      const int token = j + __builtin_ctz(bits);
      if (keys[token] < threshold && ties-- <= 0) continue;
      taken[count] = keys[token];
      tokens[count++] = static_cast<uint16_t>(token);
    }
  }
  rank_by_counting(taken, count, rank);
  for (int e = 0; e < count; ++e) {
    ids[rank[e]] = tokens[e];
    redundancy[rank[e]] = similarity(gram[tokens[e]], inv[tokens[e]]) * inv[self];
  }
  return count;
}

// ---- cosines ------------------------------------------------------------------------------------
Floats larger(Floats a, Floats b) { return a > b ? a : b; }

float nearest(const float* gram, const float* inv, int n, int self) {
  // Rounding is monotone and inv[self] is not negative: take the maximum first.
  constexpr float kNone = -__builtin_inff();
  Floats most = all(kNone);
  float best = kNone;
  const auto look = [&](int begin, int end) {
    int j = begin;
    for (; j + kLanes <= end; j += kLanes) most = larger(load(gram + j) * load(inv + j), most);
    for (; j < end; ++j) {
      const float s = similarity(gram[j], inv[j]);
      best = s > best ? s : best;
    }
  };
  look(0, self);
  look(self + 1, n);
  for (int l = 0; l < kLanes; ++l) best = most[l] > best ? most[l] : best;
  return best * inv[self];
}

void raise(const float* gram, const float* inv, int n, int self, float* most) {
  for (int j = 0; j < n; j += kLanes) {
    store(most + j, larger(load(gram + j) * load(inv + j) * inv[self], load(most + j)));
  }
}

// ---- coverage -----------------------------------------------------------------------------------
using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));

Words load_words(const uint32_t* from) {
  Words x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

Words coverage_of(Floats cosine) {
  const Floats positive = cosine > 0.0f ? cosine : Floats{};
  return reinterpret_cast<Words>(positive * kCoverageUnit + 8388608.0f) - 0x4b000000u;
}

uint32_t cover(float* gram, const float* inv, int n, int self) {
  Words sums = {};
  int j = 0;
  const auto whole = [&](int end, auto cosine) {
    for (; j + kLanes <= end; j += kLanes) {
      const Words covers = coverage_of(cosine(load(gram + j), load(inv + j)));
      std::memcpy(gram + j, &covers, sizeof covers);
      sums += covers;
    }
  };
  whole(self, [&](Floats g, Floats inv_j) { return g * inv[self] * inv_j; });
  uint32_t sum = 0;
  for (const int end = n < j + kLanes ? n : j + kLanes; j < end; ++j) {  // `self` is among these
    const float cosine = j < self ? similarity(gram[j], inv[self]) * inv[j]
                                  : similarity(gram[j], inv[j]) * inv[self];
    const uint32_t covers = coverage(cosine);
    std::memcpy(gram + j, &covers, sizeof covers);
    sum += covers;
  }
  whole(n, [&](Floats g, Floats inv_j) { return g * inv_j * inv[self]; });
  for (; j < n; ++j) {
    const uint32_t covers = coverage(similarity(gram[j], inv[j]) * inv[self]);
    std::memcpy(gram + j, &covers, sizeof covers);
    sum += covers;
  }
  for (int l = 0; l < kLanes; ++l) sum += sums[l];
  return sum;
}

void lower_gains(const uint32_t* row, uint32_t before, uint32_t after, int n, uint32_t* gains) {
  for (int j = 0; j < n; j += kLanes) {
    // Below 2^31, so that signed comparisons, for which there are instructions, give the same
    // result.
    const auto covers = reinterpret_cast<Ints>(load_words(row + j));
    const Ints low = Ints{} + static_cast<int32_t>(before);
    const Ints high = Ints{} + static_cast<int32_t>(after);
    Ints part = covers < high ? covers : high;
    part = (part > low ? part : low) - low;
    const Words left = load_words(gains + j) - reinterpret_cast<Words>(part);
    std::memcpy(gains + j, &left, sizeof left);
  }
}

// ---- attention ----------------------------------------------------------------------------------
void exact_logits(const float* q, const float* keys, int tokens, int dim, double scale,
                  double* out) {
  constexpr int kLanes = 16;  // partial sums, which a compiler can keep in a few vectors
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

// a * b + c, used for scores only: one rounding or two are both acceptable.
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

// e^x to about one unit in the last place; 0 far below, NaN for NaN.
Floats exponential(Floats x) {
  // ln 2 in two parts; the first has so few bits that its product is exact.
  constexpr float kLog2E = 1.44269504f, kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f;
#if defined(__AVX512F__)
  x = reinterpret_cast<Floats>(_mm512_max_ps(_mm512_set1_ps(-150.0f), reinterpret_cast<__m512>(x)));
  const auto n = reinterpret_cast<Floats>(
      _mm512_roundscale_ps(reinterpret_cast<__m512>(x * kLog2E), _MM_FROUND_TO_NEAREST_INT));
#else
  const Ints tiny = x < -87.0f;
  x = tiny ? all(-87.0f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * kLog2E + kRound) - kRound;
#endif
  const Floats r = multiply_add(n, all(-kLn2Rest), multiply_add(n, all(-kLn2), x));
  // Minimax polynomial of (e^r - 1 - r) / r^2 (Cephes, expf).
  Floats p = all(1.9875691500e-4f);
  p = multiply_add(p, r, all(1.3981999507e-3f));
  p = multiply_add(p, r, all(8.3334519073e-3f));
  p = multiply_add(p, r, all(4.1665795894e-2f));
  p = multiply_add(p, r, all(1.6666665459e-1f));
  p = multiply_add(p, r, all(5.0000001201e-1f));
  p = multiply_add(p, r * r, r) + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return tiny ? Floats{} : p * reinterpret_cast<Floats>(power);
#endif
}

// A tile has as many sums as fit into registers.
#if defined(__AVX512F__)
constexpr int kTileQueries = kQueryTile;
#else
constexpr int kTileQueries = kQueryTile / 2;
#endif
constexpr int kTileVectors = 2;
static_assert(kPanelKeys % kLanes == 0 && kQueryTile % kTileQueries == 0);

// sum + q . k of one word: of one channel, or of two.
struct Float32Word {
  static Floats add_product(Floats sum, Floats q, Floats k) { return multiply_add(q, k, sum); }
};
#if defined(__AVX512BF16__)
struct BFloat16Words {
  static Floats add_product(Floats sum, Floats q, Floats k) {
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                     reinterpret_cast<__m512bh>(q),
                                                     reinterpret_cast<__m512bh>(k)));
  }
};
#endif

// The word in every lane, as bits of any type.
Floats all_lanes(const float* word) {
#if defined(__AVX512F__)
  int32_t bits;
  std::memcpy(&bits, word, sizeof bits);
  return reinterpret_cast<Floats>(_mm512_set1_epi32(bits));
#else
  return all(*word);
#endif
}

// out[i][t] = scale * (q_i . k_t) of kTileQueries queries and kVectors vectors of keys from `first`
// on. A sum runs over the channels in order, independent of its neighbours.
template <typename Word, int kVectors>
void logit_tile(const float* q, const float* panels, int64_t first, int words, float scale,
                int64_t stride, float* out) {
  const float* keys[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t key = first + v * kLanes;
    keys[v] = panels + key / kPanelKeys * kPanelKeys * words + key % kPanelKeys;
  }
  Floats sums[kTileQueries][kVectors] = {};
  for (int64_t w = 0; w < words; ++w) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats k = load(keys[v] + w * kPanelKeys);
      for (int i = 0; i < kTileQueries; ++i) {
        sums[i][v] = Word::add_product(sums[i][v], all_lanes(q + i * words + w), k);
      }
    }
  }
  for (int i = 0; i < kTileQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      store(out + i * stride + first + v * kLanes, sums[i][v] * scale);
    }
  }
}

template <typename Word>
void add_weights(const float* q, int queries, const float* panels, int tokens, int words,
                 float scale, const float* lse, float* scratch, float* columns) {
  constexpr int kFloatSums = 64;  // terms of a float32 sum before float64 takes over
  constexpr int kTileKeys = kTileVectors * kLanes;
  const int64_t width = int64_t{(tokens + kPanelKeys - 1) / kPanelKeys} * kPanelKeys;
  for (int i = 0; i < kQueryTile; i += kTileQueries) {
    const float* rows = q + int64_t{i} * words;
    float* out = scratch + i * width;
    int64_t t = 0;
    for (; t + kTileKeys <= width; t += kTileKeys) {
      logit_tile<Word, kTileVectors>(rows, panels, t, words, scale, width, out);
    }
    for (; t < width; t += kLanes) logit_tile<Word, 1>(rows, panels, t, words, scale, width, out);
  }
  float share[kQueryTile];
  for (int i = 0; i < queries; ++i) {
    float* row = scratch + i * width;
    for (int64_t t = tokens; t < width; ++t) row[t] = -__builtin_inff();  // weight 0
    float shift = lse ? lse[i] : row[0];
    if (!lse) {
      Floats high = load(row);
      for (int64_t t = kLanes; t < width; t += kLanes) {
        const Floats x = load(row + t);
        high = x > high ? x : high;
      }
      for (int l = 0; l < kLanes; ++l) shift = high[l] > shift ? high[l] : shift;
    }
    double sum = 0.0;
    for (int64_t begin = 0; begin < width; begin += kFloatSums * kLanes) {
      const int64_t end = begin + kFloatSums * kLanes;
      Floats partial = {};
      for (int64_t t = begin; t < (end < width ? end : width); t += kLanes) {
        const Floats weight = exponential(load(row + t) - shift);
        store(row + t, weight);
        partial += weight;
      }
      for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(partial[l]);
    }
    share[i] = lse ? 1.0f : static_cast<float>(1.0 / sum);
  }
  for (int64_t t = 0; t < width; t += kLanes) {
    Floats column = load(columns + t);
    for (int i = 0; i < queries; ++i) {
      column = multiply_add(load(scratch + i * width + t), all(share[i]), column);
    }
    store(columns + t, column);
  }
}

}  // namespace

extern const IsaKernels kKernels;
const IsaKernels kKernels = {
    VP_STRING(VP_ISA),
    transpose,
    quantize_token,
    gram_tile,
    neighbours,
    nearest,
    raise,
    cover,
    lower_gains,
    load_row,
    exact_logits,
    add_weights<Float32Word>,
#if defined(__AVX512BF16__)
    add_weights<BFloat16Words>,
#else
    nullptr,
#endif
};

}  // namespace vispruner::cpu::VP_ISA
