// Element types and their exact conversions to and from fp32.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>

namespace stream_cqsa {

enum class DType { f16, bf16, f32, f64 };

constexpr std::int64_t size_of(DType type) {
  return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2;
}

/// Half the distance between 1 and the next larger number of the type.
constexpr double unit_roundoff(DType type) {
  switch (type) {
    case DType::f16:
      return 0x1p-11;
    case DType::bf16:
      return 0x1p-8;
    case DType::f32:
      return 0x1p-24;
    case DType::f64:
      return 0x1p-53;
  }
  return 0;
}

/// The type that chunks have in memory and on the device. Arithmetic is fp32, so float64 input is
/// rounded to float32 when it is read.
constexpr DType storage_type(DType type) { return type == DType::f64 ? DType::f32 : type; }

/// "f16", "bf16", "f32" or "f64".
std::string_view name_of(DType type);
std::optional<DType> parse_dtype(std::string_view name);

inline float bf16_to_f32(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Rounds to nearest, ties to even; NaN stays NaN.
inline std::uint16_t f32_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float f16_to_f32(std::uint16_t bits);

/// Rounds to nearest, ties to even; overflow gives infinity; NaN stays NaN.
std::uint16_t f32_to_f16(float value);

}  // namespace stream_cqsa
