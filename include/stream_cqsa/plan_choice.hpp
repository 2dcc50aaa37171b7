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
inline constexpr double prediction_tolerance = 0.05;

/// Which divisions are looked at.
enum class Divisions {
  requested,  ///< those of PlanRequest::scheme
  any,        ///< cyclic quorum sets and tiles
};

/// A rank that computes: what it may use, and what work costs there.
struct WorkerMeans {
  DeviceTraits device;
  std::int64_t device_budget = 0;  ///< bytes
  std::int64_t host_budget = 0;    ///< bytes
  Costs costs;
};

/// The ranks that a run is planned for.
struct PlannedRanks {
  Costs costs;                               ///< of the rank that merges and writes
  std::vector<WorkerMeans> workers;          ///< none: those of the request, all alike
  std::vector<std::int64_t> merger_budgets;  ///< host bytes of each merger; none: the request's
  bool serves = true;                        ///< rank 0 may have to send the inputs
};

/// Costs of the ranks of a plan. Workers that have no room for their part are left out, as a run
/// does without them; none where no worker is left, or a rank has no room for its part of the
/// merging.
std::optional<SharedCosts> costs_of(const Plan& plan, const PlannedRanks& ranks);

/// A plan that was looked at, with its division, head groups and accumulators named.
struct Alternative {
  PlanRequest request;  ///< of which make_plan() makes it: nothing is left open
  AccumulatorPlacement placement = AccumulatorPlacement::memory;
  ScheduleOrder order = ScheduleOrder::groups_outer;
  std::int64_t subproblems = 0;
  Prediction prediction;
  bool is_default = false;  ///< what make_plan() makes of the request as it came
};

/// What so many workers are predicted to take with the plan that is chosen for them.
struct ForWorkers {
  std::int64_t workers = 1;
  Prediction prediction;
};

struct PlanChoice {
  Plan plan;
  Prediction prediction;
  bool is_default = true;                    ///< the plan is what make_plan() makes of the request
  std::vector<Alternative> others;           ///< that were predicted too, the fastest first
  std::vector<ForWorkers> for_workers = {};  ///< for who asks, the fewest first
};

/// Of the plans that `request` leaves open one that predict() says is as fast on its workers as
/// any: the default, make_plan(request), if it is one by prediction_tolerance, and then with
/// `request` as its request, else the fastest, or one of fewer subproblems within 1% of it. That
/// one's request has chunks (or grid), heads per group, the accumulators' placement and the order
/// set, so that make_plan() makes it anywhere. With any division a plan of PlanRequest::scheme
/// comes before one of the other that is no faster, by prediction_tolerance.
///
/// Looked at are, on whole kernel tiles, difference covers that waste little, or grids; quorums
/// that the device holds, and those that it computes in parts; numbers of head groups; accumulators
/// on the device and not; both orders. So a larger budget is hardly predicted to take longer than a
/// smaller one by more than the tolerance, on one worker. Equal arguments give equal choices.
///
/// A plan for which the ranks have no room, see costs_of(), is taken only where there is no other,
/// and then it is the default.
///
/// Throws InputError as make_plan() when nothing fits, with any division that of tiles.
PlanChoice choose_plan(const PlanRequest& request, const PlannedRanks& ranks, InputKind inputs,
                       Divisions divisions = Divisions::requested);
/// The same where all ranks are alike.
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

/// `plan --json`: what write_json() writes of a plan, its prediction, that for other numbers of
/// workers where it was asked for, at most `most_printed` of the others, and the smallest budgets.
/// read_plan() reads it as the plan alone.
void write_json(const PlanChoice& choice, const SmallestBudgets& smallest, bool subproblems,
                std::ostream& out);

/// Others that are worth printing.
inline constexpr std::size_t most_printed = 5;

}  // namespace stream_cqsa
