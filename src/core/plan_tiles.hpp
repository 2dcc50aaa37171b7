// The choice of a grid of tiles.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/plan_sizes.hpp"

namespace stream_cqsa {

/// Of a grid: far more than are worth launching, but not so many that what is kept of each would
/// count.
inline constexpr std::int64_t most_tiles = 1 << 20;

/// The grids that are looked at: the request's, or some hundreds from a single tile to single
/// tokens, of at most `most_tiles`.
std::vector<Grid> tile_grids(const PlanRequest& request);

/// The tiles that move the fewest bytes, by cost_of() in plan_tiles.cpp, of these numbers of head groups and, near
/// the best grid, of more grids than tile_grids(). Those come first that leave room on the device
/// to copy one tile in while another computes; of these, those with at least `least` subproblems,
/// or whole head groups for each worker. None where no grid's smallest arenas fit the budgets.
std::optional<Cut> choose_tiles(const PlanRequest& request,
                                std::span<const std::int64_t> group_counts, std::int64_t least);

}  // namespace stream_cqsa
