// The options that choose a division.
#pragma once

#include <optional>

#include "app/arguments.hpp"
#include "stream_cqsa/divide.hpp"

namespace stream_cqsa {

/// --division, cqs where that is left open. Throws InputError for an unknown one.
Scheme division_option(const ResourceOptions& resources);

/// --division auto: what is predicted to be faster.
bool leaves_division_open(const ResourceOptions& resources);

/// --grid, where it is given. Throws InputError where it is no grid.
std::optional<Grid> grid_option(const ResourceOptions& resources);

}  // namespace stream_cqsa
