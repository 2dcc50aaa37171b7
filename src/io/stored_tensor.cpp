#include "io/stored_tensor.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <limits>
#include <utility>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

std::string escaped(char c) { return fmt::format("\\x{:02x}", static_cast<unsigned char>(c)); }

}  // namespace

std::optional<std::uint64_t> checked_bytes(std::span<const std::uint64_t> shape,
                                           std::uint64_t element_bytes) {
  std::uint64_t bytes = element_bytes;
  for (const std::uint64_t extent : shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) return std::nullopt;
  }
  if (bytes > std::numeric_limits<std::int64_t>::max()) return std::nullopt;
  return bytes;
}

std::vector<std::int64_t> usable_shape(std::span<const std::uint64_t> shape, DType dtype) {
  if (shape.size() < 2 || shape.size() > 4) {
    throw InputError(fmt::format(
        "has rank {}; rank 2 [tokens, dim], 3 and 4 [batch, tokens, heads, dim] are supported",
        shape.size()));
  }
  for (const std::uint64_t extent : shape) {
    if (extent == 0) {
      throw InputError(fmt::format("is empty: its shape is [{}]", fmt::join(shape, ", ")));
    }
  }
  // Every extent is at least 1, so that a product that fits bounds each extent, too.
  if (!checked_bytes(shape, static_cast<std::uint64_t>(size_of(dtype)))) {
    throw InputError(fmt::format("has shape [{}], whose size in bytes overflows 64 bits",
                                 fmt::join(shape, ", ")));
  }
  return {shape.begin(), shape.end()};
}

TensorDesc describe(const StoredTensor& tensor, Layout layout, std::string name) {
  TensorDesc desc;
  desc.name = std::move(name);
  desc.dtype = tensor.dtype;
  desc.layout = layout;
  desc.rank = static_cast<int>(tensor.shape.size());
  const auto& shape = tensor.shape;
  desc.dim = shape.back();
  if (desc.rank == 2) {
    desc.tokens = shape[0];
    return desc;
  }
  if (desc.rank == 4) desc.batch = shape[0];
  desc.tokens = shape[shape.size() - 3];
  desc.heads = shape[shape.size() - 2];
  if (layout == Layout::bhsd) std::swap(desc.tokens, desc.heads);
  return desc;
}

std::string in_quotes(std::string_view text) {
  constexpr std::size_t longest = 64;
  std::string out = "'";
  for (const char c : text.substr(0, longest)) {
    if (c >= 0x20 && c < 0x7f) {
      out += c;
    } else {
      out += escaped(c);
    }
  }
  return out + (text.size() > longest ? "...'" : "'");
}

std::string printable(std::string_view name) {
  std::string out;
  for (const char c : name) {
    const bool control = static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
    out += control ? escaped(c) : std::string(1, c);
  }
  return out;
}

}  // namespace stream_cqsa
