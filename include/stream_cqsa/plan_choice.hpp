// The plan that is predicted to take the least time, of those that a request leaves open.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "stream_cqsa/costs.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// Plans whose predicted times are no further apart than this share are taken to be as fast:
/// predictions tell no more.
inline constexpr double prediction_tolerance = 0.10;

/// Which divisions are looked at.
enum class Divisions {
  requested,  ///< those of PlanRequest::scheme
  any,        ///< cyclic quorum sets and tiles
};

/// A plan that was looked at, with its division, head groups and accumulators named.
struct Alternative {
  PlanRequest request;  ///< of which make_plan() makes it: nothing is left open
  AccumulatorPlacement placement = AccumulatorPlacement::memory;
  ScheduleOrder order = ScheduleOrder::groups_outer;
  std::int64_t subproblems = 0;
  Prediction prediction;
  bool is_default = false;  ///< what make_plan() makes of the request as it came
};

struct PlanChoice {
  Plan plan;
  Prediction prediction;
  bool is_default = true;           ///< the plan is what make_plan() makes of the request
  std::vector<Alternative> others;  ///< that were predicted too, the fastest first
};

/// Of the plans that `request` leaves open one that predict() says is as fast on its workers as
/// any, by prediction_tolerance: the default, make_plan(request), if it is one, and then with
/// `request` as its request, else the one with the fewest subproblems. That one's request has
/// chunks (or grid), heads per group, the accumulators' placement and perhaps the order set, so
/// that make_plan() makes it anywhere. With any division a plan of PlanRequest::scheme comes before
/// one of the other that is no faster.
///
/// Looked at are, on whole kernel tiles, difference covers that waste little, or grids; numbers of
/// head groups; accumulators on the device and not; of the default and the fastest of these also
/// the other order. So a larger budget is hardly predicted to take longer than a smaller one by
/// more than the tolerance, on one worker. Equal arguments give equal choices.
///
/// Throws InputError as make_plan() when nothing fits.
PlanChoice choose_plan(const PlanRequest& request, const Costs& costs, InputKind inputs,
                       Divisions divisions = Divisions::requested);

/// The smallest budgets that work for a request, each with the request's other one.
struct SmallestBudgets {
  std::int64_t device = 0;  ///< bytes
  std::int64_t host = 0;    ///< bytes
};
/// Throws InputError where make_plan() does.
SmallestBudgets smallest_budgets(const PlanRequest& request,
                                 Divisions divisions = Divisions::requested);

/// "c = 31, 2 key/value heads per group, accumulators on the device", for people.
std::string division_text(const Alternative& plan);
/// The same of a plan that was made.
std::string division_text(const Plan& plan);

/// `plan --json`: what write_json() writes of a plan, its prediction, at most `most_printed` of the
/// others, and the smallest budgets. read_plan() reads it as the plan alone.
void write_json(const PlanChoice& choice, const SmallestBudgets& smallest, bool subproblems,
                std::ostream& out);

/// Others that are worth printing.
inline constexpr std::size_t most_printed = 5;

}  // namespace stream_cqsa
