// Half-open ranges of tokens, heads or rows.
#pragma once

#include <algorithm>
#include <cstdint>

namespace stream_cqsa {

/// The integers begin <= x < end.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  constexpr std::int64_t size() const { return end - begin; }
  constexpr bool empty() const { return end <= begin; }
  constexpr bool contains(std::int64_t x) const { return begin <= x && x < end; }
  friend constexpr bool operator==(const Range&, const Range&) = default;
};

/// Rounds `value` up to a multiple of `step` (step > 0).
constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

/// Part `index` of `parts` of [0, length), with boundaries on multiples of `tile`.
/// Parts differ by at most one tile; only the last non-empty one may be ragged; parts are empty
/// where there are fewer tiles than parts.
///
/// Example: length 1000, tile 128 (8 tiles), 3 parts: [0, 256) [256, 640) [640, 1000).
constexpr Range split(std::int64_t length, std::int64_t tile, std::int64_t parts,
                      std::int64_t index) {
  const std::int64_t tiles = ceil_div(length, tile);
  // tiles * (index + 1) stays below 2^63: tiles < 2^48 and parts < 2^15.
  const std::int64_t first = tiles * index / parts;
  const std::int64_t last = tiles * (index + 1) / parts;
  return {std::min(first * tile, length), std::min(last * tile, length)};
}

}  // namespace stream_cqsa
