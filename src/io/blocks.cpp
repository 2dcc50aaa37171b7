#include "io/blocks.hpp"

#include <fmt/format.h>

#include <cstddef>
#include <vector>

#include "io/stored_tensor.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

void check_desc(const TensorDesc& desc) {
  const bool has_rank = desc.rank >= 2 && desc.rank <= 4 && (desc.rank == 4 || desc.batch == 1) &&
                        (desc.rank > 2 || desc.heads == 1) && (!desc.squeeze_dim || desc.dim == 1);
  std::vector<std::uint64_t> extents;
  bool positive = true;
  for (const std::int64_t extent : {desc.batch, desc.tokens, desc.heads, desc.dim}) {
    positive = positive && extent > 0;
    extents.push_back(static_cast<std::uint64_t>(extent));
  }
  // fp64 covers the storage type of every dtype.
  if (!has_rank || !positive || !checked_bytes(extents, sizeof(double))) {
    throw InputError(
        fmt::format("{}: batch {}, tokens {}, heads {}, dim {} is no tensor of rank {}; every "
                    "extent must be at "
                    "least 1, and the size in bytes fit in 63 bits",
                    desc.name, desc.batch, desc.tokens, desc.heads, desc.dim, desc.rank));
  }
}

void check_block(const TensorDesc& desc, const Block& block, std::size_t bytes,
                 std::int64_t element_bytes) {
  const auto inside = [](Range range, std::int64_t extent) {
    return range.begin >= 0 && range.begin <= range.end && range.end <= extent;
  };
  if (block.batch < 0 || block.batch >= desc.batch || !inside(block.tokens, desc.tokens) ||
      !inside(block.heads, desc.heads)) {
    throw Error(fmt::format("{}: batch {}, tokens [{}, {}), heads [{}, {}) is not in the tensor",
                            desc.name, block.batch, block.tokens.begin, block.tokens.end,
                            block.heads.begin, block.heads.end));
  }
  const std::int64_t needed = block.vectors() * desc.dim * element_bytes;
  if (bytes != static_cast<std::size_t>(needed)) {
    throw Error(
        fmt::format("{}: a buffer of {} bytes for a block of {}", desc.name, bytes, needed));
  }
}

void check_read(const TensorDesc& desc, const Block& block, std::size_t bytes) {
  check_block(desc, block, bytes, size_of(storage_type(desc.dtype)));
  if (desc.readable_heads(block.heads) != block.heads) {
    throw Error(fmt::format("{}: bshd is read in whole token rows, not heads [{}, {})", desc.name,
                            block.heads.begin, block.heads.end));
  }
}

}  // namespace stream_cqsa
