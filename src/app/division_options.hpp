// The options that choose a division.
#pragma once

#include <optional>

#include "app/arguments.hpp"
#include "stream_cqsa/divide.hpp"
#include "stream_cqsa/problem.hpp"

namespace stream_cqsa {

/// --division, cqs where that is left open. Throws InputError for an unknown one.
Scheme division_option(const ResourceOptions& resources);

/// --division auto: what is predicted to be faster.
bool leaves_division_open(const ResourceOptions& resources);

/// --grid, where it is given. Throws InputError where it is no grid.
std::optional<Grid> grid_option(const ResourceOptions& resources);

/// Whether the options leave the division open and queries are few beside the keys (an eighth or
/// less: rows of --queries). Then tiles are taken unless cyclic quorum sets are predicted to be
/// faster: these cut queries and keys alike, and so load every key k times where a row of tiles
/// that holds all queries has the keys stream past once.
bool prefers_tiles(const ResourceOptions& resources, const Problem& problem);

}  // namespace stream_cqsa
