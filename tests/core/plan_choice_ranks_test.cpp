// The plan that is chosen for ranks with costs and budgets of their own.
#include <algorithm>
#include <boost/test/unit_test.hpp>

#include "core/merge_shares.hpp"
#include "core/plan_choice_jobs.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// As many as the request has workers and mergers, with its budgets.
PlannedRanks ranks_like(const PlanRequest& request, const Costs& costs) {
  PlannedRanks ranks{costs, {}, {}};
  ranks.workers.assign(static_cast<std::size_t>(request.workers),
                       {request.device, request.device_budget, request.host_budget, costs});
  ranks.merger_budgets.assign(static_cast<std::size_t>(request.mergers), request.host_budget);
  return ranks;
}

// Whether rank 1, which merges, has room for what a run gives it.
bool merger_has_room(const Plan& plan, std::int64_t budget) {
  const MergeShares shares(plan, static_cast<int>(plan.request.mergers));
  try {
    merger_plan(plan, plan.request.workers, shares.chunks(1), budget);
    return true;
  } catch (const InputError&) {
    return false;
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(ranks_that_are_alike_need_not_be_listed) {
  int chosen = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 60; ++seed) {
    Random random(seed);
    PlanRequest request = random_job(random);
    request.workers = random.between(2, 5);
    const Costs costs = random_costs(random, request.device);
    const auto plain = try_choice(request, costs);
    if (!plain) continue;
    const PlanChoice listed = choose_plan(request, ranks_like(request, costs), InputKind::files);
    BOOST_TEST(listed.prediction.seconds == plain->prediction.seconds);
    BOOST_TEST(testing::json_of(listed.plan) == testing::json_of(plain->plan));
    ++chosen;
  }
  BOOST_TEST(chosen > 20);
}

BOOST_AUTO_TEST_CASE(a_plan_is_chosen_whose_shares_of_the_merging_fit_the_mergers) {
  PlanRequest request = plain_job();
  request.host_accumulators = true;
  request.workers = 2;
  request.mergers = 1;
  const Plan plain = make_plan(request);
  PlannedRanks ranks = ranks_like(request, even_costs(request.device));
  int others = 0, none = 0, tiles = 0;
  for (std::int64_t budget = request.host_budget; budget > MiB; budget = budget * 3 / 4) {
    ranks.merger_budgets = {budget};
    const PlanChoice any = choose_plan(request, ranks, InputKind::files, Divisions::any);
    const PlanChoice choice = choose_plan(request, ranks, InputKind::files);
    tiles += merger_has_room(any.plan, budget) > merger_has_room(choice.plan, budget);
    BOOST_TEST((merger_has_room(any.plan, budget) || any.is_default));
    for (const Alternative& other : any.others) {
      const bool fits = merger_has_room(make_plan(other.request), budget);
      BOOST_TEST((!fits || merger_has_room(any.plan, budget)));
    }
    if (!merger_has_room(choice.plan, budget)) {
      BOOST_TEST(choice.is_default);
      ++none;
      continue;
    }
    BOOST_TEST(none == 0);
    const bool keeps_default =
        choice.is_default || std::ranges::any_of(choice.others, &Alternative::is_default);
    BOOST_TEST(keeps_default == merger_has_room(plain, budget));
    if (keeps_default) continue;
    for (const Alternative& other : choice.others)
      BOOST_TEST(merger_has_room(make_plan(other.request), budget));
    ++others;
  }
  BOOST_TEST(others > 0);
  BOOST_TEST(none > 0);
  BOOST_TEST(tiles > 0);
}

BOOST_AUTO_TEST_CASE(workers_without_room_are_done_without) {
  PlanRequest request = plain_job();
  request.workers = 3;
  const Costs costs = even_costs(request.device);
  PlannedRanks ranks = ranks_like(request, costs);
  ranks.workers[1].host_budget = KiB;
  const PlanChoice choice = choose_plan(request, ranks, InputKind::files);
  const auto left = costs_of(choice.plan, ranks);
  BOOST_REQUIRE(left);
  BOOST_TEST(left->workers.size() == 2u);
  BOOST_TEST(choice.prediction.seconds ==
             predict(choice.plan, SharedCosts{costs, {costs, costs}}, InputKind::files).seconds);
  for (WorkerMeans& worker : ranks.workers) worker.host_budget = KiB;
  BOOST_TEST(!costs_of(choice.plan, ranks));
  BOOST_TEST(choose_plan(request, ranks, InputKind::files).is_default);
}

// The worker that has no room for the default is a thousand times as slow as the other, then as
// fast.
BOOST_AUTO_TEST_CASE(a_plan_is_made_to_fit_a_worker_where_that_is_worth_it) {
  PlanRequest request = plain_job();
  request.workers = 2;
  request.host_accumulators = true;
  const Costs usual = even_costs(request.device);
  const Plan plain = make_plan(request);
  PlannedRanks ranks = ranks_like(request, usual);
  std::int64_t& little = ranks.workers[0].host_budget;
  while (little > KiB && costs_of(plain, ranks)->workers.size() == 2) little = little * 2 / 3;
  for (const double faster : {1e-3, 1e3}) {
    Costs costs = usual;
    for (KernelCost& kernel : costs.kernels) {
      kernel.flop_per_second *= faster;
      kernel.burst_flop_per_second *= faster;
    }
    ranks.workers[0].costs = costs;
    const PlanChoice choice = choose_plan(request, ranks, InputKind::files);
    BOOST_TEST(choice.is_default == (faster < 1));
    BOOST_TEST(costs_of(choice.plan, ranks)->workers.size() == (faster < 1 ? 1u : 2u));
  }
}
