// Conversions: cvt between integers and floats of all widths.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>

#include "warp.h"

namespace ptx {

enum class Rounding : uint8_t { kNearest, kZero, kDown, kUp };

inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3ff;
  uint32_t bits;
  if (exponent == 31) {
    bits = mantissa ? 0x7fffffffu : sign | 0x7f800000u;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t half_of_float(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fff;
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000u) {  // the result is subnormal
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return static_cast<uint16_t>(
        sign | static_cast<uint32_t>(std::nearbyint(static_cast<double>(magnitude) * 0x1p24)));
  }
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
inline float float_of_bfloat(uint16_t bfloat) {
  const uint32_t bits = uint32_t{bfloat} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t bfloat_of_float(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A floating point number in a 16-bit register.
struct Half {
  static float to_float(uint16_t bits) { return float_of_half(bits); }
  static uint16_t from_float(float value) { return half_of_float(value); }
};
struct BFloat {
  static float to_float(uint16_t bits) { return float_of_bfloat(bits); }
  static uint16_t from_float(float value) { return bfloat_of_float(value); }
};
template <typename F>
void float_from_16(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<uint32_t>(warp, i.a);
  write_each_lane(destination<float>(warp, i.d), lanes, [=](uint32_t l) {
    return slot_of<float>(F::to_float(static_cast<uint16_t>(a[l])));
  });
}
template <typename F>
void float_to_16(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<float>(warp, i.a);
  write_each_lane(destination<uint32_t>(warp, i.d), lanes,
                  [=](uint32_t l) { return uint32_t{F::from_float(value_of<float>(a[l]))}; });
}

// The source register may be wider than the source type: From is the source type, Held that of the
// register.
template <typename Op, typename To, typename From, typename Held>
void convert(Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto* a = source<Held>(warp, i.a);
  write_lanes(destination<To>(warp, i.d), lanes, [=](uint32_t l) {
    return slot_of<To>(Op::template run<To, From>(static_cast<From>(value_of<Held>(a[l]))));
  });
}

struct ConvertInteger {
  template <typename To, typename From>
  static To run(From value) {
    return static_cast<To>(value);
  }
};
struct SaturateInteger {
  template <typename To, typename From>
  static To run(From value) {
    constexpr auto kLow = static_cast<__int128>(std::numeric_limits<To>::min());
    constexpr auto kHigh = static_cast<__int128>(std::numeric_limits<To>::max());
    const auto wide = static_cast<__int128>(value);
    return static_cast<To>(wide < kLow ? kLow : wide > kHigh ? kHigh : wide);
  }
};
template <Rounding kRounding>
struct RoundToIntegral {  // stays a float
  template <typename To, typename From>
  static To run(From value) {
    switch (kRounding) {
      case Rounding::kNearest: return static_cast<To>(std::nearbyint(value));
      case Rounding::kZero: return static_cast<To>(std::trunc(value));
      case Rounding::kDown: return static_cast<To>(std::floor(value));
      case Rounding::kUp: return static_cast<To>(std::ceil(value));
    }
  }
};
template <Rounding kRounding>
struct FloatToInteger {  // out of range: the nearest; NaN: zero
  template <typename To, typename From>
  static To run(From value) {
    if (value != value) return 0;
    const From whole = RoundToIntegral<kRounding>::template run<From, From>(value);
    // 2^digits is exact in every float type; the largest integer may not be.
    const From beyond = std::ldexp(From(1), std::numeric_limits<To>::digits);
    if (whole >= beyond) return std::numeric_limits<To>::max();
    if (whole < (std::is_signed_v<To> ? -beyond : From(0))) return std::numeric_limits<To>::min();
    return static_cast<To>(whole);
  }
};
struct ToFloat {  // to nearest even
  template <typename To, typename From>
  static To run(From value) {
    return static_cast<To>(value);
  }
};
struct Saturate {  // to [0, 1]; NaN: zero
  template <typename To, typename From>
  static To run(From value) {
    const auto x = static_cast<To>(value);
    return x > To(0) ? (x < To(1) ? x : To(1)) : To(0);
  }
};

}  // namespace ptx
