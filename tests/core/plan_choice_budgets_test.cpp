// The smallest budgets, and what is said where nothing fits.
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <string>

#include "core/plan_choice_jobs.hpp"
#include "core/plan_requests.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/plan_choice.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// Of which the smallest budgets are found at once.
PlanRequest short_job(Random& random) {
  PlanRequest request = random_job(random);
  request.problem.query_length = request.problem.key_length = random.magnitude(1, 3000);
  return request;
}

PlanRequest within(PlanRequest request, std::int64_t device_budget, std::int64_t host_budget) {
  request.device_budget = device_budget;
  request.host_budget = host_budget;
  return request;
}

}  // namespace

BOOST_AUTO_TEST_CASE(nothing_that_fits_is_said_as_without_costs) {
  PlanRequest request = plain_job();
  request.device_budget = 1000;
  const auto message = [](const auto& make) -> std::string {
    try {
      make();
    } catch (const InputError& error) {
      return error.what();
    }
    return "";
  };
  const auto chosen = [&](Divisions divisions) {
    return message(
        [&] { choose_plan(request, even_costs(request.device), InputKind::files, divisions); });
  };
  PlanRequest tiles = request;
  tiles.scheme = Scheme::tiles;
  BOOST_TEST(chosen(Divisions::requested) == message([&] { make_plan(request); }));
  BOOST_TEST(chosen(Divisions::any) == message([&] { make_plan(tiles); }));
}

BOOST_AUTO_TEST_CASE(the_smallest_budgets_work_and_no_smaller_ones_do) {
  int tight = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + trials<std::uint64_t>(60); ++seed) {
    Random random(seed);
    PlanRequest request = short_job(random);
    if (seed % 4 == 0) request = as_tiles(request, random);
    if (!try_plan(request)) continue;
    const SmallestBudgets smallest = smallest_budgets(request);
    const auto works = [&](std::int64_t device, std::int64_t host) {
      return try_plan(within(request, device, host)).has_value();
    };
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      BOOST_TEST(works(smallest.device, request.host_budget));
      BOOST_TEST(!works(smallest.device - 1, request.host_budget));
      BOOST_TEST(works(request.device_budget, smallest.host));
      BOOST_TEST(!works(request.device_budget, smallest.host - 1));
      ++tight;
    }
  }
  BOOST_TEST(tight > trials(20));
}

BOOST_AUTO_TEST_CASE(errors_name_the_smallest_budget_of_any_division) {
  int tried = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + trials<std::uint64_t>(60); ++seed) {
    Random random(seed);
    PlanRequest request = short_job(random);
    const Costs costs = builtin_costs(request.device);
    if (!try_choice(request, costs, Divisions::any)) continue;
    const SmallestBudgets smallest = smallest_budgets(request, Divisions::any);
    const auto error_with = [&](std::int64_t device, std::int64_t host) -> std::string {
      try {
        choose_plan(within(request, device, host), costs, InputKind::files, Divisions::any);
      } catch (const InputError& error) {
        return error.what();
      }
      return "";
    };
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const std::string device = error_with(smallest.device - 1, request.host_budget);
      const std::string host = error_with(request.device_budget, smallest.host - 1);
      BOOST_TEST(device.find(std::to_string(smallest.device)) != device.npos, device);
      BOOST_TEST(host.find(std::to_string(smallest.host)) != host.npos, host);
      ++tried;
    }
  }
  BOOST_TEST(tried > trials(20));
}

BOOST_AUTO_TEST_CASE(errors_name_the_smallest_budget_of_any_division_of_long_sequences) {
  for (const std::int64_t length : {1 << 20, 1 << 22, 1 << 24}) {
    PlanRequest request = plain_job();
    request.problem.query_length = request.problem.key_length = length;
    request.host_budget = std::int64_t{1} << 40;
    request.device_budget = 1000;
    PlanRequest tiles = request;
    tiles.scheme = Scheme::tiles;
    const std::int64_t smallest =
        std::min(smallest_device_budget(request), smallest_device_budget(tiles));
    BOOST_CHECK_EXCEPTION(
        choose_plan(request, builtin_costs(request.device), InputKind::files, Divisions::any),
        InputError, [&](const InputError& error) {
          return std::string(error.what()).find(std::to_string(smallest)) != std::string::npos;
        });
  }
}
