#define BOOST_TEST_MODULE dtype
#include "stream_cqsa/dtype.hpp"

#include <boost/test/unit_test.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

using namespace stream_cqsa;

namespace {

// A small format's value from its definition: 1 sign bit, then exponent, then mantissa.
double value_of(std::uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  const double sign = bits >> 15 & 1 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// Decodes and encodes all 65536 bit patterns; returns how many are wrong.
template <typename Decode, typename Encode>
int round_trip_errors(Decode decode, Encode encode, int exponent_bits, int mantissa_bits) {
  int errors = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = decode(static_cast<std::uint16_t>(bits));
    const std::uint16_t back = encode(value);
    errors += !same(value, value_of(bits, exponent_bits, mantissa_bits));
    // A signalling NaN may come back quiet.
    errors +=
        std::isnan(value) ? !std::isnan(decode(back)) || (back ^ bits) >> 15 != 0 : back != bits;
  }
  return errors;
}

// Rounding at and beside the midpoint of every two neighbouring finite values of either sign;
// `largest` is the greatest finite value, whose upper neighbour is infinity.
template <typename Encode>
int rounding_errors(Encode encode, std::uint32_t largest, int exponent_bits, int mantissa_bits) {
  int errors = 0;
  for (std::uint32_t low = 0; low <= largest; ++low) {
    const double below = value_of(low, exponent_bits, mantissa_bits);
    const double above = low == largest
                             ? 2 * below - value_of(low - 1, exponent_bits, mantissa_bits)
                             : value_of(low + 1, exponent_bits, mantissa_bits);
    const auto middle = static_cast<float>((below + above) / 2);
    const std::uint32_t even = low % 2 == 0 ? low : low + 1;
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const float factor = sign != 0 ? -1.0f : 1.0f;
      errors += encode(factor * middle) != (even | sign);
      errors += encode(factor * std::nextafter(middle, 0.0f)) != (low | sign);
      errors += encode(factor * std::nextafter(middle, INFINITY)) != ((low + 1) | sign);
    }
  }
  return errors;
}

}  // namespace

BOOST_AUTO_TEST_CASE(names_parse_back) {
  for (const DType type : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    const auto parsed = parse_dtype(name_of(type));
    BOOST_REQUIRE(parsed.has_value());
    BOOST_TEST((*parsed == type));
  }
  for (const char* name : {"", "f8", "F16", "float16", "f16 ", "unknown"}) {
    BOOST_TEST(!parse_dtype(name).has_value(), name);
  }
}

BOOST_AUTO_TEST_CASE(sizes_and_storage) {
  BOOST_TEST(size_of(DType::f16) == 2);
  BOOST_TEST(size_of(DType::bf16) == 2);
  BOOST_TEST(size_of(DType::f32) == 4);
  BOOST_TEST(size_of(DType::f64) == 8);
  BOOST_TEST((storage_type(DType::f64) == DType::f32));
  BOOST_TEST((storage_type(DType::bf16) == DType::bf16));
}

BOOST_AUTO_TEST_CASE(every_f16_converts_both_ways) {
  BOOST_TEST(round_trip_errors(f16_to_f32, f32_to_f16, 5, 10) == 0);
}

BOOST_AUTO_TEST_CASE(every_bf16_converts_both_ways) {
  BOOST_TEST(round_trip_errors(bf16_to_f32, f32_to_bf16, 8, 7) == 0);
}

BOOST_AUTO_TEST_CASE(f16_rounds_to_nearest_even) {
  BOOST_TEST(rounding_errors(f32_to_f16, 0x7bff, 5, 10) == 0);
}

BOOST_AUTO_TEST_CASE(bf16_rounds_to_nearest_even) {
  BOOST_TEST(rounding_errors(f32_to_bf16, 0x7f7f, 8, 7) == 0);
}

BOOST_AUTO_TEST_CASE(f16_range_ends) {
  BOOST_TEST(f32_to_f16(65504.0f) == 0x7bff);
  BOOST_TEST(f32_to_f16(65519.996f) == 0x7bff);
  BOOST_TEST(f32_to_f16(65520.0f) == 0x7c00);
  BOOST_TEST(f32_to_f16(-1e30f) == 0xfc00);
  BOOST_TEST(f32_to_f16(INFINITY) == 0x7c00);
  BOOST_TEST(f32_to_f16(0x1p-25f) == 0);
  BOOST_TEST(f32_to_f16(0x1.000002p-25f) == 1);
  BOOST_TEST(f32_to_f16(-0x1p-149f) == 0x8000);
  BOOST_TEST(f32_to_f16(-0.0f) == 0x8000);
}

BOOST_AUTO_TEST_CASE(nan_stays_nan) {
  for (const std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffc12345u,
                                   0x7f80ffffu, 0x7f801fffu}) {
    const auto value = std::bit_cast<float>(bits);
    BOOST_TEST(std::isnan(f16_to_f32(f32_to_f16(value))), "bits " << bits);
    BOOST_TEST(std::isnan(bf16_to_f32(f32_to_bf16(value))), "bits " << bits);
  }
}

BOOST_AUTO_TEST_CASE(f16_of_random_floats_is_the_nearest) {
  const unsigned seed = 20240601;
  BOOST_TEST_CONTEXT("seed " << seed) {
    std::mt19937 random(seed);
    int errors = 0;
    for (int i = 0; i < 200000; ++i) {
      // Exponents from below the smallest subnormal half to the largest finite one.
      const float value =
          std::ldexp(static_cast<float>(random() >> 8), static_cast<int>(i % 43) - 50);
      if (!(value < 65504.0f)) continue;
      const std::uint16_t half = f32_to_f16(value);
      const double error = std::abs(value_of(half, 5, 10) - value);
      const double next = std::abs(value_of(half + 1u, 5, 10) - value);
      const double previous = half == 0 ? INFINITY : std::abs(value_of(half - 1u, 5, 10) - value);
      errors += !(error <= next && error <= previous);
    }
    BOOST_TEST(errors == 0);
  }
}
