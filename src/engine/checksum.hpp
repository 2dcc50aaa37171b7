// A fast checksum of bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>

namespace stream_cqsa {

/// 64 bits that depend on every byte, the number of bytes and `seed`. A change within any single
/// aligned 8-byte word always changes it, other accidents all but 2^-64 of the time. Several GB/s.
/// Detects accidents, not adversaries.
std::uint64_t checksum(std::span<const std::byte> data, std::uint64_t seed);

/// The same of a few numbers.
std::uint64_t checksum(std::initializer_list<std::uint64_t> words, std::uint64_t seed);

}  // namespace stream_cqsa
