// The header of a .safetensors file: 8 bytes of little-endian length, then JSON, then the data.
// Source: github.com/huggingface/safetensors, README.md ("Format") and safetensors/src/tensor.rs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/stored_tensor.hpp"

namespace stream_cqsa {

/// As many bytes as say how long a header is.
inline constexpr std::uint64_t safetensors_prefix_bytes = 8;

/// One tensor as the header lists it, of any dtype.
struct SafetensorsEntry {
  std::string name;
  std::string dtype;  ///< "F16", "I64", ...
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0, end = 0;  ///< byte range, from the start of the data
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;  ///< ascending by byte range
  std::uint64_t data_offset = 0;          ///< bytes from the start of the file
};

/// Bytes before the data. `start` is the file's first safetensors_prefix_bytes, or all of a shorter
/// file. Throws InputError when the header does not fit or is larger than the format's 100 MB.
std::uint64_t safetensors_header_bytes(std::span<const std::byte> start, std::uint64_t file_size);

/// The tensors of a file of `file_size` bytes of which `start` is at least the header.
/// Throws InputError, without the file's name, unless the header is the JSON that the format
/// prescribes, names are distinct, each byte range agrees with shape and dtype, and the ranges
/// cover the data exactly, without overlaps or holes.
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> start,
                                           std::uint64_t file_size);

/// The first of `names` (separated by '|') that the file has. Throws InputError when it has none
/// (naming those it has), or when its dtype or shape is not supported.
struct NamedTensor {
  std::string name;
  StoredTensor tensor;
};
NamedTensor find_tensor(const SafetensorsHeader& header, std::string_view names);

/// A tensor of a file to be written.
struct SafetensorsOutput {
  std::string name;
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;
};

/// The header of a file of these tensors, whose data follow one another in this order, padded so
/// that the data starts on a multiple of 8.
std::string format_safetensors_header(const std::vector<SafetensorsOutput>& tensors);

}  // namespace stream_cqsa
