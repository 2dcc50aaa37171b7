#include "mpi/held_groups.hpp"

#include <algorithm>

namespace stream_cqsa {

std::int64_t subproblems_of_order(const Plan& plan) {
  return computes_by_groups(plan) ? plan.division.quorum_count() : std::int64_t{1};
}

HeldGroups::HeldGroups(const Plan& plan, const Assembler& assembler, const AskForPlan& ask,
                       std::size_t workers, bool in_place, double begin)
    : plan_(plan),
      assembler_(assembler),
      ask_(ask),
      in_place_(in_place),
      before_(assembler.so_far()),
      workers_(workers),
      begin_(begin),
      last_prepared_(begin_) {
  hold_after(plan.groups_done);
}

void HeldGroups::hold_after(std::int64_t group) {
  const auto groups = static_cast<std::int64_t>(plan_.groups.size());
  const bool one = computes_by_groups(plan_) || plan_.order == ScheduleOrder::groups_outer;
  first_ = one ? group + 1 : (group / groups + 1) * groups;
  if (!ask_) first_ = group_total(plan_);
}

std::int64_t HeldGroups::first_id() const {
  if (computes_by_groups(plan_)) return first_;
  const auto groups = static_cast<std::int64_t>(plan_.groups.size());
  const std::int64_t before =
      plan_.order == ScheduleOrder::groups_outer ? first_ : first_ / groups * groups;
  return before * plan_.division.quorum_count();
}

std::optional<PlannedAgain> HeldGroups::ask(const Failures& failures) {
  RunSoFar run = assembler_.so_far().since(before_);
  run.in_place = in_place_;
  run.lacking = assembler_.lacking_from(first_);
  for (std::size_t worker = 0; worker < workers_.size(); ++worker) {
    if (!failures[worker].empty()) {
      workers_[worker].reset();
    } else if (!workers_[worker]) {
      workers_[worker].emplace();  // nothing is known of it yet
    }
  }
  auto again = ask_(run, workers_, first_, switch_seconds());
  if (!again) let_go();
  return again;
}

// All ranks prepare as they did for this plan; before that they wait for who ends last.
double HeldGroups::switch_seconds() const {
  double last = 0;
  for (const auto& worker : workers_) {
    if (!worker || worker->subproblems == 0) continue;
    const StageTotals& compute = worker->totals[static_cast<std::size_t>(Stage::compute)];
    last = std::max(last, compute.busy_seconds / static_cast<double>(worker->subproblems));
  }
  return last_prepared_ - begin_ + last * static_cast<double>(subproblems_of_order(plan_));
}

}  // namespace stream_cqsa
