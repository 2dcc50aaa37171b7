#include "app/division_options.hpp"

#include <fmt/format.h>

#include <charconv>
#include <string>

#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {

Scheme division_option(const ResourceOptions& resources) {
  if (resources.division.empty() || leaves_division_open(resources)) return Scheme::cqs;
  const auto scheme = parse_scheme(resources.division);
  if (!scheme) {
    throw InputError(
        fmt::format("--division {}: unknown; use auto, cqs or tiles", resources.division));
  }
  return *scheme;
}

bool leaves_division_open(const ResourceOptions& resources) { return resources.division == "auto"; }

bool prefers_tiles(const ResourceOptions& resources, const Problem& problem) {
  constexpr std::int64_t few = 8;
  const bool open = resources.division.empty() && !resources.chunks && resources.grid.empty();
  return open && few * problem.query_length <= problem.key_length;
}

std::optional<Grid> grid_option(const ResourceOptions& resources) {
  const std::string& text = resources.grid;
  if (text.empty()) return std::nullopt;
  Grid grid;
  const char* end = text.data() + text.size();
  const auto rows = std::from_chars(text.data(), end, grid.rows);
  const bool has_columns = rows.ec == std::errc() && rows.ptr < end && *rows.ptr == 'x';
  const auto columns = has_columns ? std::from_chars(rows.ptr + 1, end, grid.columns) : rows;
  const auto good = [](std::int64_t count) { return count >= 1 && count <= max_modulus; };
  if (!has_columns || columns.ec != std::errc() || columns.ptr != end || !good(grid.rows) ||
      !good(grid.columns)) {
    throw InputError(fmt::format(
        "--grid '{}': not rows and columns from 1 to {}; write ROWSxCOLUMNS such as 4x16", text,
        max_modulus));
  }
  return grid;
}

}  // namespace stream_cqsa
