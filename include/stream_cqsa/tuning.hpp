// Planning the rest of a run again, by the rates that it has shown.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "stream_cqsa/costs.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// A rate that is further from the one planned by than this share of the lower of both is another.
inline constexpr double rate_tolerance = 0.20;

/// What a rank has done of a run by a plan so far, and on how many threads.
struct RunSoFar {
  std::array<StageTotals, stage_count> totals{};
  std::uint64_t scores = 0;      ///< of finished subproblems, see Telemetry::scores_done()
  std::int64_t subproblems = 0;  ///< finished
  int read_threads = 1;
  int merge_threads = 1;
  int write_threads = 1;
  /// Rows are written where they belong in the outputs, not put together from several head groups
  /// at a batch entry's end.
  bool in_place = false;
  bool in_parts = false;  ///< subproblems may be computed in parts, see computes_in_parts()
  double lacking = 1;  ///< share of the scores of what is left that an earlier run has not merged

  /// What was done since then; all else stays.
  RunSoFar since(const RunSoFar& then) const;
};

/// Whether the device's slots may not take a subproblem whole: then it is launched several times.
bool computes_in_parts(const Plan& plan);

/// Of a stage: bytes per second, of Stage::compute floating-point operations.
struct ChangedRate {
  Stage stage = Stage::read;
  double planned = 0;
  double measured = 0;
};

struct MeasuredCosts {
  Costs costs;
  std::vector<ChangedRate> changed;
};

/// `planned` with the rates that a rank of a run of `plan`, which is about to begin head group
/// `from`, has shown to be others: of reading, copying in and out, computing, merging (where the
/// plan has the accumulators) and writing. The rate of a stage on several threads, which may wait
/// for one file or memory, lies between that of one of them while it worked and that times the
/// threads; it is another where both are above or both below the planned one, and then the nearer
/// of them. A stage that has not been busy for `least_seconds` (of each of its threads) keeps its
/// rate, as does one which does another thing in the plan than in the costs: writing where rows
/// have been put together from several head groups, or will not be, and computing where subproblems
/// may be computed in parts. Of an accumulator file no rate is measured.
MeasuredCosts measured_costs(const Plan& plan, const Costs& planned, InputKind inputs,
                             const RunSoFar& run, std::int64_t from, double least_seconds);

/// Whether a plan may be taken.
using PlanFilter = std::function<bool(const Plan&)>;

/// Another plan for what is left of a run.
struct PlannedAgain {
  Plan plan;                         ///< its groups_done are finished by the plan before
  std::vector<ChangedRate> changed;  ///< rates, by which it is planned
  double seconds = 0;                ///< predicted of the rest
  double seconds_before = 0;         ///< the same, had the run gone on as before
};

/// Of the plans with the same division and head groups, and so the same output bits, one that is
/// predicted to compute the head groups from `from` on as fast as any, by prediction_tolerance, if
/// it is faster by more than that than going on with `plan` and the `switch_seconds` that changing
/// over takes; groups_outer before groups_inner where both are. They differ in the order of head
/// groups and quorums and in whether accumulators are on the device, are never of a form in
/// `abandoned`, and `may_take` (none: all that fit) allows them. How far ahead files are read is no
/// choice: always as far as the host cache and the order known by then allow.
std::optional<PlannedAgain> plan_again(const Plan& plan, const SharedCosts& costs,
                                       const std::vector<ChangedRate>& changed, InputKind inputs,
                                       std::int64_t from, double switch_seconds,
                                       const std::vector<ScheduleForm>& abandoned = {},
                                       const PlanFilter& may_take = nullptr);
/// The same where all ranks are alike.
std::optional<PlannedAgain> plan_again(const Plan& plan, const MeasuredCosts& measured,
                                       InputKind inputs, std::int64_t from, double switch_seconds,
                                       const std::vector<ScheduleForm>& abandoned = {},
                                       const PlanFilter& may_take = nullptr);

/// "read at 0.4 GB/s, not 8: the remaining 6 of 8 head groups are computed all together, quorum
/// by quorum, with accumulators in memory, predicted 12.1 s instead of 40.3 s"
std::string describe(const PlannedAgain& again);

/// What each of several workers has done; none of one that takes no part any more.
using WorkersSoFar = std::vector<std::optional<RunSoFar>>;

/// What tuning needs to know.
struct Tuning {
  Costs costs;  ///< that the plan was chosen by, of the rank that merges
  InputKind inputs = InputKind::files;
  double least_seconds = 0.2;  ///< see measured_costs()
  /// Whether disks have room for a plan that keeps more on them than the one before; or none: they
  /// have not.
  PlanFilter has_room = nullptr;
  std::vector<Costs> workers = {};  ///< of other ranks that compute, if there are any
  /// Whether the workers that take part, and the ranks that merge, have memory for a plan; none:
  /// they have.
  std::function<bool(const Plan&, const WorkersSoFar&)> has_memory = nullptr;
};

/// Decides, whenever a run could change over to another plan, whether it should. It never goes back
/// to a form that it has abandoned, and only looks for another plan when a rate is not the one last
/// known: a rate that was measured holds until it is measured again.
class Tuner {
 public:
  explicit Tuner(Tuning tuning)
      : tuning_(std::move(tuning)),
        known_{tuning_.costs, tuning_.workers},
        changed_(1 + tuning_.workers.size()) {}

  /// Asked when all head groups before `from` have been handed out, and nothing of the others.
  /// `run` is that of this rank, whose merging and writing stand for those of all that merge;
  /// `workers` are Tuning::workers, each with its own rates. Of the rates that changed, that of the
  /// rank where a stage is furthest from planned is told.
  std::optional<PlannedAgain> ask(const Plan& plan, const RunSoFar& run, std::int64_t from,
                                  double switch_seconds, const PlanFilter& may_take = nullptr,
                                  const WorkersSoFar& workers = {});

 private:
  const Tuning tuning_;
  SharedCosts known_;                              ///< those planned by, or measured since
  std::vector<std::vector<ChangedRate>> changed_;  ///< of this rank, then of each worker
  std::vector<ScheduleForm> abandoned_;
};

}  // namespace stream_cqsa
