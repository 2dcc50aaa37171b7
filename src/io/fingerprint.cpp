#include "stream_cqsa/fingerprint.hpp"

#include <cstring>

#include "io/splitmix64.hpp"

namespace stream_cqsa {
namespace {

using splitmix64::golden_gamma;
using splitmix64::mix;

/// The parts of an element type's numbers, in every element of 64 bits.
struct Parts {
  std::uint64_t exponents;
  std::uint64_t lowest_of_exponents;
  std::uint64_t signs;
};

template <typename Bits>
constexpr Parts parts_of(Bits exponent, Bits sign) {
  // 1 in every element.
  constexpr std::uint64_t each = ~std::uint64_t{0} / static_cast<Bits>(~Bits{0});
  return {each * exponent, each * (exponent & -exponent), each * sign};
}

Parts parts_of(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return parts_of<std::uint16_t>(0x7c00, 0x8000);
    case DType::bf16:
      return parts_of<std::uint16_t>(0x7f80, 0x8000);
    case DType::f32:
      return parts_of<std::uint32_t>(0x7f800000, 0x80000000);
    case DType::f64:
      return parts_of<std::uint64_t>(0x7ff0000000000000, 0x8000000000000000);
  }
  return {};
}

struct VectorHash {
  std::uint64_t sum = 0;
  std::uint64_t non_finite = 0;  ///< not 0 where there is an element with an exponent of ones

  void add(std::uint64_t word, std::uint64_t place, const Parts& parts) {
    sum += mix(word + place);
    // Only an exponent of ones carries into the sign.
    non_finite |= ((word & parts.exponents) + parts.lowest_of_exponents) & parts.signs;
  }
};

VectorHash hash_vector(const std::byte* data, std::size_t bytes, std::uint64_t first_word,
                       const Parts& parts) {
  VectorHash hash;
  std::uint64_t place = golden_gamma * first_word;
  std::size_t at = 0;
  for (; at + 8 <= bytes; at += 8) {
    std::uint64_t word;
    std::memcpy(&word, data + at, 8);
    hash.add(word, place += golden_gamma, parts);
  }
  if (at < bytes) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + at, bytes - at);
    hash.add(word, place += golden_gamma, parts);
  }
  return hash;
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
  const Parts parts = parts_of(dtype);
  for (std::int64_t token = 0; token < block.tokens.size(); ++token) {
    for (std::int64_t head = 0; head < block.heads.size(); ++head) {
      const std::byte* data = rows.data + token * rows.token_stride + head * rows.head_stride;
      const std::int64_t vector =
          (block.batch * desc.tokens + block.tokens.begin + token) * desc.heads +
          block.heads.begin + head;
      const VectorHash hash = hash_vector(data, static_cast<std::size_t>(vector_bytes),
                                          static_cast<std::uint64_t>(vector * words), parts);
      checksum += hash.sum;
      if (hash.non_finite) non_finite += count_non_finite(dtype, data, desc.dim);
    }
  }
  vectors += block.vectors();
}

}  // namespace stream_cqsa
