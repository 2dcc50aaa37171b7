#include "stream_cqsa/fingerprint.hpp"

#include <cstring>

#include "io/splitmix64.hpp"

namespace stream_cqsa {
namespace {

using splitmix64::golden_gamma;
using splitmix64::mix;

std::uint64_t hash_vector(const std::byte* data, std::size_t bytes, std::uint64_t first_word) {
  std::uint64_t sum = 0;
  std::size_t at = 0;
  for (; at + 8 <= bytes; at += 8) {
    std::uint64_t word;
    std::memcpy(&word, data + at, 8);
    sum += mix(word + golden_gamma * ++first_word);
  }
  if (at < bytes) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + at, bytes - at);
    sum += mix(word + golden_gamma * ++first_word);
  }
  return sum;
}

template <typename Bits>
NonFinite count_non_finite(const std::byte* data, std::int64_t count, Bits exponent, Bits sign) {
  NonFinite found;
  for (std::int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, data + i * static_cast<std::int64_t>(sizeof bits), sizeof bits);
    const Bits magnitude = static_cast<Bits>(bits & ~sign);
    found.nan += magnitude > exponent;
    found.infinite += magnitude == exponent;
  }
  return found;
}

NonFinite count_non_finite(DType dtype, const std::byte* data, std::int64_t count) {
  switch (dtype) {
    case DType::f16:
      return count_non_finite<std::uint16_t>(data, count, 0x7c00, 0x8000);
    case DType::bf16:
      return count_non_finite<std::uint16_t>(data, count, 0x7f80, 0x8000);
    case DType::f32:
      return count_non_finite<std::uint32_t>(data, count, 0x7f800000, 0x80000000);
    case DType::f64:
      return count_non_finite<std::uint64_t>(data, count, 0x7ff0000000000000, 0x8000000000000000);
  }
  return {};
}

}  // namespace

void Fingerprint::add(const TensorDesc& desc, DType dtype, const Block& block,
                      const StridedRows& rows) {
  const std::int64_t vector_bytes = desc.dim * size_of(dtype);
  const std::int64_t words = ceil_div(vector_bytes, 8);
  for (std::int64_t token = 0; token < block.tokens.size(); ++token) {
    for (std::int64_t head = 0; head < block.heads.size(); ++head) {
      const std::byte* data = rows.data + token * rows.token_stride + head * rows.head_stride;
      const std::int64_t vector =
          (block.batch * desc.tokens + block.tokens.begin + token) * desc.heads +
          block.heads.begin + head;
      checksum += hash_vector(data, static_cast<std::size_t>(vector_bytes),
                              static_cast<std::uint64_t>(vector * words));
      non_finite += count_non_finite(dtype, data, desc.dim);
    }
  }
  vectors += block.vectors();
}

}  // namespace stream_cqsa
