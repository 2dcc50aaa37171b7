// Which rank has what of its host.
#pragma once

#include <nlohmann/json.hpp>
#include <vector>

#include "app/arguments.hpp"

namespace stream_cqsa {

/// What a rank says of itself before anything else.
nlohmann::json introduction(const ResourceOptions& resources, bool input_through_master);

/// Gives every rank, of which these are the introductions, its share of its host: on each, the
/// first worker gets the first device that it sees, the second the first one left, and so on. A
/// text, instead of a list by rank, says why there is none.
nlohmann::json seats_for(const std::vector<nlohmann::json>& ranks, int mergers);

}  // namespace stream_cqsa
