#define BOOST_TEST_MODULE engine_run
#include <array>
#include <boost/test/unit_test.hpp>
#include <mutex>
#include <optional>
#include <random>
#include <set>

#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"
#include "support/run_plan.hpp"
#include "support/test_backend.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

Problem random_problem(std::mt19937_64& random) {
  return testing::random_problem(random, 150, 40, test_dim_step());
}

constexpr AccumulatorPlacement placements[] = {AccumulatorPlacement::memory,
                                               AccumulatorPlacement::device};

void check_against_definition(const Plan& plan, const TestInput& input, const Outcome& outcome) {
  const Expected expected = brute_force(plan.problem(), input);
  TensorDesc desc = input.query.desc;
  desc.dtype = plan.problem().output_dtype;
  const double error = largest_error(desc, outcome.output, expected.output);
  BOOST_TEST(error <= test_tolerance(plan.problem().dtype));
  const double lse_error =
      largest_error(lse_desc(desc.batch, desc.heads, desc.tokens), outcome.lse, [&] {
        // largest_error takes [batch][token][head].
        std::vector<double> by_token;
        for (std::int64_t b = 0; b < desc.batch; ++b)
          for (std::int64_t n = 0; n < desc.tokens; ++n)
            for (std::int64_t h = 0; h < desc.heads; ++h)
              by_token.push_back(
                  expected.lse[static_cast<std::size_t>((b * desc.heads + h) * desc.tokens + n)]);
        return by_token;
      }());
  BOOST_TEST(lse_error <= 2e-5);
  BOOST_TEST(outcome.result.merged_scores == expected_scores(plan));
  BOOST_TEST(outcome.result.device_bytes == plan.device.bytes());
  BOOST_TEST(outcome.result.host_bytes == plan.host.bytes());
}

// Counts the launches that are waited for before copies out of their states are submitted.
class OrderBackend final : public DelayedBackend {
 public:
  using DelayedBackend::DelayedBackend;

  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    {
      const std::scoped_lock lock(mutex_);
      for (const Ticket ticket : after) copied_.insert(ticket.sequence);
    }
    return DelayedBackend::copy_out(copy, after);
  }
  void wait(Ticket ticket) override {
    if (ticket.lane == Lane::compute) {
      const std::scoped_lock lock(mutex_);
      early_waits_ += !copied_.contains(ticket.sequence);
    }
    DelayedBackend::wait(ticket);
  }
  int early_waits() const { return early_waits_; }
  std::size_t launches() const { return copied_.size(); }

 private:
  std::mutex mutex_;
  std::set<std::uint64_t> copied_;  ///< launches
  int early_waits_ = 0;
};

}  // namespace

BOOST_AUTO_TEST_CASE(random_problems_agree_with_the_definition) {
  std::mt19937_64 random(2026);
  for (int trial = 0; trial < trials(90); ++trial) {
    const Problem problem = random_problem(random);
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    const auto backend = make_test_backend(1 + trial % 3);
    const AccumulatorPlacement placement = placements[trial % 2];
    PlanRequest request = roomy_request(problem, layout, *backend, placement);
    const bool resident = random() % 4 == 0;
    request.query.resident = request.key.resident = request.value.resident = resident;
    random_division(request, {1, 2, 3, 7, 12, 13, 31, 57}, random);
    if (random() % 2) request.heads_per_group = 1;
    const Plan plan = make_plan(request);
    const TestInput input = random_input(problem, layout, 2.0, random);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << plan.division.chunk_count() << ", Nq "
                                << problem.query_length << ", Nk " << problem.key_length << ", D "
                                << problem.head_dim << ", causal "
                                << (problem.mask == Mask::causal)) {
      BOOST_TEST((plan.placement == placement));
      check_against_definition(plan, input, run_plan(plan, input, *backend, resident));
    }
  }
}

BOOST_AUTO_TEST_CASE(budgets_down_to_the_smallest_agree_with_the_definition) {
  std::mt19937_64 random(7);
  for (int trial = 0; trial < trials(12); ++trial) {
    Problem problem = random_problem(random);
    problem.query_length += 200;
    problem.key_length += 200;
    const auto probe = make_test_backend(1);
    PlanRequest request = roomy_request(problem, Layout::bshd, *probe);
    if (trial % 2) request.scheme = Scheme::tiles;
    const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
    // The smallest budgets that plan, found by halving.
    const auto plans = [&](std::int64_t device, std::int64_t host) {
      request.device_budget = device;
      request.host_budget = host;
      try {
        make_plan(request);
        return true;
      } catch (const InputError&) {
        return false;
      }
    };
    std::int64_t device = std::int64_t{1} << 28, host = std::int64_t{1} << 28;
    while (plans(device * 3 / 4, host)) device = device * 3 / 4;
    while (plans(device, host * 3 / 4)) host = host * 3 / 4;
    BOOST_TEST(plans(device, host));
    const Plan plan = make_plan(request);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << plan.division.chunk_count() << ", device "
                                << device << ", host " << host) {
      check_against_definition(plan, input, run_plan(plan, input, *probe, false));
    }
  }
}

BOOST_AUTO_TEST_CASE(copies_out_are_submitted_before_their_launch_is_waited_for) {
  std::mt19937_64 random(12);
  Problem problem = random_problem(random);
  problem.query_length = problem.key_length = 150;
  problem.mask = Mask::none;
  OrderBackend backend(make_test_backend(2), 12);
  PlanRequest request = roomy_request(problem, Layout::bshd, backend, AccumulatorPlacement::memory);
  request.device.tile = 1;
  request.chunks = 13;
  const Plan plan = make_plan(request);
  const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
  check_against_definition(plan, input, run_plan(plan, input, backend, false));
  BOOST_TEST(backend.launches() == static_cast<std::size_t>(plan.subproblem_count()));
  BOOST_TEST(backend.early_waits() == 0);
}

BOOST_AUTO_TEST_CASE(timing_and_threads_do_not_change_the_bits) {
  std::mt19937_64 random(3);
  Problem problem = random_problem(random);
  problem.query_length = problem.key_length = 170;
  problem.kv_heads = problem.query_heads = 2;
  problem.mask = Mask::causal;
  const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
  std::optional<Outcome> expected;
  for (const auto placement : placements) {
    PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(1), placement);
    request.chunks = 13;
    request.heads_per_group = 1;
    // Room for the scratch of the most threads tried below.
    request.device.workspace_bytes = make_test_backend(4)->traits(problem).workspace_bytes;
    const Plan plan = make_plan(request);
    BOOST_TEST((plan.placement == placement));
    const auto first = make_test_backend(1);
    if (!expected) expected = run_plan(plan, input, *first, false);
    for (int trial = 0; trial < trials(8); ++trial) {
      DelayedBackend delayed(make_test_backend(1 + trial % 4), static_cast<std::uint64_t>(trial));
      const Outcome outcome = run_plan(plan, input, delayed, false);
      BOOST_TEST(outcome.output == expected->output);
      BOOST_TEST(outcome.lse == expected->lse);
    }
  }
}

BOOST_AUTO_TEST_CASE(timing_does_not_change_the_bits_when_memory_is_short) {
  std::mt19937_64 random(8);
  for (const Mask mask : {Mask::none, Mask::causal}) {
    Problem problem;
    problem.kv_heads = problem.query_heads = 2;
    problem.query_length = problem.key_length = 300;
    problem.head_dim = 8;
    problem.mask = mask;
    problem.scale = default_scale(problem.head_dim);
    const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
    PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(2));
    request.device.tile = 1;
    request.chunks = 21;
    request.heads_per_group = 1;
    const Plan plan = make_plan(request);
    const auto plain = make_test_backend(2);
    const Outcome expected = run_plan(plan, input, *plain, false);
    check_against_definition(plan, input, expected);
    BOOST_TEST(expected.result.scratch_bytes == 0);
    const Plan tight = with_accumulators_in_a_file(plan);
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      DelayedBackend delayed(make_test_backend(2), seed);
      const Outcome outcome = run_plan(tight, input, delayed, false);
      BOOST_TEST_CONTEXT("seed " << seed << ", causal " << (mask == Mask::causal)) {
        BOOST_TEST(outcome.result.scratch_bytes > 0);
        BOOST_TEST(outcome.output == expected.output);
        BOOST_TEST(outcome.lse == expected.lse);
        BOOST_TEST(outcome.result.merged_scores == expected_scores(plan));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(subproblems_computed_in_parts_give_the_same_bits) {
  std::mt19937_64 random(9);
  for (int trial = 0; trial < trials(40); ++trial) {
    const Problem problem = random_problem(random);
    const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
    PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(2));
    request.device.tile = 1;
    random_division(request, {3, 7, 13, 21}, random);
    const Plan plan = make_plan(request);
    const bool resident = random() % 2 == 0;
    const Outcome expected = run_plan(plan, input, *make_test_backend(2), resident);
    // From one query chunk at a time on; half of the trials with slots for one quorum's keys.
    const std::int64_t quorum = plan.division.quorum_size();
    Plan tight = plan;
    tight.device.query_slots =
        1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(quorum));
    tight.device.state_slots = std::max<std::int64_t>(1, tight.device.query_slots - 1);
    if (random() % 2) tight.device.kv_slots = std::min(quorum, plan.device.kv_slots);
    DelayedBackend delayed(make_test_backend(2), random());
    const Outcome outcome = run_plan(tight, input, delayed, resident);
    BOOST_TEST(outcome.output == expected.output);
    BOOST_TEST(outcome.lse == expected.lse);
    BOOST_TEST(outcome.result.merged_scores == expected_scores(plan));
  }
}

// Budgets below those of any whole quorum, down to the smallest of all.
BOOST_AUTO_TEST_CASE(plans_for_devices_too_small_for_a_quorum_agree_with_the_definition) {
  std::mt19937_64 random(10);
  int in_parts = 0;
  for (int trial = 0; trial < trials(40); ++trial) {
    Problem problem = random_problem(random);
    problem.query_length += 60;
    const auto backend = make_test_backend(1 + trial % 3);
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    PlanRequest request = roomy_request(problem, layout, *backend, placements[trial % 2]);
    request.device.tile = std::array{1, 16}[random() % 2];
    if (random() % 2) request.chunks = std::array{3, 7, 13, 21}[random() % 4];
    if (random() % 3 == 0) request.host_budget = std::int64_t{1} << 17;
    const std::int64_t smallest = smallest_device_budget(request);
    request.device_budget =
        smallest + static_cast<std::int64_t>(random() % 3) * problem.head_dim * 100;
    const Plan plan = make_plan(request);
    const TestInput input = random_input(problem, layout, 2.0, random);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << plan.division.chunk_count() << ", smallest "
                                << smallest) {
      in_parts += plan.device.query_slots < plan.device.kv_slots;
      check_against_definition(plan, input, run_plan(plan, input, *backend, random() % 2 == 0));
    }
  }
  BOOST_TEST(in_parts > trials(40) / 4);
}

BOOST_AUTO_TEST_CASE(nan_and_infinity_reach_exactly_the_rows_they_touch) {
  std::mt19937_64 random(9);
  for (int trial = 0; trial < trials(48); ++trial) {
    Problem problem = random_problem(random);
    problem.dtype = DType::f32;
    problem.query_length = problem.key_length = 60 + trial;
    problem.mask = trial % 2 ? Mask::causal : Mask::none;
    TestInput input = random_input(problem, Layout::bshd, 1.0, random);
    TestTensor& tensor = *std::array{&input.query, &input.key, &input.value}[random() % 3];
    const double poison[] = {NAN, INFINITY, -INFINITY};
    set_element(tensor, 0, static_cast<std::int64_t>(random() % 60), 0, 0, poison[random() % 3]);
    const auto backend = make_test_backend(2);
    PlanRequest request = roomy_request(problem, Layout::bshd, *backend, placements[trial / 2 % 2]);
    request.chunks = 7;
    const Plan plan = make_plan(request);
    const Outcome outcome = run_plan(plan, input, *backend, false);
    const Expected expected = brute_force(problem, input);
    std::int64_t touched = 0;
    for (const double value : expected.output) touched += !std::isfinite(value);
    BOOST_TEST_CONTEXT("trial " << trial) {
      TensorDesc desc = input.query.desc;
      BOOST_TEST(largest_error(desc, outcome.output, expected.output) <=
                 test_tolerance(problem.dtype));
      BOOST_TEST(outcome.result.output.nan + outcome.result.output.infinite == touched);
    }
  }
}

BOOST_AUTO_TEST_CASE(inputs_of_another_plan_are_refused) {
  std::mt19937_64 random(1);
  Problem problem = random_problem(random);
  const TestInput input = random_input(problem, Layout::bshd, 1.0, random);
  const auto backend = make_test_backend(1);
  Problem other = problem;
  other.query_length += 1;
  const Plan plan = make_plan(roomy_request(other, Layout::bshd, *backend));
  BOOST_CHECK_THROW(run_plan(plan, input, *backend, false), InputError);
}
