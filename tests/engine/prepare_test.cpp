// A device that has less memory left than the plan was made for.
#define BOOST_TEST_MODULE engine_prepare
#include "engine/prepare.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <random>
#include <string>
#include <vector>

#include "stream_cqsa/error.hpp"
#include "support/crowded_backend.hpp"
#include "support/run_plan.hpp"
#include "support/test_backend.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

struct Case {
  TestInput input;
  Plan plan;
};

Case random_case(std::mt19937_64& random, AccumulatorPlacement placement) {
  const Problem problem = random_problem(random, 150, 24, test_dim_step());
  const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
  const bool device = placement == AccumulatorPlacement::device;
  PlanRequest request = roomy_request(problem, layout, CrowdedBackend(make_test_backend(2), 0),
                                      device ? placement : AccumulatorPlacement::memory);
  request.device.tile = 1;
  request.chunks = 1 + static_cast<std::int64_t>(random() % 13);
  if (random() % 2) request.heads_per_group = 1;
  Plan plan = make_plan(request);
  if (placement == AccumulatorPlacement::file) plan = with_accumulators_in_a_file(plan);
  BOOST_REQUIRE((plan.placement == placement));
  return {random_input(problem, layout, 2.0, random), plan};
}

bool works(const Plan& plan, std::int64_t device_budget) {
  try {
    within_device(plan, device_budget);
    return true;
  } catch (const InputError&) {
    return false;
  }
}

// Nine tenths of what is free are taken.
std::int64_t taken(std::int64_t free_bytes) { return free_bytes / 10 * 9; }

}  // namespace

BOOST_AUTO_TEST_CASE(a_run_goes_on_within_what_is_left_with_the_same_bytes) {
  std::mt19937_64 random(31);
  int smaller = 0, refused = 0, moved = 0;
  for (int trial = 0; trial < trials(90); ++trial) {
    const auto placement = static_cast<AccumulatorPlacement>(trial % 3);
    const auto [input, plan] = random_case(random, placement);
    const Outcome expected = run_plan(plan, input, *make_test_backend(2), trial % 2 == 0);
    const auto left =
        static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(plan.device.bytes()));
    BOOST_TEST_CONTEXT("trial " << trial << ", " << left << " of " << plan.device.bytes()) {
      CrowdedBackend backend(make_test_backend(2), left);
      if (!works(plan, taken(left))) {
        BOOST_CHECK_THROW(run_plan(plan, input, backend, trial % 2 == 0), OutOfDeviceMemory);
        ++refused;
        continue;
      }
      const Outcome outcome = run_plan(plan, input, backend, trial % 2 == 0);
      BOOST_TEST((outcome.output == expected.output));
      BOOST_TEST((outcome.lse == expected.lse));
      BOOST_TEST(outcome.result.merged_scores == expected_scores(plan));
      BOOST_TEST(outcome.result.device_bytes <= taken(left));
      ++smaller;
      moved += within_device(plan, taken(left)).placement != placement;
    }
  }
  BOOST_TEST(smaller >= trials(20));
  BOOST_TEST(refused >= trials(10));
  BOOST_TEST(moved >= trials(5));
}

BOOST_AUTO_TEST_CASE(it_is_told_in_one_line_with_what_is_allocated) {
  std::mt19937_64 random(32);
  bool on_host = false;
  for (int trial = 0; trial < trials(30); ++trial) {
    const Case own = random_case(random, AccumulatorPlacement::device);
    const std::int64_t planned = own.plan.device.bytes();
    Telemetry telemetry;
    std::vector<std::string> lines;
    const auto tell = [&](const std::string& line) { lines.push_back(line); };
    const auto within = [&](std::int64_t bytes) { return within_device(own.plan, bytes); };
    Plan plan = own.plan;
    CrowdedBackend roomy(make_test_backend(2), planned);
    prepare(roomy, plan, within, tell, telemetry);
    BOOST_TEST(lines.empty());
    BOOST_TEST(roomy.allocated_bytes() == planned);
    const std::int64_t left = planned / 10 * static_cast<std::int64_t>(4 + random() % 6);
    if (!works(own.plan, taken(left))) continue;
    CrowdedBackend crowded(make_test_backend(2), left);
    prepare(crowded, plan, within, tell, telemetry);
    BOOST_TEST(crowded.allocated_bytes() == plan.device.bytes());
    BOOST_TEST(plan.device.bytes() <= taken(left));
    BOOST_TEST_REQUIRE(lines.size() == 1u);
    const bool moved = plan.placement != AccumulatorPlacement::device;
    BOOST_TEST(lines[0].ends_with("accumulators on the host") == moved);
    on_host = on_host || moved;
  }
  BOOST_TEST(on_host);
}

BOOST_AUTO_TEST_CASE(a_device_that_has_less_each_time_is_asked_for_less_until_it_is_too_little) {
  // Says that all is free, as one does whose memory is in pieces.
  class Shrinking : public DelayedBackend {
   public:
    Shrinking() : DelayedBackend(make_test_backend(2), 1) {}
    void prepare(const Plan& plan, Telemetry&) override {
      asked.push_back(plan.device.bytes());
      throw OutOfDeviceMemory("in pieces", std::int64_t{1} << 60);
    }
    std::vector<std::int64_t> asked;
  };
  std::mt19937_64 random(33);
  const Case own = random_case(random, AccumulatorPlacement::memory);
  Shrinking backend;
  Telemetry telemetry;
  Plan plan = own.plan;
  const auto within = [&](std::int64_t bytes) { return within_device(own.plan, bytes); };
  BOOST_CHECK_EXCEPTION(prepare(backend, plan, within, nullptr, telemetry), OutOfDeviceMemory,
                        [](const Error& error) {
                          return std::string(error.what()).starts_with("in pieces; the smallest");
                        });
  BOOST_TEST(backend.asked.size() >= 2u);
  BOOST_TEST((std::adjacent_find(backend.asked.begin(), backend.asked.end(), std::less_equal<>()) ==
              backend.asked.end()));
}

BOOST_AUTO_TEST_CASE(what_is_cancelled_fails_and_the_next_plan_is_computed) {
  class Cancelled : public DelayedBackend {
   public:
    Cancelled() : DelayedBackend(make_test_backend(2), 1) {}
    Ticket launch(WorkList work, std::span<const Ticket> after) override {
      if (launches++ == cancelled) cancel();
      return DelayedBackend::launch(std::move(work), after);
    }
    int launches = 0;
    int cancelled = -1;
  };
  std::mt19937_64 random(34);
  for (int trial = 0; trial < trials(60); ++trial) {
    const auto [input, plan] = random_case(random, static_cast<AccumulatorPlacement>(trial % 3));
    Cancelled backend;
    const Outcome expected = run_plan(plan, input, backend, false);
    if (backend.launches == 0) continue;
    const int more = static_cast<int>(random() % static_cast<std::uint64_t>(backend.launches));
    backend.cancelled = backend.launches + more;
    BOOST_TEST_CONTEXT("trial " << trial) {
      BOOST_CHECK_EXCEPTION(run_plan(plan, input, backend, false), Error, [](const Error& error) {
        return std::string(error.what()).ends_with("cancelled");
      });
      const Outcome outcome = run_plan(plan, input, backend, false);
      BOOST_TEST((outcome.output == expected.output));
      BOOST_TEST((outcome.lse == expected.lse));
    }
  }
}
