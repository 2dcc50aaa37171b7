// When files bind a run, and how fast they would have to be.
#define BOOST_TEST_MODULE disk_bound
#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <random>

#include "core/plan_sizes.hpp"
#include "stream_cqsa/costs.hpp"

namespace sc = stream_cqsa;

namespace {

constexpr double tolerance = 1 + 1e-9;

sc::PlanRequest request_of(std::int64_t length, std::int64_t heads) {
  sc::PlanRequest request;
  request.problem = {1,  heads,          heads,          length,         length,
                     64, sc::DType::f16, sc::DType::f16, sc::Mask::none, sc::default_scale(64)};
  request.device.kind = "cuda";
  request.device.tile = 192;
  request.device_budget = std::int64_t{1} << 30;
  request.host_budget = std::int64_t{4} << 30;
  request.host_accumulators = true;
  return request;
}

// With files so many times as fast.
sc::Costs faster(sc::Costs costs, double factor) {
  for (const auto rate :
       {&sc::Costs::read, &sc::Costs::read_direct, &sc::Costs::write, &sc::Costs::rewrite}) {
    costs.*rate *= factor;
  }
  return costs;
}

double seconds(const sc::Plan& plan, const sc::Costs& costs, sc::InputKind inputs) {
  return sc::predict(plan, costs, inputs).seconds;
}

// What disk_bound() gives is what predict() says of faster files.
void check(const sc::Plan& plan, const sc::Costs& costs, sc::InputKind inputs) {
  const double now = seconds(plan, costs, inputs);
  const double unbound = seconds(plan, faster(costs, 1e30), inputs);
  const auto disk = sc::disk_bound(plan, costs, inputs);
  BOOST_TEST(disk.has_value() == (now > 1.05 * unbound));
  if (!disk) return;
  BOOST_TEST(disk->seconds == now);
  BOOST_TEST(disk->seconds_unbound == unbound);
  const sc::Prediction prediction = sc::predict(plan, costs, inputs);
  BOOST_TEST(disk->busy_seconds == prediction.busy_of(disk->stage));
  for (const auto stage : {sc::Stage::spill, sc::Stage::write})
    BOOST_TEST(disk->busy_seconds >= prediction.busy_of(stage));
  const double factor = disk->enough / disk->rate;
  BOOST_TEST(factor > 1);
  BOOST_TEST(seconds(plan, faster(costs, factor), inputs) <= 1.05 * unbound * tolerance);
  if (factor > 1.03) {
    BOOST_TEST(seconds(plan, faster(costs, factor / 1.03), inputs) >= 1.05 * unbound / tolerance);
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_disk_that_is_fast_enough_does_not_bind) {
  const sc::Plan plan = sc::make_plan(request_of(4'000'000, 1));
  sc::Costs costs = sc::builtin_costs(plan.request.device);
  BOOST_TEST(!sc::disk_bound(plan, costs, sc::InputKind::files).has_value());
  costs.read = 1e6;
  BOOST_TEST(!sc::disk_bound(plan, costs, sc::InputKind::synthetic).has_value());
}

BOOST_AUTO_TEST_CASE(a_slow_disk_binds_by_the_stage_that_it_is_slow_at) {
  const sc::Plan plan = sc::make_plan(request_of(200'000, 4));
  const sc::Costs fast = faster(sc::builtin_costs(plan.request.device), 1e6);
  sc::Costs slow = fast;
  slow.read = 1e8;
  const auto reading = sc::disk_bound(plan, slow, sc::InputKind::files);
  BOOST_REQUIRE(reading.has_value());
  BOOST_TEST((reading->stage == sc::Stage::read));
  BOOST_TEST(reading->rate == 1e8);
  BOOST_TEST(!sc::disk_bound(plan, slow, sc::InputKind::direct_files).has_value());
  slow = fast;
  slow.read_direct = 1e8;
  BOOST_TEST(!sc::disk_bound(plan, slow, sc::InputKind::files).has_value());
  BOOST_TEST((sc::disk_bound(plan, slow, sc::InputKind::direct_files)->stage == sc::Stage::read));
  slow = fast;
  slow.write = slow.rewrite = 1e7;
  for (const auto kind : {sc::InputKind::files, sc::InputKind::synthetic}) {
    BOOST_TEST((sc::disk_bound(plan, slow, kind)->stage == sc::Stage::write));
    BOOST_TEST(std::abs(sc::disk_bound(plan, slow, kind)->rate / 1e7 - 1) < 1e-9);
  }
}

BOOST_AUTO_TEST_CASE(accumulators_in_a_file_are_read_and_written) {
  sc::PlanRequest request = request_of(1'000'000, 4);
  request.scratch = true;
  request.device_budget = request.host_budget = std::int64_t{64} << 20;
  const sc::Plan plan = sc::make_plan(request);
  BOOST_REQUIRE((plan.placement == sc::AccumulatorPlacement::file));
  const double spilled = sc::estimate_traffic(plan).spilled;
  BOOST_TEST(spilled > 0);
  sc::Costs costs = sc::builtin_costs(request.device);
  const double expected = spilled / 2 / costs.read + spilled / 2 / costs.write;
  const double busy = sc::predict(plan, costs, sc::InputKind::files).busy_of(sc::Stage::spill);
  BOOST_TEST(std::abs(busy / expected - 1) < 0.05);
  costs.write /= 100;
  check(plan, costs, sc::InputKind::synthetic);
  BOOST_TEST((sc::disk_bound(plan, costs, sc::InputKind::synthetic)->stage == sc::Stage::spill));
}

BOOST_AUTO_TEST_CASE(random_plans_on_random_machines) {
  std::mt19937 random(8);
  const auto below = [&](int bound) {
    return static_cast<int>(random() % static_cast<unsigned>(bound));
  };
  int bound = 0;
  for (int round = 0; round < 100; ++round) {
    sc::PlanRequest request = request_of(1 + below(1 << (4 + below(17))), 1 + below(6));
    if (below(2) == 0) request.problem.mask = sc::Mask::causal;
    if (below(3) == 0) request.query.layout = request.output_layout = sc::Layout::bhsd;
    if (below(3) == 0) request.workers = 1 + below(5);
    request.scratch = below(2) == 0;
    request.host_budget = std::int64_t{1} << (26 + below(8));
    sc::Costs costs = faster(sc::builtin_costs(request.device), std::exp2(below(20) - 14));
    costs.read_direct *= below(2);
    const sc::Plan plan = sc::make_plan(request);
    BOOST_TEST_CONTEXT("round " << round) {
      for (const auto kind :
           {sc::InputKind::files, sc::InputKind::direct_files, sc::InputKind::synthetic}) {
        check(plan, costs, kind);
        bound += sc::disk_bound(plan, costs, kind).has_value();
      }
    }
  }
  BOOST_TEST(bound > 50);
  BOOST_TEST(bound < 250);
}
