#include "engine/checksum.hpp"

#include <array>
#include <bit>
#include <cstring>

namespace stream_cqsa {
namespace {

// Odd, with bits well spread: xxHash's primes.
constexpr std::uint64_t first_prime = 0x9e3779b185ebca87;
constexpr std::uint64_t second_prime = 0xc2b2ae3d27d4eb4f;
constexpr std::uint64_t third_prime = 0x165667b19e3779f9;
constexpr std::size_t word_bytes = sizeof(std::uint64_t);
constexpr std::size_t lanes = 4;

std::uint64_t word_at(const std::byte* data) {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof word);
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  return word;
}

// One-to-one in the sum for a fixed word, and in the word for a fixed sum: a difference that has
// come into a lane never leaves it while the words that follow are the same.
std::uint64_t mix(std::uint64_t sum, std::uint64_t word) {
  return std::rotl(sum + word * second_prime, 31) * first_prime;
}

// One-to-one: spreads every bit over all.
std::uint64_t spread(std::uint64_t sum) {
  sum = (sum ^ (sum >> 33)) * second_prime;
  sum = (sum ^ (sum >> 29)) * third_prime;
  return sum ^ (sum >> 32);
}

}  // namespace

std::uint64_t checksum(std::span<const std::byte> data, std::uint64_t seed) {
  const std::size_t bytes = data.size();
  const std::byte* at = data.data();
  // Four sums at once: each waits for its own multiplications alone.
  std::array<std::uint64_t, lanes> lane = {seed, seed + first_prime, seed ^ second_prime, ~seed};
  std::size_t left = bytes;
  for (; left >= lanes * word_bytes; left -= lanes * word_bytes, at += lanes * word_bytes) {
    for (std::size_t i = 0; i < lanes; ++i) lane[i] = mix(lane[i], word_at(at + i * word_bytes));
  }
  std::uint64_t sum = mix(seed, bytes);
  for (const std::uint64_t part : lane) sum = mix(sum, part);
  for (; left >= word_bytes; left -= word_bytes, at += word_bytes) sum = mix(sum, word_at(at));
  if (left > 0) {
    std::array<std::byte, word_bytes> rest{};
    std::memcpy(rest.data(), at, left);
    sum = mix(sum, word_at(rest.data()));
  }
  return spread(sum);
}

std::uint64_t checksum(std::initializer_list<std::uint64_t> words, std::uint64_t seed) {
  std::uint64_t sum = mix(seed, words.size());
  for (const std::uint64_t word : words) sum = mix(sum, word);
  return spread(sum);
}

}  // namespace stream_cqsa
