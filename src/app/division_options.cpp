#include "app/division_options.hpp"

#include <fmt/format.h>

#include <charconv>
#include <string>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/difference_cover.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

std::optional<Plan> plan_if_possible(const PlanRequest& request) {
  try {
    return make_plan(request);
  } catch (const InputError&) {
    return std::nullopt;
  }
}

double bytes_moved(const Plan& plan) {
  const Traffic traffic = estimate_traffic(plan);
  return traffic.read + traffic.copied_in + traffic.copied_out + traffic.spilled;
}

}  // namespace

Scheme division_option(const ResourceOptions& resources) {
  if (resources.division.empty()) return Scheme::cqs;
  const auto scheme = parse_scheme(resources.division);
  if (!scheme) {
    throw InputError(fmt::format("--division {}: unknown; use cqs or tiles", resources.division));
  }
  return *scheme;
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

Plan plan_by_options(const PlanRequest& request, const ResourceOptions& resources) {
  constexpr std::int64_t few = 8;
  const bool open = resources.division.empty() && !request.chunks;
  if (!open || few * request.problem.query_length > request.problem.key_length)
    return make_plan(request);
  const auto cqs = plan_if_possible(request);
  if (cqs && cqs->division.chunk_count() == 1) return *cqs;
  PlanRequest by_rows = request;
  by_rows.scheme = Scheme::tiles;
  const auto tiles = plan_if_possible(by_rows);
  if (tiles && (!cqs || bytes_moved(*tiles) < bytes_moved(*cqs))) return *tiles;
  return cqs ? *cqs : make_plan(request);
}

}  // namespace stream_cqsa
