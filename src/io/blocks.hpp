// Where the vectors of a block lie in a tensor.
#pragma once

#include <cstdint>

#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Throws InputError unless rank and extents agree, every extent is at least 1, and the size in
/// bytes fits in 63 bits.
void check_desc(const TensorDesc& desc);

/// Throws Error unless `block` lies inside the tensor and `bytes` is its size with elements of
/// `element_bytes`.
void check_block(const TensorDesc& desc, const Block& block, std::size_t bytes,
                 std::int64_t element_bytes);

/// check_block for TensorSource::read: with bshd the block must have all heads, too.
void check_read(const TensorDesc& desc, const Block& block, std::size_t bytes);

/// Which vector of the tensor, counted in the order of its layout, (batch, token, head) is.
inline std::int64_t vector_index(const TensorDesc& desc, std::int64_t batch, std::int64_t token,
                                 std::int64_t head) {
  if (desc.layout == Layout::bshd) return (batch * desc.tokens + token) * desc.heads + head;
  return (batch * desc.heads + head) * desc.tokens + token;
}

/// Calls run(first vector, vectors) for each contiguous run of a block that check_read accepts, in
/// the order of the layout: one after another the runs are the packed block.
template <typename Run>
void for_each_run(const TensorDesc& desc, const Block& block, Run&& run) {
  const auto [batch, tokens, heads] = block;
  const std::int64_t first = vector_index(desc, batch, tokens.begin, heads.begin);
  if (desc.layout == Layout::bshd || tokens.size() == desc.tokens) {
    run(first, block.vectors());
    return;
  }
  for (std::int64_t head = 0; head < heads.size(); ++head) {
    run(first + head * desc.tokens, tokens.size());
  }
}

}  // namespace stream_cqsa
