// The options that choose a division.
#pragma once

#include <optional>

#include "app/arguments.hpp"
#include "stream_cqsa/divide.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// --division. Throws InputError for an unknown one.
Scheme division_option(const ResourceOptions& resources);

/// --grid, where it is given. Throws InputError where it is no grid.
std::optional<Grid> grid_option(const ResourceOptions& resources);

/// make_plan() of a request whose division is that of the options. Where they leave it open and the
/// queries are few beside the keys (an eighth or less: rows of --queries), tiles if these move
/// fewer bytes: cyclic quorum sets cut queries and keys alike, and so load every key k times where
/// a row of tiles that holds all queries has the keys stream past once.
Plan plan_by_options(const PlanRequest& request, const ResourceOptions& resources);

}  // namespace stream_cqsa
