// Canonical numerics v1 (docs/numerics.md): the arithmetic that decides which tokens are retained.
//
// The CUDA and the CPU kernels share this one definition of each step. Every step is exact or a
// single correctly rounded IEEE operation. Compile with floating-point contraction off (nvcc:
// --fmad=false, GCC and Clang: -ffp-contract=off) and never with fast-math.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VP_HD __host__ __device__ __forceinline__
#else
#define VP_HD inline
#endif

namespace vispruner {

// Storage types of features and attention. The 16-bit ones are plain bits, so that no CUDA header
// is needed to name them.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr float kQuantMax = 2047.0f;  // q is an integer in [-2047, 2047]
constexpr float kTinyPeak = 1e-30f;   // a token below this counts as zero
constexpr uint32_t kInfBits = 0x7f800000u;

VP_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

VP_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// ---- upcast: exact --------------------------------------------------------------------------
VP_HD float to_float(float x) { return x; }
VP_HD float to_float(BFloat16 x) { return bits_float(uint32_t{x.bits} << 16); }
VP_HD float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Exact for all values. No intermediate float is subnormal, so it does not matter whether the
  // processor flushes subnormals to zero. Shift the fields into place and add 127 - 15 to the
  // exponent; restore Inf and NaN. A subnormal m * 2^-24 is 2^-14 + m * 2^-24 less 2^-14.
  constexpr uint32_t kExponentStep = 1u << 23;
  const uint32_t magnitude = (uint32_t{x.bits} & 0x7fffu) << 13;
  const float small = bits_float(magnitude + 113 * kExponentStep) - bits_float(113 * kExponentStep);
  const uint32_t special = magnitude >= (0x7c00u << 13) ? kInfBits : 0u;
  const uint32_t normal = (magnitude + 112 * kExponentStep) | special;
  return bits_float((magnitude < kExponentStep ? float_bits(small) : normal) |
                    ((uint32_t{x.bits} & 0x8000u) << 16));
#endif
}

// ---- ordering ---------------------------------------------------------------------------------
// Unsigned integers in the order of the floats; -0 and +0 are equal, as they are for IEEE.
VP_HD uint32_t ordered_key(float x) {
  const uint32_t u = float_bits(x + 0.0f);  // -0 + +0 = +0
  return (u & 0x80000000u) ? ~u : (u | 0x80000000u);
}
VP_HD float key_float(uint32_t key) {
  return bits_float((key & 0x80000000u) ? (key & 0x7fffffffu) : ~key);
}

// NaN ranks last, as -inf does.
VP_HD float ranking_score(float sum) { return sum != sum ? bits_float(0xff800000u) : sum; }

// ---- quantization -----------------------------------------------------------------------------
VP_HD uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

// The scale of a token whose largest magnitude_bits is `peak`; 0 means "all q are zero". The
// integer maximum orders NaN above Inf above every finite value, so one comparison is enough.
VP_HD float quantization_scale(uint32_t peak) {
  const float m = bits_float(peak);
  return (peak < kInfBits && m >= kTinyPeak) ? kQuantMax / m : 0.0f;
}

// Adding 1.5 * 2^23 to a small float leaves the nearest integer (ties to even) in the low bits of
// its representation; `bias`, an even number, is added to it. |x * scale| is at most 2047 plus a
// rounding error.
VP_HD uint32_t quantize_bits(float x, float scale, int bias) {
  return float_bits(x * scale + static_cast<float>(12582912 + bias));
}

VP_HD int quantize(float x, float scale) {
  return scale == 0.0f ? 0 : static_cast<int>(quantize_bits(x, scale, 0)) - 0x4b400000;
}

// q + kDigitBias = 64 high + low with high in [0, 64] and low in [0, 63], so that high + low is in
// [0, 127]. With hh, ll and ss the inner products of the high digits, of the low digits and of
// their sums over `channels` channels,
//
//   (q + bias) . (q' + bias) = 4096 hh + 64 (ss - hh - ll) + ll
//   q . q' = the same - bias (u + u'),   u = digit_sum(sum of the q + bias, channels)
//
// Modulo 2^32, hh, ss and ll are right for fewer than 2^18 channels, and so is u as an int.
constexpr int kDigitBias = 2080;
VP_HD int digit_sum(int biased, int64_t channels) {
  return biased - static_cast<int>(kDigitBias / 2 * channels);
}
VP_HD int64_t gram_from_digits(uint32_t hh, uint32_t ss, uint32_t ll, int u, int u_other) {
  return int64_t{4032} * hh + int64_t{64} * ss - int64_t{63} * ll -
         int64_t{kDigitBias} * (u + u_other);
}

// ---- similarity -------------------------------------------------------------------------------
VP_HD float gram_to_float(int64_t g) {  // one rounding
#if defined(__CUDA_ARCH__)
  // Both parts are exact for |g| < 2^44, and a GPU converts 32 bits faster than 64.
  return __fmaf_rn(__int2float_rn(static_cast<int>(g >> 20)), 1048576.0f,
                   __uint2float_rn(static_cast<uint32_t>(g) & 0xfffffu));
#else
  return static_cast<float>(g);
#endif
}

VP_HD float inverse_norm(int64_t squared_norm) {
  if (squared_norm <= 0) return 0.0f;
  return static_cast<float>(1.0 / sqrt(static_cast<double>(squared_norm)));
}

// The j side of the cosine; multiplying by inv_i completes it. The order matters for the bits.
VP_HD float similarity(float gram, float inv_j) { return gram * inv_j; }

// ---- importance -------------------------------------------------------------------------------
constexpr float kLargestFloat = 3.402823466e38f;

// A score that counts as 0 where it is negative or NaN, and as the largest float where it is +Inf.
VP_HD float positive_score(float score) {
  return score > 0.0f ? (score < kLargestFloat ? score : kLargestFloat) : 0.0f;
}

// In [0, 1], for positive scores; 1 for the highest of the image.
VP_HD float importance(float score, float highest) {
  return highest > 0.0f ? score / highest : 0.0f;
}

// x^(quarters / 4) for x in [0, 1], by square roots and multiplications only, in this order.
VP_HD float power_of_quarters(float x, int quarters) {
  float result = 1.0f;
  for (int whole = quarters / 4; whole > 0; --whole) result = result * x;
  if (quarters % 4 == 0) return result;
  const float root = sqrtf(x);
  if (quarters & 2) result = result * root;
  if (quarters & 1) result = result * sqrtf(root);
  return result;
}

// ---- coverage ---------------------------------------------------------------------------------
constexpr float kCoverageUnit = 65536.0f;  // of cosine 1

// The coverage of one token by another: their cosine in fixed point, 0 where it is negative. Sums
// over an image are below 2^32 in any order.
VP_HD uint32_t coverage(float cosine) {
  const float scaled = (cosine > 0.0f ? cosine : 0.0f) * kCoverageUnit;  // exact
  return float_bits(scaled + 8388608.0f) - 0x4b000000u;                  // half to even
}

// ---- random order -----------------------------------------------------------------------------
VP_HD uint32_t mix_bits(uint32_t x) {  // MurmurHash3's finalizer
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Replaces a token's score in the ranking. It depends on the score's key, so that it differs
// between images.
VP_HD uint32_t random_key(uint32_t seed, uint32_t token, uint32_t score_key) {
  return mix_bits(mix_bits(seed + 0x9e3779b9u * token) ^ score_key);
}

}  // namespace vispruner
