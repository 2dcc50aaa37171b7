// What a run's own rates say of its plan, and the plans for the rest of it.
#define BOOST_TEST_MODULE tuning
#include "stream_cqsa/tuning.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "core/plan_requests.hpp"
#include "stream_cqsa/plan_choice.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

constexpr std::int64_t heads = 16, length = 8192, dim = 128;
constexpr double row_bytes = heads * dim * 4;  // of f32

// Kernels run at one rate, whatever they did before, and launch at once.
Costs plain_costs(const DeviceTraits& device) {
  Costs costs = builtin_costs(device);
  for (KernelCost& kernel : costs.kernels) {
    kernel.burst_flop_per_second = kernel.flop_per_second;
    kernel.launch_seconds = 0;
  }
  return costs;
}

// Sixteen head groups of token rows, of which the host keeps most, but not all; every chunk has a
// slot on the device.
PlanRequest mostly_cached(bool merges = true) {
  PlanRequest request = large_request(length, heads);
  request.problem.dtype = DType::f32;
  request.problem.mask = Mask::none;  // every quorum has as many chunks
  request.device.tile = 64;
  request.device.merges = merges;
  request.chunks = 7;
  request.heads_per_group = 1;
  request.host_budget = 160 * MiB;
  return request;
}

Plan outer_plan(bool merges = true) {
  PlanRequest request = mostly_cached(merges);
  request.order = ScheduleOrder::groups_outer;
  return make_plan(request);
}

double near(double value) { return 1e-9 * std::abs(value); }

void require_near(double a, double b) {
  BOOST_TEST(std::abs(a - b) <= near(b), a << " is not " << b);
}

double busy(const Plan& plan, Stage stage, std::int64_t from = 0) {
  return predict(plan, plain_costs(plan.request.device), InputKind::files, from).busy_of(stage);
}

double reads(const Plan& plan, std::int64_t from = 0) {
  return busy(plan, Stage::read, from) * plain_costs(plan.request.device).read;
}

StageTotals& of(RunSoFar& run, Stage stage) { return run.totals[static_cast<std::size_t>(stage)]; }

bool same_division(const Plan& a, const Plan& b) {
  if (a.groups.size() != b.groups.size() || a.division.chunk_count() != b.division.chunk_count() ||
      a.division.quorum_count() != b.division.quorum_count())
    return false;
  for (std::int64_t chunk = 0; chunk < a.division.chunk_count(); ++chunk) {
    if (a.division.chunk(chunk) != b.division.chunk(chunk)) return false;
  }
  return true;
}

MeasuredCosts slow_reads(const Plan& plan, double times) {
  MeasuredCosts measured{plain_costs(plan.request.device), {}};
  const double planned = measured.costs.read;
  measured.costs.read /= times;
  measured.changed.push_back({Stage::read, planned, measured.costs.read});
  return measured;
}

}  // namespace

BOOST_AUTO_TEST_CASE(the_rest_of_a_run_is_what_its_head_groups_take) {
  const Plan plan = outer_plan();
  const Costs costs = plain_costs(plan.request.device);
  const Prediction whole = predict(plan, costs, InputKind::files);
  for (const std::int64_t from : {0, 1, 5, 15, 16}) {
    const double share = static_cast<double>(heads - from) / heads;
    const Prediction rest = predict(plan, costs, InputKind::files, from);
    for (const Stage stage : {Stage::copy_in, Stage::compute, Stage::copy_out}) {
      require_near(rest.busy_of(stage), share * whole.busy_of(stage));
    }
    BOOST_TEST(rest.seconds <= whole.seconds);
  }
  BOOST_TEST(predict(plan, costs, InputKind::files, heads).seconds == costs.start_seconds);
}

// By the bytes of the rows and of the cache alone.
BOOST_AUTO_TEST_CASE(reads_of_the_rest_depend_on_what_is_in_the_cache) {
  const double whole = 3 * length * row_bytes;
  const Plan outer = outer_plan();
  const double cache = static_cast<double>(outer.host.cache_blocks) *
                       static_cast<double>(outer.host.cache_block_bytes);
  const double kept = cache / whole;
  BOOST_REQUIRE((0.4 < kept && kept < 0.99));
  for (const std::int64_t done : {0, 1, 7, 15}) {
    const auto left = static_cast<double>(heads - done);
    // The groups before have left some of their rows in the cache.
    require_near(reads(outer, done) - (done == 0 ? kept * whole : 0), left * whole * (1 - kept));
    // A plan that begins there finds none.
    Plan fresh = outer;
    fresh.groups_done = done;
    require_near(reads(fresh), whole * (1 + (left - 1) * (1 - kept)));
    require_near(reads(fresh, done), reads(fresh));
    // Going through the groups of each quorum reads each row once, whatever their number, where the
    // host keeps what the next quorums return to.
    PlanRequest request = mostly_cached();
    request.order = ScheduleOrder::groups_inner;
    request.host_budget *= 2;
    Plan inner = make_plan(request);
    inner.groups_done = done;
    require_near(reads(inner), whole);
  }
}

BOOST_AUTO_TEST_CASE(batch_entries_that_are_not_begun_are_read_whole) {
  PlanRequest request = mostly_cached();
  request.problem.batch = 3;
  for (const auto order : {ScheduleOrder::groups_outer, ScheduleOrder::groups_inner}) {
    for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
      request.order = order;
      request.query.layout = request.key.layout = request.value.layout = layout;
      Plan plan = make_plan(request);
      const double whole = reads(plan);
      plan.groups_done = heads;
      require_near(reads(plan), 2 * whole / 3);
      plan.groups_done = heads + heads / 2;
      // Of token rows all heads are read.
      const double shared = 2 * whole / 3;
      const double alone = layout == Layout::bhsd ? whole / 2 : whole / 3;
      BOOST_TEST((alone - near(whole) <= reads(plan) && reads(plan) <= shared + near(whole)));
    }
  }
}

BOOST_AUTO_TEST_CASE(a_rate_that_is_seen_long_enough_and_differs_is_the_measured_one) {
  const Plan plan = outer_plan();
  const Costs planned = plain_costs(plan.request.device);
  RunSoFar run;
  run.read_threads = 4;
  const auto measure = [&](double least_seconds = 0.2, InputKind inputs = InputKind::files) {
    return measured_costs(plan, planned, inputs, run, 1, least_seconds);
  };
  BOOST_TEST((measure(0).costs == planned));
  // Four threads, of which each gets a quarter of the rate.
  const auto seen = [&](double rate, double seconds) {
    of(run, Stage::read) = {4 * seconds, 10, std::llround(rate * seconds)};
  };
  for (const double same : {1.0, 1.15, 1 / 1.15}) {
    seen(same * planned.read, 1);
    BOOST_TEST(measure().changed.empty());
    BOOST_TEST((measure().costs == planned));
  }
  // One thread alone may have had all of the rate: only what is more than four times as fast is
  // faster for sure.
  seen(3.9 * planned.read, 1);
  BOOST_TEST(measure().changed.empty());
  for (const double times : {1.3, 1 / 1.3, 1e-3}) {
    const double rate = (times > 1 ? 4 : 1) * times * planned.read;
    seen(rate, 1);
    const MeasuredCosts measured = measure();
    BOOST_REQUIRE(measured.changed.size() == 1);
    BOOST_TEST((measured.changed[0].stage == Stage::read));
    BOOST_TEST(measured.changed[0].planned == planned.read);
    BOOST_TEST(std::abs(measured.costs.read / (times * planned.read) - 1) < 1e-6);
    BOOST_TEST(measured.changed[0].measured == measured.costs.read);
    BOOST_TEST(measure(1.5).changed.empty());
    BOOST_TEST(measure(0.2, InputKind::direct_files).costs.read == planned.read);
    require_near(measure(0.2, InputKind::synthetic).costs.generate,
                 std::clamp(planned.generate, rate / 4, rate));
  }
}

BOOST_AUTO_TEST_CASE(fingerprints_belong_to_reads_and_writes) {
  const Plan plan = outer_plan();
  const Costs planned = plain_costs(plan.request.device);
  RunSoFar run;
  of(run, Stage::read) = {2, 1, 3000};
  of(run, Stage::write) = {1, 1, 1000};
  of(run, Stage::checksum) = {4, 1, 4000};
  const Costs costs = measured_costs(plan, planned, InputKind::files, run, 1, 0).costs;
  require_near(costs.read, 3000 / (2 + 3.0));
  require_near(costs.write, 1000 / (1 + 1.0));
}

BOOST_AUTO_TEST_CASE(rows_put_together_from_several_groups_say_nothing_of_plain_writes) {
  PlanRequest request = mostly_cached();
  request.problem.batch = 2;
  RunSoFar run;
  of(run, Stage::write) = {1, 1, 1000};
  for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
    request.output_layout = layout;
    request.order = ScheduleOrder::groups_outer;
    const Plan plan = make_plan(request);
    const Costs planned = plain_costs(request.device);
    const auto changed = [&](std::int64_t from) {
      return !measured_costs(plan, planned, InputKind::files, run, from, 0).changed.empty();
    };
    BOOST_TEST(changed(heads - 1));
    BOOST_TEST(changed(heads) == (layout == Layout::bhsd));
    // Nor do rows that are written in their places at once.
    run.in_place = true;
    BOOST_TEST(changed(heads - 1) == (layout == Layout::bhsd));
    run.in_place = false;
  }
}

BOOST_AUTO_TEST_CASE(kernels_and_merges_are_measured_as_the_costs_count_them) {
  const Plan plan = outer_plan();
  BOOST_REQUIRE((plan.placement == AccumulatorPlacement::device));
  const Costs planned = plain_costs(plan.request.device);
  RunSoFar run;
  run.scores = 1'000'000;
  run.subproblems = 8;
  of(run, Stage::compute) = {3, 10, 0};  // two more launches have ended than are counted
  of(run, Stage::merge) = {2, 1, 4000};
  run.merge_threads = 7;  // not those of the device
  const MeasuredCosts measured = measured_costs(plan, planned, InputKind::files, run, 1, 0);
  const double flop = 4.0 * dim * 1e6 * 10 / 8;
  require_near(kernel_cost(measured.costs, plan.problem()).flop_per_second, flop / 3);
  // Of the three partials of a query chunk two are merged into the first.
  BOOST_REQUIRE(plan.division.quorum_size() == 3);
  require_near(measured.costs.device_merge, 1.5 * 4000 / 2);
  BOOST_TEST(measured.costs.merge == planned.merge);

  const Plan on_host = outer_plan(false);
  const Costs costs = measured_costs(on_host, planned, InputKind::files, run, 1, 0).costs;
  require_near(costs.merge, 7 * 4000 / 2.0);
  BOOST_TEST(costs.device_merge == planned.device_merge);

  Plan in_parts = on_host;
  in_parts.device.query_slots = 2;
  BOOST_TEST(computes_in_parts(in_parts));
  BOOST_TEST(!computes_in_parts(on_host));
  run.in_parts = true;
  const MeasuredCosts unknown = measured_costs(in_parts, planned, InputKind::files, run, 1, 0);
  BOOST_TEST((unknown.costs.kernels == planned.kernels));
}

BOOST_AUTO_TEST_CASE(slow_reads_of_token_rows_go_through_all_head_groups_at_once) {
  const Plan plan = outer_plan();
  const MeasuredCosts slow = slow_reads(plan, 50);
  const auto again = plan_again(plan, slow, InputKind::files, 3, 0);
  BOOST_REQUIRE(again.has_value());
  BOOST_TEST((again->plan.order == ScheduleOrder::groups_inner));
  BOOST_TEST(again->plan.groups_done == 3);
  BOOST_TEST(same_division(again->plan, plan));
  BOOST_TEST(again->plan.host.bytes() <= plan.request.host_budget);
  BOOST_TEST(again->seconds == predict(again->plan, slow.costs, InputKind::files).seconds);
  BOOST_TEST(again->seconds_before == predict(plan, slow.costs, InputKind::files, 3).seconds);
  BOOST_TEST(again->seconds * (1 + prediction_tolerance) < again->seconds_before);

  const MeasuredCosts as_planned{plain_costs(plan.request.device), {}};
  BOOST_TEST(!plan_again(plan, as_planned, InputKind::files, 3, 0));
  BOOST_TEST(!plan_again(plan, slow, InputKind::files, 3, again->seconds_before));
  BOOST_TEST(
      !plan_again(plan, slow, InputKind::files, 3, 0, {{ScheduleOrder::groups_inner, false}}));
  BOOST_TEST(!plan_again(plan, slow, InputKind::files, heads, 0));
}

BOOST_AUTO_TEST_CASE(accumulators_go_where_merges_are_faster) {
  const Plan plan = outer_plan();
  MeasuredCosts slow{plain_costs(plan.request.device), {}};
  slow.costs.device_merge /= 1e6;
  const auto again = plan_again(plan, slow, InputKind::files, 1, 0);
  BOOST_REQUIRE(again.has_value());
  BOOST_TEST((again->plan.placement == AccumulatorPlacement::memory));
  // And back, for who begins there.
  MeasuredCosts slow_host{plain_costs(plan.request.device), {}};
  slow_host.costs.merge /= 1e6;
  const auto back = plan_again(again->plan, slow_host, InputKind::files, 2, 0);
  BOOST_REQUIRE(back.has_value());
  BOOST_TEST((back->plan.placement == AccumulatorPlacement::device));
  BOOST_TEST(back->plan.groups_done == 2);
}

BOOST_AUTO_TEST_CASE(plans_for_the_rest_have_the_same_division_and_are_predicted_to_be_faster) {
  int again = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + 500; ++seed) {
    Random random(seed);
    PlanRequest request = random_request(random);
    request.chunks.reset();
    request.device.merges = true;
    request.host_accumulators = random.chance(50);
    if (random.chance(70)) request.heads_per_group = random.between(1, 2);
    if (seed % 4 == 0) {
      request = as_tiles(request, random);
    } else {
      request.chunks = random.between(3, 40);
    }
    const auto plan = try_plan(request);
    if (!plan) continue;
    MeasuredCosts measured{builtin_costs(request.device), {}};
    measured.costs.start_seconds = 0;
    for (double* rate : {&measured.costs.read, &measured.costs.merge, &measured.costs.copy_out,
                         &measured.costs.device_merge})
      *rate /= std::exp2(random.between(0, 12));
    for (KernelCost& kernel : measured.costs.kernels) {
      kernel.flop_per_second *= 1000;
      kernel.burst_flop_per_second *= 1000;
      kernel.launch_seconds /= 1000;
    }
    const std::int64_t from = random.between(1, group_total(*plan));
    const auto no_larger_file = [&](const Plan& next) {
      return next.scratch_bytes <= plan->scratch_bytes;
    };
    const auto other = plan_again(*plan, measured, InputKind::files, from, 0, {}, no_larger_file);
    if (!other) continue;
    ++again;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      BOOST_TEST(same_division(other->plan, *plan));
      BOOST_TEST((form_of(other->plan) != form_of(*plan)));
      BOOST_TEST(other->plan.groups_done == from);
      BOOST_TEST(other->plan.scratch_bytes <= plan->scratch_bytes);
      BOOST_TEST(other->plan.host.bytes() <= request.host_budget);
      BOOST_TEST(other->plan.device.bytes() <= request.device_budget);
      BOOST_TEST(other->seconds * (1 + prediction_tolerance) < other->seconds_before);
    }
  }
  BOOST_TEST(again > 20);
}

BOOST_AUTO_TEST_CASE(a_run_never_goes_back_to_a_form_that_it_has_left) {
  const Plan plan = outer_plan();
  const Costs planned = plain_costs(plan.request.device);
  Tuner tuner({planned, InputKind::files, 0});
  RunSoFar run;
  BOOST_TEST(!tuner.ask(plan, run, 1, 0));
  of(run, Stage::merge) = {1, 1, std::llround(planned.device_merge * 1e-6)};
  const auto on_host = tuner.ask(plan, run, 2, 0);
  BOOST_REQUIRE(on_host.has_value());
  BOOST_TEST(!form_of(on_host->plan).on_device);
  // There merges are slower still.
  Plan outer = on_host->plan;
  outer.order = ScheduleOrder::groups_outer;
  RunSoFar later;
  of(later, Stage::merge) = {1, 1, std::llround(planned.merge * 1e-8)};
  const MeasuredCosts slow = measured_costs(outer, planned, InputKind::files, later, 3, 0);
  BOOST_TEST(form_of(plan_again(outer, slow, InputKind::files, 3, 0).value().plan).on_device);
  const auto third = tuner.ask(outer, later, 3, 0);
  BOOST_TEST((!third || !form_of(third->plan).on_device));
}

BOOST_AUTO_TEST_CASE(a_rate_that_was_measured_holds_for_the_plans_after) {
  PlanRequest request = outer_plan().request;
  request.host_accumulators = true;
  const Plan on_host = make_plan(request);
  const Costs planned = plain_costs(request.device);
  Tuner tuner({planned, InputKind::files, 0});
  RunSoFar merging;
  of(merging, Stage::merge) = {1, 1, std::llround(planned.merge * 1e-6)};
  const auto on_device = tuner.ask(on_host, merging, 2, 0);
  BOOST_REQUIRE(on_device.has_value());
  BOOST_REQUIRE(form_of(on_device->plan).on_device);
  // There nothing is merged on the host; slow reads alone would bring it back, quorum by quorum.
  RunSoFar reading;
  of(reading, Stage::read) = {1, 1, std::llround(planned.read / 50)};
  BOOST_TEST(!tuner.ask(on_device->plan, reading, 3, 0));
  BOOST_TEST(Tuner({planned, InputKind::files, 0}).ask(on_device->plan, reading, 3, 0).has_value());
}

BOOST_AUTO_TEST_CASE(what_an_earlier_run_has_merged_counts_for_nothing) {
  const Plan plan = outer_plan();
  const Costs planned = plain_costs(plan.request.device);
  RunSoFar run;
  of(run, Stage::read) = {1, 1, std::llround(planned.read / 50)};
  const auto ask = [&](double lacking, double switch_seconds) {
    run.lacking = lacking;
    return Tuner({planned, InputKind::files, 0}).ask(plan, run, 3, switch_seconds);
  };
  const auto whole = ask(1, 0), half = ask(0.5, 0);
  BOOST_REQUIRE((whole && half));
  require_near(half->seconds, whole->seconds / 2);
  require_near(half->seconds_before, whole->seconds_before / 2);
  const double gain = whole->seconds_before - whole->seconds * (1 + prediction_tolerance);
  BOOST_TEST(ask(0.5, 0.49 * gain).has_value());
  BOOST_TEST(!ask(0.5, 0.51 * gain).has_value());
  BOOST_TEST(!ask(0, 0).has_value());
}

BOOST_AUTO_TEST_CASE(it_is_said_in_one_line) {
  const Plan plan = outer_plan();
  MeasuredCosts slow = slow_reads(plan, 50);
  slow.costs.read = 0.04e9;
  slow.changed[0] = {Stage::read, 2e9, 0.04e9};
  auto again = plan_again(plan, slow, InputKind::files, 3, 0);
  BOOST_REQUIRE(again.has_value());
  again->seconds = 12.1;
  again->seconds_before = 40.25;
  BOOST_TEST(describe(*again) ==
             "read at 0.04 GB/s, not 2: the remaining 13 of 16 head groups are computed all "
             "together, quorum by quorum, with accumulators in memory, predicted 12.1 s instead of "
             "40.2 s");
}
