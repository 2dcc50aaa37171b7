// The header of a .npy file, versions 1 to 3.
// Source: numpy, numpy/lib/format.py ("Format Version 1.0" and on).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "io/stored_tensor.hpp"

namespace stream_cqsa {

/// As many bytes as say how long a header is.
inline constexpr std::uint64_t npy_prefix_bytes = 12;

/// Bytes before the data. `start` is the file's first npy_prefix_bytes, or all of a shorter file.
/// Throws InputError when it is no .npy file, of an unknown version, or the header does not fit.
std::uint64_t npy_header_bytes(std::span<const std::byte> start, std::uint64_t file_size);

/// The tensor of a .npy file of `file_size` bytes of which `start` is at least the header.
/// Throws InputError, without the file's name, when the header is malformed, the dtype is not
/// little-endian float16, 32 or 64, the order is Fortran's, the shape is not usable (see
/// usable_shape), or the file is shorter than its shape. Bytes after the data are ignored, as numpy
/// does.
StoredTensor parse_npy_header(std::span<const std::byte> start, std::uint64_t file_size);

/// The version 1 header of a C-ordered array, padded so that the data starts on a multiple of 64.
/// Throws InputError for bf16, which .npy does not have.
std::string format_npy_header(DType dtype, std::span<const std::int64_t> shape);

}  // namespace stream_cqsa
