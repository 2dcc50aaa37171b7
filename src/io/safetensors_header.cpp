#include "io/safetensors_header.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "io/safetensors_json.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::uint64_t longest_header = 100'000'000;

struct Element {
  std::string_view name;
  std::uint64_t bytes;
  std::optional<DType> dtype;  ///< where we support it
};
constexpr Element elements[] = {
    {"F16", 2, DType::f16},      {"BF16", 2, DType::bf16},  {"F32", 4, DType::f32},
    {"F64", 8, DType::f64},      {"BOOL", 1, std::nullopt}, {"U8", 1, std::nullopt},
    {"I8", 1, std::nullopt},     {"U16", 2, std::nullopt},  {"I16", 2, std::nullopt},
    {"U32", 4, std::nullopt},    {"I32", 4, std::nullopt},  {"U64", 8, std::nullopt},
    {"I64", 8, std::nullopt},    {"C64", 8, std::nullopt},  {"F8_E5M2", 1, std::nullopt},
    {"F8_E4M3", 1, std::nullopt}};

const Element* find_element(std::string_view name) {
  const auto* found = std::ranges::find(elements, name, &Element::name);
  return found == std::end(elements) ? nullptr : found;
}

void check_entry(const SafetensorsEntry& entry, std::uint64_t data_bytes) {
  const auto fail = [&](const std::string& what) {
    throw InputError(fmt::format("has a bad tensor {}: {}", in_quotes(entry.name), what));
  };
  if (entry.begin > entry.end) {
    fail(fmt::format("its byte range [{}, {}) ends before it begins", entry.begin, entry.end));
  }
  if (entry.end > data_bytes) {
    fail(
        fmt::format("its byte range [{}, {}) is out of bounds, the file has {} bytes of data; it "
                    "may be truncated",
                    entry.begin, entry.end, data_bytes));
  }
  // A dtype unknown here may be of less than a byte; its tensors cannot be used, only skipped.
  const Element* element = find_element(entry.dtype);
  if (element == nullptr) return;
  const auto bytes = checked_bytes(entry.shape, element->bytes);
  if (!bytes) {
    fail(fmt::format("its shape [{}] overflows 64 bits", fmt::join(entry.shape, ", ")));
  }
  if (*bytes != entry.end - entry.begin) {
    fail(fmt::format("shape [{}] of {} takes {} bytes, its byte range has {}",
                     fmt::join(entry.shape, ", "), entry.dtype, *bytes, entry.end - entry.begin));
  }
}

void check_names(const std::vector<SafetensorsEntry>& tensors) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const auto& entry : tensors) names.push_back(entry.name);
  std::ranges::sort(names);
  const auto twice = std::ranges::adjacent_find(names);
  if (twice != names.end()) {
    throw InputError(fmt::format("names the tensor {} more than once", in_quotes(*twice)));
  }
}

/// The ranges, ascending, must follow one another from 0 to the end of the data.
void check_cover(const std::vector<SafetensorsEntry>& tensors, std::uint64_t data_bytes) {
  std::uint64_t covered = 0;
  for (const auto& entry : tensors) {
    if (entry.begin != covered) {
      throw InputError(fmt::format("has a bad tensor {}: its byte range [{}, {}) {} at {}",
                                   in_quotes(entry.name), entry.begin, entry.end,
                                   entry.begin < covered ? "overlaps the one that ends"
                                                         : "leaves a hole after the one that ends",
                                   covered));
    }
    covered = entry.end;
  }
  if (covered != data_bytes) {
    throw InputError(fmt::format("has {} bytes of data after the {} that its tensors cover",
                                 data_bytes - covered, covered));
  }
}

std::string list_names(const SafetensorsHeader& header) {
  constexpr std::size_t most = 12;
  std::vector<std::string> names;
  for (const auto& entry : header.tensors) {
    if (names.size() == most) {
      names.push_back(fmt::format("and {} more", header.tensors.size() - most));
      break;
    }
    names.push_back(in_quotes(entry.name));
  }
  return names.empty() ? "none" : fmt::format("{}", fmt::join(names, ", "));
}

StoredTensor usable_tensor(const SafetensorsHeader& header, const SafetensorsEntry& entry) {
  const Element* element = find_element(entry.dtype);
  if (element == nullptr || !element->dtype) {
    throw InputError(
        fmt::format("tensor {} has the unsupported dtype {}; F16, BF16, F32 and F64 are supported",
                    in_quotes(entry.name), in_quotes(entry.dtype)));
  }
  try {
    return {*element->dtype, usable_shape(entry.shape, *element->dtype),
            header.data_offset + entry.begin};
  } catch (const InputError& error) {
    throw InputError(fmt::format("tensor {} {}", in_quotes(entry.name), error.what()));
  }
}

}  // namespace

std::uint64_t safetensors_header_bytes(std::span<const std::byte> start, std::uint64_t file_size) {
  if (start.size() < safetensors_prefix_bytes || file_size < safetensors_prefix_bytes) {
    throw InputError("is truncated: a .safetensors file starts with 8 bytes of header length");
  }
  std::uint64_t length = 0;
  for (std::size_t i = safetensors_prefix_bytes; i-- > 0;) {
    length = length << 8 | std::to_integer<std::uint64_t>(start[i]);
  }
  if (length > longest_header) {
    throw InputError(
        fmt::format("has a .safetensors header that is too large: {} bytes, {} are allowed", length,
                    longest_header));
  }
  if (length > file_size - safetensors_prefix_bytes) {
    throw InputError(fmt::format("is truncated: its header takes {} bytes, the file has {}",
                                 length + safetensors_prefix_bytes, file_size));
  }
  return safetensors_prefix_bytes + length;
}

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> start,
                                           std::uint64_t file_size) {
  SafetensorsHeader header;
  header.data_offset = safetensors_header_bytes(start, file_size);
  if (start.size() < header.data_offset) throw InputError("is truncated: its header is cut");
  const auto json =
      start.subspan(safetensors_prefix_bytes, header.data_offset - safetensors_prefix_bytes);
  header.tensors =
      parse_safetensors_json({reinterpret_cast<const char*>(json.data()), json.size()});

  const std::uint64_t data_bytes = file_size - header.data_offset;
  for (const auto& entry : header.tensors) check_entry(entry, data_bytes);
  check_names(header.tensors);
  std::ranges::sort(header.tensors, {}, [](const SafetensorsEntry& entry) {
    return std::pair(entry.begin, entry.end);
  });
  check_cover(header.tensors, data_bytes);
  return header;
}

NamedTensor find_tensor(const SafetensorsHeader& header, std::string_view names) {
  for (std::size_t begin = 0; begin <= names.size();) {
    const std::size_t end = std::min(names.find('|', begin), names.size());
    const std::string_view name = names.substr(begin, end - begin);
    const auto found = std::ranges::find(header.tensors, name, &SafetensorsEntry::name);
    if (found != header.tensors.end()) return {found->name, usable_tensor(header, *found)};
    begin = end + 1;
  }
  throw InputError(
      fmt::format("has no tensor {}; it has {}", in_quotes(names), list_names(header)));
}

std::string format_safetensors_header(const std::vector<SafetensorsOutput>& tensors) {
  auto json = nlohmann::ordered_json::object();
  std::uint64_t begin = 0;
  for (const auto& [name, dtype, shape] : tensors) {
    const auto* element = std::ranges::find(elements, std::optional(dtype), &Element::dtype);
    std::uint64_t bytes = element->bytes;
    for (const std::int64_t extent : shape) bytes *= static_cast<std::uint64_t>(extent);
    json[name] = {
        {"dtype", element->name}, {"shape", shape}, {"data_offsets", {begin, begin + bytes}}};
    begin += bytes;
  }
  std::string text = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  constexpr std::size_t alignment = 8;
  text.append((alignment - text.size() % alignment) % alignment, ' ');
  std::string header;
  for (int i = 0; i < 8; ++i) header += static_cast<char>(text.size() >> (8 * i) & 0xff);
  return header + text;
}

}  // namespace stream_cqsa
