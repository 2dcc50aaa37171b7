// The generator splitmix64 (Steele, Lea and Flood 2014; Vigna's constants), in parts.
#pragma once

#include <cstdint>

namespace stream_cqsa::splitmix64 {

/// The step of the counter: 2^64 over the golden ratio, odd.
inline constexpr std::uint64_t golden_gamma = 0x9e3779b97f4a7c15;

/// The finaliser: every bit of the counter reaches every bit of the result.
constexpr std::uint64_t mix(std::uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

}  // namespace stream_cqsa::splitmix64
