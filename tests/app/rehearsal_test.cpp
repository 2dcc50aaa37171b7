// Some subproblems of a plan: which are chosen, what is kept of them, and what a comparison finds.
#define BOOST_TEST_MODULE app_rehearsal
#include "app/rehearsal.hpp"

#include <algorithm>
#include <array>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <set>

#include "engine/rehearsal.hpp"
#include "stream_cqsa/error.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"
#include "support/run_plan.hpp"
#include "support/small_plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

OpenProblem open_input(const Problem& problem, const TestInput& input) {
  return {block_source(input.query), block_source(input.key), block_source(input.value), problem};
}

// A plan of any placement, with head groups of one or all heads.
PlanRequest random_request(const Problem& problem, Layout layout, const Backend& backend,
                           std::mt19937_64& random) {
  const auto placement = random() % 2 ? AccumulatorPlacement::device : AccumulatorPlacement::memory;
  PlanRequest request = roomy_request(problem, layout, backend, placement);
  random_division(request, {1, 2, 3, 7, 12, 13, 31}, random);
  if (random() % 2) request.heads_per_group = 1;
  return request;
}

// Computes subproblem `id` and compares what `disturb` leaves of it.
Verification rehearse(const Plan& plan, const TestInput& input, Backend& backend, std::int64_t id,
                      std::int64_t tokens,
                      const std::function<void(std::vector<SampledToken>&)>& disturb = nullptr) {
  OpenProblem open = open_input(plan.problem(), input);
  Telemetry telemetry;
  Rehearsal rehearsal(plan, {*open.query, *open.key, *open.value}, backend, {}, telemetry);
  BOOST_TEST(rehearsal.host_bytes() <= plan.request.host_budget);
  BOOST_TEST(rehearsal.plan().host.accumulators == 0);
  RehearsedSubproblem done = rehearsal.compute(id, sample_tokens(plan.work(id), tokens, 1));
  BOOST_TEST(done.kernel_seconds > 0);
  if (disturb) disturb(done.tokens);
  return verify_subproblem(open, plan, id, done.tokens);
}

// Leaves the last key chunk of every query chunk out.
class ForgetfulBackend final : public DelayedBackend {
 public:
  using DelayedBackend::DelayedBackend;
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    for (QueryWork& query : work.queries)
      query.key_count = std::max<std::int64_t>(1, query.key_count - 1);
    return DelayedBackend::launch(std::move(work), after);
  }
};

Problem plain_problem(std::int64_t length, std::int64_t kv_heads, std::int64_t ratio, Mask mask) {
  Problem problem;
  problem.kv_heads = kv_heads;
  problem.query_heads = kv_heads * ratio;
  problem.query_length = problem.key_length = length;
  problem.head_dim = 16;
  problem.mask = mask;
  problem.scale = default_scale(16);
  return problem;
}

}  // namespace

BOOST_AUTO_TEST_CASE(every_subproblem_of_random_plans_agrees_with_fp64) {
  std::mt19937_64 random(5);
  std::int64_t compared = 0;
  for (int trial = 0; trial < 25; ++trial) {
    const Problem problem = random_problem(random, 120, 32, 1);
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    const auto backend = make_cpu_backend({2});
    const Plan plan = make_plan(random_request(problem, layout, *backend, random));
    const TestInput input = random_input(problem, layout, 2.0, random);
    OpenProblem open = open_input(problem, input);
    Telemetry telemetry;
    Rehearsal rehearsal(plan, {*open.query, *open.key, *open.value}, *backend, {}, telemetry);
    std::uint64_t scores = 0;
    BOOST_TEST_CONTEXT("trial " << trial) {
      for (const std::int64_t id : spread_subproblems(plan, 1 << 20)) {
        const auto tokens = sample_tokens(plan.work(id), 5, 1);
        const RehearsedSubproblem done = rehearsal.compute(id, tokens);
        const Verification verification = verify_subproblem(open, plan, id, done.tokens);
        BOOST_TEST(verification.ok());
        const std::int64_t heads =
            plan.groups[static_cast<std::size_t>(plan.key(id).group)].query_heads(problem).size();
        BOOST_TEST(std::ssize(verification.rows) == std::ssize(tokens) * heads);
        BOOST_TEST(verification.compared() == std::ssize(verification.rows));
        compared += verification.compared();
        scores += done.scores;
      }
      const auto expected = expected_scores(plan);
      BOOST_TEST(scores == std::accumulate(expected.begin(), expected.end(), std::uint64_t{0}));
    }
  }
  BOOST_TEST(compared > 1000);
}

BOOST_AUTO_TEST_CASE(a_state_that_is_off_is_found) {
  std::mt19937_64 random(6);
  const Problem problem = plain_problem(90, 2, 2, Mask::causal);
  const auto backend = make_cpu_backend({1});
  PlanRequest request = roomy_request(problem, Layout::bshd, *backend);
  request.chunks = 7;
  const Plan plan = make_plan(request);
  const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
  BOOST_TEST(rehearse(plan, input, *backend, 3, 4).ok());
  using Tokens = std::vector<SampledToken>;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::function<void(Tokens&)> disturbances[] = {
      [](Tokens& t) { t[1].acc[5] += 0.01F * t[1].l[0]; },
      [](Tokens& t) { t[1].m[1] += 1e-3F; },
      [](Tokens& t) { t[1].l[2] *= 1.001F; },
      [&](Tokens& t) { t[2].acc[17] = nan; },
      [&](Tokens& t) { t[0].m[3] = nan; },
      [&](Tokens& t) { t[0].l[3] = nan; },
      [](Tokens& t) {
        std::swap(t[0], t[1]);
        std::swap(t[0].token, t[1].token);
      }};
  for (const auto& disturb : disturbances) {
    const Verification verification = rehearse(plan, input, *backend, 3, 4, disturb);
    BOOST_TEST(!verification.ok());
    BOOST_TEST(describe(verification).starts_with("FAILED"));
  }
}

BOOST_AUTO_TEST_CASE(a_row_that_sees_no_key_must_be_empty) {
  std::mt19937_64 random(7);
  Problem problem = plain_problem(40, 1, 1, Mask::causal);
  problem.key_length = 10;  // of the queries only the last ten see keys
  const auto backend = make_cpu_backend({1});
  const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
  PlanRequest request = roomy_request(problem, Layout::bshd, *backend);
  request.chunks = 1;
  const Plan plan = make_plan(request);
  BOOST_TEST(rehearse(plan, input, *backend, 0, 40).ok());
  const auto first = [](auto change) {
    return [change](std::vector<SampledToken>& tokens) {
      BOOST_REQUIRE(tokens.front().token == 0);
      change(tokens.front());
    };
  };
  BOOST_TEST(
      !rehearse(plan, input, *backend, 0, 40, first([](SampledToken& t) { t.acc[0] = 1; })).ok());
  BOOST_TEST(!rehearse(plan, input, *backend, 0, 40, first([](SampledToken& t) {
                         t.m[0] = 0;
                         t.l[0] = 1;
                       }))
                  .ok());
}

BOOST_AUTO_TEST_CASE(a_backend_that_computes_less_than_its_list_is_found) {
  std::mt19937_64 random(8);
  for (const Mask mask : {Mask::none, Mask::causal}) {
    const Problem problem = plain_problem(130, 2, 1, mask);
    ForgetfulBackend backend(make_cpu_backend({1}), 1);
    PlanRequest request = roomy_request(problem, Layout::bshd, backend);
    request.device.tile = 1;
    request.chunks = 13;
    const Plan plan = make_plan(request);
    const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
    BOOST_TEST(!rehearse(plan, input, backend, 6, 8).ok());
  }
}

BOOST_AUTO_TEST_CASE(a_device_that_fails_ends_the_rehearsal) {
  std::mt19937_64 random(9);
  const Problem problem = plain_problem(60, 1, 1, Mask::none);
  FailingBackend backend(make_cpu_backend({1}), Lane::compute, 0);
  PlanRequest request = roomy_request(problem, Layout::bshd, backend);
  request.chunks = 3;
  const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
  BOOST_CHECK_THROW(rehearse(make_plan(request), input, backend, 0, 2), Error);
}

BOOST_AUTO_TEST_CASE(subproblems_are_the_ends_and_evenly_between) {
  const Plan plan = small_plan({.length = 40, .chunks = 13});
  const auto spread = [&](std::int64_t count) { return spread_subproblems(plan, count); };
  BOOST_TEST(spread(1) == (std::vector<std::int64_t>{0}));
  BOOST_TEST(spread(2) == (std::vector<std::int64_t>{0, 12}));
  BOOST_TEST(spread(3) == (std::vector<std::int64_t>{0, 6, 12}));
  BOOST_TEST(std::ssize(spread(13)) == 13);
  BOOST_TEST(spread(1000) == spread(13));
}

BOOST_AUTO_TEST_CASE(subproblems_without_a_live_pair_are_passed_over) {
  // Of a causal grid the tiles above the diagonal are dead.
  const Plan plan = small_plan({.length = 40, .causal = true, .grid = Grid{8, 8}});
  std::set<std::int64_t> live;
  for (std::int64_t id = 0; id < plan.subproblem_count(); ++id)
    if (!plan.work(id).pairs.empty()) live.insert(id);
  BOOST_TEST(std::ssize(live) == 36);
  for (std::int64_t count = 1; count <= 40; ++count) {
    const auto ids = spread_subproblems(plan, count);
    BOOST_TEST(std::ssize(ids) == std::min<std::int64_t>(count, 36));
    BOOST_TEST(std::is_sorted(ids.begin(), ids.end()));
    for (const std::int64_t id : ids) BOOST_TEST(live.contains(id));
  }
}

BOOST_AUTO_TEST_CASE(subproblems_by_number) {
  const Plan plan = small_plan({.length = 40, .causal = true, .grid = Grid{4, 4}});
  BOOST_TEST(subproblems_option(plan, "15,0,4,0") == (std::vector<std::int64_t>{0, 4, 15}));
  for (const char* bad : {"", "16", "-1", "1x", "0,", ",0", "0,,4", "0 4", "99999999999999999999"})
    BOOST_CHECK_THROW(subproblems_option(plan, bad), InputError);
  BOOST_CHECK_THROW(subproblems_option(plan, "1"), InputError);  // dead
}

BOOST_AUTO_TEST_CASE(tokens_are_different_and_of_live_chunks) {
  const Plan plan = small_plan({.length = 50, .chunks = 7});
  const QuorumWork work = plan.work(2);
  std::set<std::int64_t> all;
  for (const ChunkPair& pair : work.pairs) {
    const Range queries = work.chunks[static_cast<std::size_t>(pair.query)].queries;
    for (std::int64_t token = queries.begin; token < queries.end; ++token) all.insert(token);
  }
  for (const std::int64_t count :
       {std::int64_t{1}, std::int64_t{2}, std::int64_t{9}, std::int64_t{50}}) {
    const auto tokens = sample_tokens(work, count, 4);
    BOOST_TEST(std::ssize(tokens) == std::min(count, std::ssize(all)));
    BOOST_TEST(tokens.front() == *all.begin());
    if (count > 1) BOOST_TEST(tokens[1] == *all.rbegin());
    BOOST_TEST(std::ssize(std::set(tokens.begin(), tokens.end())) == std::ssize(tokens));
    for (const std::int64_t token : tokens) BOOST_TEST(all.contains(token));
    BOOST_TEST((sample_tokens(work, count, 4) == tokens));
  }
}
