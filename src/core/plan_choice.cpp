#include "stream_cqsa/plan_choice.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "core/counted.hpp"
#include "core/merge_shares.hpp"
#include "core/place_text.hpp"
#include "core/plan_candidates.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// What predictions of one scheme's plans may cost, in chunk pairs that are examined and subproblems
// that are followed, some 10 million a second: about a hundredth of what a short run takes, and a
// quarter of a second for a long one. No plan but the default takes more than a part of it.
constexpr double effort_per_second = 1 << 17;
constexpr double least_effort = 1 << 19;
constexpr double most_effort = 3 << 20;
constexpr double largest_part = 1.0 / 8;
constexpr std::size_t most_predicted = 64;
// Candidates whose estimate is above this part of the best prediction are not followed: estimates
// may be a little above what is then predicted.
constexpr double certain_share = 0.9;
constexpr double promising_share = 0.9;

double seconds_of(const Alternative& plan) { return plan.prediction.seconds; }

Candidate candidate_of(const Plan& plan) { return {cut_of(plan), form_of(plan), 0, 0}; }

template <typename Make>
bool fits(const Make& make) {
  try {
    make();
    return true;
  } catch (const InputError&) {
    return false;
  }
}

bool has_room(const Plan& plan, const WorkerMeans& worker) {
  return fits([&] { worker_plan(plan, worker.device, worker.device_budget, worker.host_budget); });
}

// For having room.
bool means_the_same(const WorkerMeans& one, const WorkerMeans& other) {
  return one.device == other.device && one.device_budget == other.device_budget &&
         one.host_budget == other.host_budget;
}

bool mergers_have_room(const Plan& plan, const PlannedRanks& ranks) {
  const PlanRequest& request = plan.request;
  const MergeShares shares(plan, static_cast<int>(request.mergers));
  return fits([&] {
    for (int rank = 0; rank < shares.ranks(); ++rank) {
      const bool own = rank > 0 && !ranks.merger_budgets.empty();
      merger_plan(
          plan, request.workers, shares.chunks(rank),
          own ? ranks.merger_budgets.at(static_cast<std::size_t>(rank) - 1) : request.host_budget,
          rank == 0 && ranks.serves);
    }
  });
}

// Costs of as many workers that are alike and together as fast as these, for estimates.
Costs mean_costs(const PlannedRanks& ranks, const Problem& problem, InputKind inputs) {
  if (ranks.workers.empty()) return ranks.costs;
  Costs mean = ranks.costs;
  KernelCost kernel = kernel_cost(mean, problem);
  const auto average = [&](const auto& of) {
    double sum = 0;
    for (const WorkerMeans& worker : ranks.workers) sum += of(worker.costs);
    return sum / static_cast<double>(ranks.workers.size());
  };
  for (const auto rate : {&Costs::copy_in, &Costs::copy_out, &Costs::device_merge})
    mean.*rate = average([&](const Costs& costs) { return costs.*rate; });
  mean.*read_rate_member(mean, inputs) =
      average([&](const Costs& costs) { return read_rate(costs, inputs); });
  for (const auto rate : {&KernelCost::flop_per_second, &KernelCost::burst_flop_per_second,
                          &KernelCost::launch_seconds})
    kernel.*rate = average([&](const Costs& costs) { return kernel_cost(costs, problem).*rate; });
  mean.kernels = {kernel};
  return mean;
}

// The plans of one scheme that were predicted.
class Contest {
 public:
  /// Throws InputError where nothing fits.
  Contest(const PlanRequest& request, const PlannedRanks& ranks, InputKind inputs)
      : request_(request), ranks_(ranks), inputs_(inputs), default_plan_(make_plan(request)) {
    const auto costs = costs_of(default_plan_, ranks);
    enter(default_plan_, pinned(request, candidate_of(default_plan_)),
          costs.value_or(SharedCosts{ranks.costs, {}}));
    plans_.front().is_default = true;
    if (!costs) best_ = std::numeric_limits<double>::infinity();
    const Costs mean = mean_costs(ranks, request.problem, inputs);
    for (const Candidate& candidate : candidates_of(request, mean, inputs)) {
      if (is_over()) break;
      if (!is_hopeless(candidate)) consider(pinned(request, candidate), effort_of(candidate.cut));
    }
    // Copies, as what they consider is added to the plans.
    for (const Alternative& plan : {Alternative(plans_.front()), Alternative(fastest())})
      consider_other_order(plan);
    consider_on_host(Alternative(plans_.front()));
    fits_ = costs || plans_.size() > 1;
    if (plans_.size() > 1 && !costs) plans_.erase(plans_.begin());
  }

  /// Whether there is a plan for which the ranks have room. Else there is the default alone.
  bool fits() const { return fits_; }

  /// The default first, if every rank has room for it, then in the order in which they were
  /// predicted.
  const std::vector<Alternative>& plans() const { return plans_; }

  const Alternative& fastest() const { return *std::ranges::min_element(plans_, {}, seconds_of); }
  /// The plan itself; the default once.
  Plan plan_of(const Alternative& plan) {
    return plan.is_default ? std::move(default_plan_) : make_plan(plan.request);
  }

 private:
  using Name =
      std::tuple<std::int64_t, std::int64_t, std::int64_t, AccumulatorPlacement, ScheduleOrder>;

  // By what predict() examines.
  static double effort_of(const Cut& cut) {
    constexpr double most_examined = 1 << 17;
    const auto quorums = static_cast<double>(cut.quorums);
    return (cut.grid ? quorums : std::min(quorums * quorums, most_examined)) +
           static_cast<double>(cut.subproblems);
  }

  static Name name_of(const Plan& plan) {
    const Division& division = plan.division;
    const bool tiles = division.scheme() == Scheme::tiles;
    return {tiles ? division.grid().rows : division.chunk_count(),
            tiles ? division.grid().columns : 0, static_cast<std::int64_t>(plan.groups.size()),
            plan.placement, plan.order};
  }

  double worthwhile_effort() const {
    return std::clamp(effort_per_second * best_, least_effort, most_effort);
  }

  bool is_over() const { return effort_ > worthwhile_effort() || plans_.size() >= most_predicted; }

  // Worse than the best, or too much to look at: most of what is left only for what promises much.
  bool is_hopeless(const Candidate& candidate) const {
    const bool enough = plans_.size() > most_printed;
    if (enough && certain_share * candidate.estimate >= best_) return true;
    const double effort = effort_of(candidate.cut);
    const bool promising = candidate.estimate < promising_share * best_;
    return effort >
           (promising ? worthwhile_effort() - effort_ : largest_part * worthwhile_effort());
  }

  void consider(const PlanRequest& request, double effort) {
    try {
      const Plan plan = make_plan(request);
      if (std::ranges::find(names_, name_of(plan)) != names_.end()) return;
      effort_ += effort;
      if (const auto costs = costs_of(plan, ranks_)) enter(plan, request, *costs);
    } catch (const InputError&) {  // it does not fit
    }
  }

  // With head groups in the other loop.
  void consider_other_order(const Alternative& plan) {
    const bool one_group = *plan.request.heads_per_group >= request_.problem.kv_heads;
    if (request_.order || plan.request.grid || one_group) return;
    const bool outer = plan.order == ScheduleOrder::groups_outer;
    PlanRequest request = plan.request;
    request.order = outer ? ScheduleOrder::groups_inner : ScheduleOrder::groups_outer;
    request.host_accumulators = outer || request_.host_accumulators;
    consider(request, 0);
  }

  void consider_on_host(const Alternative& plan) {
    if (plan.placement != AccumulatorPlacement::device) return;
    PlanRequest request = plan.request;
    request.host_accumulators = true;
    consider(request, 0);
  }

  void enter(const Plan& plan, const PlanRequest& request, const SharedCosts& costs) {
    const Prediction prediction = predict(plan, costs, inputs_);
    names_.push_back(name_of(plan));
    plans_.push_back(
        {request, plan.placement, plan.order, plan.subproblem_count(), prediction, false});
    best_ = std::min(best_, prediction.seconds);
  }

  const PlanRequest& request_;
  const PlannedRanks& ranks_;
  const InputKind inputs_;
  Plan default_plan_;
  std::vector<Name> names_;
  std::vector<Alternative> plans_;
  double best_ = std::numeric_limits<double>::infinity();
  double effort_ = 0;
  bool fits_ = false;
};

// Of the first scheme that has a plan as fast as any the default, if it is one. Else the fastest
// or, of those that are hardly slower, the one with the fewest subproblems: what each costs beside
// its launch is not predicted.
std::pair<Contest*, const Alternative*> pick(std::vector<Contest>& contests) {
  constexpr double hardly = 1.01;
  double best = std::numeric_limits<double>::infinity();
  for (const Contest& contest : contests) {
    if (contest.fits()) best = std::min(best, seconds_of(contest.fastest()));
  }
  for (Contest& contest : contests) {
    if (!contest.fits()) continue;
    const Alternative* picked = &contest.fastest();
    const double fastest = seconds_of(*picked);
    if (!(fastest <= best * (1 + prediction_tolerance))) continue;
    for (const Alternative& plan : contest.plans()) {
      if (plan.is_default && seconds_of(plan) <= best * (1 + prediction_tolerance))
        return {&contest, &plan};
      if (seconds_of(plan) <= hardly * fastest && plan.subproblems < picked->subproblems)
        picked = &plan;
    }
    return {&contest, picked};
  }
  return {&contests.front(), &contests.front().plans().front()};
}

// The requests for cyclic quorum sets and tiles, of those that are asked for, the preferred first.
std::vector<PlanRequest> requests_of(const PlanRequest& request, Divisions divisions) {
  if (divisions == Divisions::requested) return {request};
  PlanRequest other = request;
  other.scheme = request.scheme == Scheme::cqs ? Scheme::tiles : Scheme::cqs;
  const Scheme pinned = request.grid ? Scheme::tiles : Scheme::cqs;
  if (request.chunks || request.grid) return {request.scheme == pinned ? request : other};
  return {request, other};
}

// Calls visit(request) for each; where all throw an InputError, throws that of tiles, if they are
// among them: these fit the smallest budgets.
template <typename Visit>
void for_each_that_fits(const std::vector<PlanRequest>& requests, const Visit& visit) {
  std::optional<InputError> thrown;
  std::size_t failed = 0;
  for (const PlanRequest& request : requests) {
    try {
      visit(request);
    } catch (const InputError& error) {
      if (!thrown || request.scheme == Scheme::tiles) thrown = error;
      ++failed;
    }
  }
  if (thrown && failed == requests.size()) throw *thrown;
}

std::string text_of(const PlanRequest& request, AccumulatorPlacement placement,
                    ScheduleOrder order) {
  const std::string division =
      request.grid ? fmt::format("{}x{} tiles", request.grid->rows, request.grid->columns)
                   : fmt::format("c = {}", request.chunks.value_or(1));
  return fmt::format("{}, {} per group{}, accumulators {}", division,
                     counted(request.heads_per_group.value_or(1), "key/value head"),
                     order == ScheduleOrder::groups_inner ? " in the inner loop" : "",
                     place_text(placement));
}

}  // namespace

std::optional<SharedCosts> costs_of(const Plan& plan, const PlannedRanks& ranks) {
  const PlanRequest& request = plan.request;
  SharedCosts costs{ranks.costs, {}};
  if (ranks.workers.empty()) {
    if (request.workers == 1) return costs;
    if (!has_room(plan, {request.device, request.device_budget, request.host_budget, {}}))
      return std::nullopt;
  }
  const WorkerMeans* alike = nullptr;  // most are as the one before
  bool room = false;
  for (const WorkerMeans& worker : ranks.workers) {
    if (!alike || !means_the_same(worker, *alike)) room = has_room(plan, worker);
    if (room) costs.workers.push_back(worker.costs);
    alike = &worker;
  }
  if (costs.workers.empty() && !ranks.workers.empty()) return std::nullopt;
  if (!mergers_have_room(plan, ranks)) return std::nullopt;
  return costs;
}

PlanChoice choose_plan(const PlanRequest& request, const Costs& costs, InputKind inputs,
                       Divisions divisions) {
  return choose_plan(request, PlannedRanks{costs, {}, {}}, inputs, divisions);
}

PlanChoice choose_plan(const PlanRequest& request, const PlannedRanks& ranks, InputKind inputs,
                       Divisions divisions) {
  const std::vector<PlanRequest> requests = requests_of(request, divisions);
  std::vector<Contest> contests;
  for_each_that_fits(requests,
                     [&](const PlanRequest& each) { contests.emplace_back(each, ranks, inputs); });
  const auto [contest, winner] = pick(contests);
  const bool is_default = winner->is_default && contest == &contests.front();
  PlanChoice choice{contest->plan_of(*winner), winner->prediction, is_default, {}};
  for (const Contest& each : contests) {
    for (const Alternative& plan : each.plans()) {
      if (&plan != winner) choice.others.push_back(plan);
    }
  }
  std::ranges::stable_sort(choice.others, {}, seconds_of);
  return choice;
}

SmallestBudgets smallest_budgets(const PlanRequest& request, Divisions divisions) {
  constexpr std::int64_t none = std::numeric_limits<std::int64_t>::max();
  SmallestBudgets smallest{none, none};
  for_each_that_fits(requests_of(request, divisions), [&](const PlanRequest& each) {
    smallest.device = std::min(smallest.device, smallest_device_budget(each));
    smallest.host = std::min(smallest.host, smallest_host_budget(each));
  });
  return smallest;
}

std::string division_text(const Alternative& plan) {
  return text_of(plan.request, plan.placement, plan.order);
}

std::string division_text(const Plan& plan) {
  return text_of(pinned(plan.request, candidate_of(plan)), plan.placement, plan.order);
}

}  // namespace stream_cqsa
