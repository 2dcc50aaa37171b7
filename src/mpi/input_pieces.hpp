// How the rows of a block are cut into messages.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Of one message, in bytes. A block is most often a few of them, a long token row may be
/// thousands.
inline constexpr std::size_t largest_input_piece = std::size_t{1} << 20;

/// The bytes of a block of `desc` as a source reads it.
inline std::int64_t read_bytes(const TensorDesc& desc, const Block& block) {
  return block.vectors() * desc.dim * size_of(storage_type(desc.dtype));
}

/// Calls visit(piece) for the pieces of a block in memory, in the order in which they are sent.
template <typename Byte, typename Visit>
void for_each_input_piece(std::span<Byte> data, const Visit& visit) {
  while (!data.empty()) {
    const auto piece = data.first(std::min(data.size(), largest_input_piece));
    data = data.subspan(piece.size());
    visit(piece);
  }
}

}  // namespace stream_cqsa
