#include "stream_cqsa/bytes.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <optional>

#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::array<std::string_view, 5> binary_units = {"B", "KiB", "MiB", "GiB", "TiB"};

bool same_letters(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](unsigned char x, unsigned char y) {
    return std::tolower(x) == std::tolower(y);
  });
}

std::optional<std::int64_t> unit_size(std::string_view unit) {
  constexpr std::array<std::string_view, 5> decimal_units = {"", "kB", "MB", "GB", "TB"};
  std::int64_t binary = 1;
  std::int64_t decimal = 1;
  for (std::size_t i = 0; i < binary_units.size(); ++i, binary *= 1024, decimal *= 1000) {
    if (same_letters(unit, binary_units[i])) return binary;
    if (same_letters(unit, decimal_units[i])) return decimal;
  }
  return std::nullopt;
}

// The value of "digits[.digits]" in units of `unit` bytes, exactly, rounded down.
std::optional<std::int64_t> scaled(std::string_view number, std::int64_t unit) {
  const std::size_t point = number.find('.');
  const std::string_view whole = number.substr(0, point);
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(whole.data(), whole.data() + whole.size(), value);
  if (error != std::errc() || end != whole.data() + whole.size()) return std::nullopt;
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(value, unit, &bytes)) return std::nullopt;
  if (point == std::string_view::npos) return bytes;

  const std::string_view digits = number.substr(point + 1);
  // 10^6 times the largest unit, 2^40, stays below 2^63.
  if (digits.empty() || digits.size() > 6) return std::nullopt;
  std::int64_t fraction = 0;
  std::int64_t denominator = 1;
  for (const char digit : digits) {
    fraction = fraction * 10 + (digit - '0');
    denominator *= 10;
  }
  if (__builtin_add_overflow(bytes, fraction * unit / denominator, &bytes)) return std::nullopt;
  return bytes;
}

}  // namespace

std::int64_t parse_bytes(std::string_view text, std::string_view what) {
  const std::size_t number_end = std::min(text.find_first_not_of("0123456789."), text.size());
  const std::string_view number = text.substr(0, number_end);
  std::string_view unit = text.substr(number_end);
  if (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  const auto size = unit_size(unit);
  std::optional<std::int64_t> bytes;
  if (size && std::count(number.begin(), number.end(), '.') <= 1) bytes = scaled(number, *size);
  if (!bytes) {
    throw InputError(
        fmt::format("{}: '{}' is not a number of bytes; write for example 4096, 512MiB, 1.5GB "
                    "(at most 6 decimals, below 2^63 bytes)",
                    what, text));
  }
  return *bytes;
}

std::string format_bytes(std::int64_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < binary_units.size()) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.2f} {}", value, binary_units[unit]);
}

}  // namespace stream_cqsa
