#include "stream_cqsa/synthetic.hpp"

#include <bit>
#include <cstddef>
#include <cstring>
#include <utility>

#include "io/blocks.hpp"
#include "io/splitmix64.hpp"

namespace stream_cqsa {
namespace {

using splitmix64::golden_gamma;
using splitmix64::mix;

constexpr std::uint64_t key_of(std::uint64_t seed, std::uint32_t stream) {
  return mix(mix(seed + golden_gamma) + (stream + 1) * golden_gamma);
}

/// The element in units of 2^-10, from `counter` = key + index * golden_gamma.
///
/// The sum of four 16-bit uniform numbers (Irwin-Hall) has mean 131070 and deviation
/// 65536 / sqrt(3); scaled to deviation 1024. At most 3548 in magnitude.
constexpr std::int32_t element_units(std::uint64_t counter) {
  constexpr std::uint64_t every_other_lane = 0x0000ffff0000ffff;
  constexpr std::int32_t mean = 131070;
  constexpr std::int32_t scale = 1774;  // 2^16 * 1024 / (65536 / sqrt(3))
  const std::uint64_t bits = mix(counter);
  const std::uint64_t pairs = (bits & every_other_lane) + (bits >> 16 & every_other_lane);
  const auto sum = static_cast<std::int32_t>((pairs >> 32) + (pairs & 0xffffffff));
  return ((sum - mean) * scale + (1 << 15)) >> 16;
}

constexpr float unit = 0x1p-10f;

// Conversions of an element to each storage type.

struct ToF32 {
  using Stored = float;
  static float convert(std::int32_t units) { return static_cast<float>(units) * unit; }
};

struct ToBf16 {
  using Stored = std::uint16_t;
  static std::uint16_t convert(std::int32_t units) { return f32_to_bf16(ToF32::convert(units)); }
};

struct ToF16 {
  using Stored = std::uint16_t;
  // f32_to_f16 without its cases: an element is zero or, at 2^-10 to 8, a normal number of fp16.
  static std::uint16_t convert(std::int32_t units) {
    constexpr std::uint32_t exponent_difference = (127 - 15) << 10;
    const auto bits = std::bit_cast<std::uint32_t>(ToF32::convert(units));
    const std::uint32_t magnitude = bits & 0x7fffffff;
    const std::uint32_t rounded = (magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const std::uint32_t half = units == 0 ? 0 : rounded - exponent_difference;
    return static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000));
  }
};

template <typename Conversion>
std::byte* fill(std::uint64_t counter, std::int64_t count, std::byte* out) {
  using Stored = typename Conversion::Stored;
  for (std::int64_t i = 0; i < count; ++i, counter += golden_gamma, out += sizeof(Stored)) {
    const Stored value = Conversion::convert(element_units(counter));
    std::memcpy(out, &value, sizeof value);  // the caller's bytes need not be aligned
  }
  return out;
}

class SyntheticSource final : public TensorSource {
 public:
  SyntheticSource(TensorDesc desc, std::uint64_t seed, std::uint32_t stream)
      : TensorSource(std::move(desc)), key_(key_of(seed, stream)) {
    check_desc(desc_);
  }

  void read(const Block& block, std::span<std::byte> into) override {
    check_read(desc_, block, into.size());
    std::byte* out = into.data();
    // Elements are numbered as in bshd: there a block is contiguous, else each vector of it.
    if (desc_.layout == Layout::bshd) {
      generate(block, block.tokens.begin, block.heads.begin, block.vectors(), out);
      return;
    }
    for (std::int64_t head = block.heads.begin; head < block.heads.end; ++head) {
      for (std::int64_t token = block.tokens.begin; token < block.tokens.end; ++token) {
        out = generate(block, token, head, 1, out);
      }
    }
  }

 private:
  std::byte* generate(const Block& block, std::int64_t token, std::int64_t head,
                      std::int64_t vectors, std::byte* out) const {
    const std::int64_t vector = (block.batch * desc_.tokens + token) * desc_.heads + head;
    const std::uint64_t counter =
        key_ + static_cast<std::uint64_t>(vector * desc_.dim) * golden_gamma;
    const std::int64_t count = vectors * desc_.dim;
    switch (storage_type(desc_.dtype)) {
      case DType::f16:
        return fill<ToF16>(counter, count, out);
      case DType::bf16:
        return fill<ToBf16>(counter, count, out);
      default:
        return fill<ToF32>(counter, count, out);
    }
  }

  std::uint64_t key_;
};

}  // namespace

float synthetic_element(std::uint64_t seed, std::uint32_t stream, std::uint64_t index) {
  return ToF32::convert(element_units(key_of(seed, stream) + index * golden_gamma));
}

std::unique_ptr<TensorSource> make_synthetic_source(TensorDesc desc, std::uint64_t seed,
                                                    std::uint32_t stream) {
  return std::make_unique<SyntheticSource>(std::move(desc), seed, stream);
}

}  // namespace stream_cqsa
