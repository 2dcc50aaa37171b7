// The choice of c and head groups.
#pragma once

#include "core/plan_sizes.hpp"

namespace stream_cqsa {

/// The fewest subproblems whose preferred device arena fits the device budget, and whose smallest
/// host arena fits the host budget; ties to the smaller c. Besides these the cut with the smallest
/// minimum arena counts, however little overlap the budget leaves it: so every budget that works at
/// all works, and a larger device budget never gives more subproblems.
/// Throws InputError, naming the smallest budget that works, when nothing fits.
Cut choose_cut(const PlanRequest& request);

}  // namespace stream_cqsa
