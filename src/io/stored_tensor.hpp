// A tensor as a file's header describes it, before it is known to be one that we can use.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stream_cqsa/dtype.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// A tensor of a supported dtype and shape that lies wholly inside its file.
struct StoredTensor {
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;  ///< 2 to 4 extents, each at least 1, slowest first
  std::uint64_t offset = 0;         ///< bytes from the start of the file
};

/// product(shape) * element_bytes, or nothing where it does not fit in 63 bits.
std::optional<std::uint64_t> checked_bytes(std::span<const std::uint64_t> shape,
                                           std::uint64_t element_bytes);

/// The shape as signed extents. Throws InputError unless it has rank 2 to 4, no extent is 0, and
/// its size in bytes fits in 63 bits.
std::vector<std::int64_t> usable_shape(std::span<const std::uint64_t> shape, DType dtype);

/// What `tensor` is in `layout` (see TensorDesc), under `name`.
TensorDesc describe(const StoredTensor& tensor, Layout layout, std::string name);

/// Text from a file, in quotes, fit for a one-line message: escapes what is not printable ASCII and
/// shortens what is long.
std::string in_quotes(std::string_view text);

/// A file's name, fit for a one-line message: escapes control characters, and nothing else.
std::string printable(std::string_view name);

}  // namespace stream_cqsa
