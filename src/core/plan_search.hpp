// The choice of c, or of tiles, and head groups.
#pragma once

#include <cstdint>
#include <vector>

#include "core/plan_sizes.hpp"

namespace stream_cqsa {

/// The fewest subproblems, ties to the smaller c, whose minimum device arena fits the device budget
/// and whose smallest host arena fits the host budget: so every budget that works at all works.
/// Where the preferred device arena of another cut fits too, the fewest of those are chosen
/// instead, if they are at most DeviceTraits::overlap_worth times as many and their kernel tile is
/// not below that of the fewest. A larger device budget may so give more subproblems than a smaller
/// one, never more than that times as many, and only where it brings the preferred arena.
/// Where no cut's minimum device arena fits, the fewest subproblems that can be computed in parts:
/// whose smallest_device_arena() does. That may be fewer than the fewest of whole quorums.
/// Tiles: see choose_tiles(). Throws InputError, naming the smallest budget that works, when
/// nothing fits.
Cut choose_cut(const PlanRequest& request);

/// Every number of head groups that the request leaves open, ascending. Of those with the same
/// largest group only the smallest counts.
std::vector<std::int64_t> group_counts(const PlanRequest& request);

/// The run's floating-point operations.
double flop_of(const Problem& problem);

}  // namespace stream_cqsa
