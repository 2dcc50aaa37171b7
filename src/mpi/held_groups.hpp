// What of a plan's work is held back until it is known by which plan it is done.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "engine/assembler.hpp"
#include "mpi/roster.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/tuning.hpp"

namespace stream_cqsa {

/// Asks for a plan for the head groups from `from` on; none: the run goes on as before.
using AskForPlan = std::function<std::optional<PlannedAgain>(
    const RunSoFar& run, const WorkersSoFar& workers, std::int64_t from, double switch_seconds)>;

/// The subproblems that one worker is given as one: a whole head group's, or one.
std::int64_t subproblems_of_order(const Plan& plan);

/// The head groups that the master holds back: those after the one that is computed or, where all
/// of a batch entry are open at once, after that batch entry. None where nobody can be asked.
class HeldGroups {
 public:
  /// `assembler` has what earlier plans have computed. With accumulators `in_place` another plan
  /// cannot have them elsewhere. This rank began to prepare at `begin`, see now_seconds(). What is
  /// given must outlive this.
  HeldGroups(const Plan& plan, const Assembler& assembler, const AskForPlan& ask,
             std::size_t workers, bool in_place, double begin);

  /// The first of them; group_total() where there is none.
  std::int64_t first() const { return first_; }
  /// Of what the dispatcher hands out, that which comes first of them.
  std::int64_t first_id() const;

  /// One of the other ranks has prepared, at this time.
  void has_prepared(double time) { last_prepared_ = time; }
  /// What a worker has done by this plan.
  void has_computed(int worker, const RunSoFar& so_far) {
    workers_[static_cast<std::size_t>(worker)] = so_far;
  }

  /// All before them has been handed out: the plan that takes them or, if it is still this one,
  /// none, and then fewer are held.
  std::optional<PlannedAgain> ask(const Failures& failures);
  /// The same without asking.
  void let_go() { hold_after(first_); }

 private:
  void hold_after(std::int64_t group);
  double switch_seconds() const;

  const Plan& plan_;
  const Assembler& assembler_;
  const AskForPlan& ask_;
  const bool in_place_;
  const RunSoFar before_;  ///< this rank's, by the plans before
  WorkersSoFar workers_;   ///< by this plan
  std::int64_t first_ = 0;
  const double begin_;
  double last_prepared_;  ///< when the last of the others had
};

}  // namespace stream_cqsa
