// The plans that choose_plan() looks at, before they are made.
#pragma once

#include <vector>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/costs.hpp"

namespace stream_cqsa {

struct Candidate {
  Cut cut;
  ScheduleForm form;
  /// Seconds by the totals of each stage, and what waits at either end: about what predict() says.
  double estimate = 0;
  /// Among those with as many head groups and the same form, by estimate.
  std::int64_t rank = 0;
};

/// Those of PlanRequest::scheme that fit the budgets, by rank and estimate.
std::vector<Candidate> candidates_of(const PlanRequest& request, const Costs& costs,
                                     InputKind inputs);

/// The request of which make_plan() makes this candidate.
PlanRequest pinned(const PlanRequest& request, const Candidate& candidate);

}  // namespace stream_cqsa
