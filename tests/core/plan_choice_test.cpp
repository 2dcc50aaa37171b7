// The plan that is chosen by prediction.
#define BOOST_TEST_MODULE plan_choice
#include "stream_cqsa/plan_choice.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>

#include "core/plan_choice_jobs.hpp"
#include "core/plan_requests.hpp"
#include "stream_cqsa/error.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

constexpr double tolerance = 1 + prediction_tolerance;
// What is searched for is found by estimates.
constexpr double search_tolerance = 1.1;

std::string json_of(const PlanChoice& choice, bool subproblems = false) {
  std::stringstream out;
  write_json(choice, smallest_budgets(choice.plan.request), subproblems, out);
  return out.str();
}

// On one like an H200.
PlanRequest gpu_job(std::int64_t length, std::int64_t heads) {
  PlanRequest request;
  Problem& problem = request.problem;
  problem.query_length = problem.key_length = length;
  problem.query_heads = problem.kv_heads = heads;
  problem.head_dim = 64;
  problem.dtype = problem.output_dtype = DType::f16;
  problem.mask = Mask::causal;
  DeviceTraits& device = request.device;
  device.kind = "cuda";
  device.tile = 192;
  device.slot_alignment = device.workspace_bytes = 256;
  device.query_item_bytes = 200;
  device.key_item_bytes = 64;
  device.overlap_worth = 16;
  device.overlap_flop = 2'000'000'000'000;
  device.merges = true;
  request.host_budget = 32 * GiB;
  return request;
}

}  // namespace

BOOST_AUTO_TEST_CASE(choices_are_repeatable_never_slower_than_the_default_and_made_again_anywhere) {
  int defaults = 0, others = 0, sharing = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + trials<std::uint64_t>(150); ++seed) {
    Random random(seed);
    PlanRequest request = random_job(random);
    if (seed % 4 == 0) request = as_tiles(request, random);
    const Costs costs = random_costs(random, request.device);
    const auto choice = try_choice(request, costs);
    const auto plain = try_plan(request);
    BOOST_REQUIRE_EQUAL(choice.has_value(), plain.has_value());
    if (!choice) continue;
    BOOST_TEST_CONTEXT("seed " << seed << ": " << text_of(request)) {
      const double seconds = predict(*plain, costs, InputKind::files).seconds;
      BOOST_REQUIRE_EQUAL(choice->prediction.seconds,
                          predict(choice->plan, costs, InputKind::files).seconds);
      BOOST_TEST(choice->prediction.seconds <= seconds);
      const std::string text = json_of(*choice);
      BOOST_TEST(text == json_of(*try_choice(request, costs)));
      std::stringstream in(text);
      BOOST_TEST(testing::json_of(read_plan(in, "plan.json")) == testing::json_of(choice->plan));
      BOOST_TEST(testing::json_of(make_plan(choice->plan.request)) ==
                 testing::json_of(choice->plan));
      if (choice->is_default) BOOST_TEST((choice->plan.request == request));
      for (const Alternative& other : choice->others) {
        BOOST_TEST(choice->prediction.seconds <= other.prediction.seconds * tolerance);
      }
      BOOST_TEST(std::ranges::is_sorted(
          choice->others, {}, [](const Alternative& other) { return other.prediction.seconds; }));
      ++(choice->is_default ? defaults : others);
      sharing += request.workers > 1;
    }
  }
  BOOST_TEST(defaults >= trials(10));
  BOOST_TEST(others >= trials(10));
  BOOST_TEST(sharing >= trials(10));
}

BOOST_AUTO_TEST_CASE(alternatives_are_what_they_say) {
  for (std::uint64_t seed = first_seed; seed < first_seed + trials<std::uint64_t>(30); ++seed) {
    Random random(seed);
    PlanRequest request = random_job(random);
    if (seed % 4 == 0) request = as_tiles(request, random);
    const Costs costs = random_costs(random, request.device);
    const auto choice = try_choice(request, costs);
    if (!choice) continue;
    for (const Alternative& other : choice->others) {
      const Plan plan = make_plan(other.request);
      BOOST_TEST(predict(plan, costs, InputKind::files).seconds == other.prediction.seconds);
      BOOST_TEST(plan.subproblem_count() == other.subproblems);
      BOOST_TEST((plan.placement == other.placement));
      BOOST_TEST(division_text(plan) == division_text(other));
    }
    const auto is_default = [](const Alternative& other) { return other.is_default; };
    BOOST_TEST(std::ranges::count_if(choice->others, is_default) == (choice->is_default ? 0 : 1));
  }
}

BOOST_AUTO_TEST_CASE(what_is_pinned_stays) {
  int chosen = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + trials<std::uint64_t>(120); ++seed) {
    Random random(seed);
    PlanRequest request = random_job(random);
    const Costs costs = random_costs(random, request.device);
    switch (seed % 4) {
      case 0:
        request.chunks = random.between(1, 60);
        break;
      case 1:
        request.heads_per_group = random.between(1, request.problem.kv_heads);
        break;
      case 2:
        request.host_accumulators = true;
        break;
      default:
        request.scheme = Scheme::tiles;
        request.grid = Grid{random.between(1, 20), random.between(1, 20)};
    }
    const auto choice = try_choice(request, costs);
    if (!choice) continue;
    ++chosen;
    const auto keeps = [&](const PlanRequest& of) {
      if (request.chunks) BOOST_TEST((of.chunks == request.chunks));
      if (request.grid) BOOST_TEST((of.grid == request.grid));
      if (request.heads_per_group) BOOST_TEST((of.heads_per_group == request.heads_per_group));
      if (request.host_accumulators) BOOST_TEST(of.host_accumulators);
      BOOST_TEST((of.scheme == request.scheme));
    };
    keeps(choice->plan.request);
    for (const Alternative& other : choice->others) keeps(other.request);
  }
  BOOST_TEST(chosen > trials(60));
}

// With several workers who is free first gets what is next, and where one thing takes less time all
// may end later, though never by more than this (Graham 1969).
BOOST_AUTO_TEST_CASE(a_larger_budget_is_not_predicted_to_take_longer) {
  int compared = 0;
  for (std::uint64_t seed = first_seed; seed < first_seed + trials<std::uint64_t>(200); ++seed) {
    Random random(seed);
    PlanRequest request = random_job(random);
    if (seed % 4 == 0) request = as_tiles(request, random);
    const Costs costs = random_costs(random, request.device);
    const bool of_device = random.chance(50);
    std::int64_t& budget = of_device ? request.device_budget : request.host_budget;
    const double anomaly = 2 - 1 / static_cast<double>(request.workers);
    std::optional<double> least;
    BOOST_TEST_CONTEXT("seed " << seed << (of_device ? ", device: " : ", host: ")
                               << text_of(request)) {
      for (double bytes = 64 * KiB; bytes < 512.0 * MiB; bytes *= 8) {
        budget = static_cast<std::int64_t>(bytes);
        const auto choice = try_choice(request, costs);
        BOOST_REQUIRE((choice || !least));
        if (!choice) continue;
        const double now = choice->prediction.seconds;
        if (least) {
          BOOST_TEST(now <= *least * tolerance * anomaly,
                     "at " << budget << " bytes " << now << " s after " << *least
                           << " s: " << division_text(choice->plan));
          ++compared;
        }
        least = std::min(least.value_or(now), now);
      }
    }
  }
  BOOST_TEST(compared > trials(300));
}

BOOST_AUTO_TEST_CASE(what_costs_make_far_better_is_chosen) {
  PlanRequest request = plain_job();
  const auto chosen = [&](const Costs& costs) {
    const PlanChoice choice = choose_plan(request, costs, InputKind::files);
    BOOST_TEST(!choice.is_default);
    const auto was_default = std::ranges::find_if(
        choice.others, [](const Alternative& other) { return other.is_default; });
    BOOST_REQUIRE(was_default != choice.others.end());
    BOOST_TEST(was_default->prediction.seconds > choice.prediction.seconds * tolerance);
    return choice.plan;
  };
  request.chunks = 31;
  BOOST_TEST((make_plan(request).placement == AccumulatorPlacement::device));
  Costs slow_device_merge = even_costs(request.device);
  slow_device_merge.device_merge /= 1000;
  BOOST_TEST((chosen(slow_device_merge).placement == AccumulatorPlacement::memory));
  request.chunks.reset();

  // A few launches, though the device is worth overlapping.
  request.device.overlap_flop = 1'000'000'000;
  request.device.overlap_worth = 64;
  BOOST_TEST(make_plan(request).subproblem_count() > 32);
  Costs slow_launches = even_costs(request.device);
  for (KernelCost& kernel : slow_launches.kernels) kernel.launch_seconds = 10;
  BOOST_TEST(chosen(slow_launches).subproblem_count() < 16);
  request.device.overlap_flop = 0;

  // Reading is as slow as computing: both at once take half the time.
  request.device_budget = 4 * GiB;
  BOOST_TEST(make_plan(request).subproblem_count() == 1);
  Costs slow_reads = even_costs(request.device);
  const Prediction prediction = predict(make_plan(request), slow_reads, InputKind::files);
  slow_reads.read *= prediction.busy_of(Stage::read) / prediction.busy_of(Stage::compute);
  BOOST_TEST(chosen(slow_reads).subproblem_count() > 4);
}

// Of jobs for a GPU, bound by computing, reading, merging or the network.
namespace {

// Compares the choice with every division into so many chunks; how many there were.
int compare_with_pinned(const PlanRequest& request,
                        std::initializer_list<std::int64_t> all_chunks) {
  const Costs costs = builtin_costs(request.device);
  const double chosen = choose_plan(request, costs, InputKind::synthetic).prediction.seconds;
  const std::int64_t heads = request.problem.kv_heads;
  int compared = 0;
  for (const std::int64_t chunks : all_chunks) {
    for (std::int64_t groups = 1; groups <= heads; groups *= 2) {
      for (const auto order : {ScheduleOrder::groups_outer, ScheduleOrder::groups_inner}) {
        PlanRequest pinned = request;
        pinned.chunks = chunks;
        pinned.heads_per_group = heads / groups;
        pinned.order = order;
        const auto plan = try_plan(pinned);
        if (!plan) continue;
        const double seconds = predict(*plan, costs, InputKind::synthetic).seconds;
        BOOST_TEST(chosen <= seconds * search_tolerance,
                   chosen << " s chosen, " << seconds << " s with " << division_text(*plan) << ": "
                          << text_of(request));
        ++compared;
      }
    }
  }
  return compared;
}

}  // namespace

BOOST_AUTO_TEST_CASE(no_division_that_could_be_pinned_is_faster) {
  int compared = 0;
  for (const std::int64_t length : {1 << 18, 1 << 20, 1 << 22}) {
    for (const std::int64_t heads : {1, 8, 32}) {
      for (const std::int64_t workers : {1, 8}) {
        for (const std::int64_t device_budget : {256 * MiB, 4 * GiB}) {
          PlanRequest request = gpu_job(length, heads);
          request.workers = workers;
          request.device_budget = device_budget;
          compared += compare_with_pinned(request, {3, 7, 13, 31, 57, 133, 307});
        }
      }
    }
  }
  BOOST_TEST(compared > 500);
}

BOOST_AUTO_TEST_CASE(nor_where_the_device_is_small_and_the_chunks_are_many) {
  int compared = 0;
  for (const std::int64_t heads : {1, 8}) {
    for (const std::int64_t device_budget : {16 * MiB, 32 * MiB, 64 * MiB, 128 * MiB}) {
      PlanRequest request = gpu_job((std::int64_t{1} << 21) / heads, heads);
      request.problem.head_dim = 128;
      request.device.tile = 128;
      request.device_budget = device_budget;
      compared += compare_with_pinned(request, {133, 307, 381, 553, 1407, 1893});
    }
  }
  BOOST_TEST(compared > 40);
}

BOOST_AUTO_TEST_CASE(a_little_more_memory_of_a_gpu_is_not_predicted_to_take_longer) {
  for (const std::int64_t heads : {1, 8}) {
    PlanRequest request = gpu_job((std::int64_t{1} << 22) / heads, heads);
    const Costs costs = builtin_costs(request.device);
    double least = std::numeric_limits<double>::infinity();
    for (double bytes = 16.0 * MiB; bytes < 4.0 * GiB; bytes *= 1.1) {
      request.device_budget = static_cast<std::int64_t>(bytes);
      const PlanChoice choice = choose_plan(request, costs, InputKind::files);
      const double seconds = choice.prediction.seconds;
      BOOST_TEST(seconds <= least * tolerance,
                 seconds << " s after " << least << " s: " << division_text(choice.plan) << " at "
                         << request.device_budget << " bytes");
      least = std::min(least, seconds);
    }
  }
}

BOOST_AUTO_TEST_CASE(any_division_takes_tiles_where_they_are_faster_and_else_quorum_sets) {
  PlanRequest request = plain_job();
  request.device.merges = false;
  request.device_budget = 6 * MiB;
  const Costs even = even_costs(request.device);
  const PlanChoice tie = choose_plan(request, even, InputKind::files, Divisions::any);
  BOOST_TEST((tie.plan.division.scheme() == Scheme::cqs));
  BOOST_TEST(std::ranges::any_of(
      tie.others, [](const Alternative& other) { return other.request.scheme == Scheme::tiles; }));

  // Tiles have fewer partials.
  Costs slow_merges = even;
  slow_merges.merge /= 3000;
  const PlanChoice tiles = choose_plan(request, slow_merges, InputKind::files, Divisions::any);
  BOOST_TEST((tiles.plan.division.scheme() == Scheme::tiles));
  const double cqs = choose_plan(request, slow_merges, InputKind::files).prediction.seconds;
  BOOST_TEST(cqs > tiles.prediction.seconds * tolerance);
  std::stringstream in(json_of(tiles));
  const Plan again = read_plan(in, "plan.json");
  BOOST_TEST((again.division.scheme() == Scheme::tiles));
  BOOST_TEST(testing::json_of(again) == testing::json_of(tiles.plan));

  // What is pinned of one division excludes the other.
  request.chunks = 31;
  const PlanChoice pinned = choose_plan(request, slow_merges, InputKind::files, Divisions::any);
  BOOST_TEST(pinned.plan.division.chunk_count() == 31);
}

BOOST_AUTO_TEST_CASE(json_names_the_alternatives_and_the_smallest_budgets) {
  const PlanRequest request = plain_job();
  const PlanChoice choice = choose_plan(request, even_costs(request.device), InputKind::files);
  BOOST_REQUIRE(choice.others.size() > most_printed);
  const auto json = nlohmann::json::parse(json_of(choice, true));
  BOOST_TEST(json["predicted"]["seconds"] == choice.prediction.seconds);
  BOOST_TEST(json["subproblems"].size() == json["subproblem_count"]);
  BOOST_REQUIRE(json["alternatives"].size() == most_printed);
  const auto& first = json["alternatives"][0];
  BOOST_TEST(first["division"] == "cqs");
  BOOST_TEST(first["c"] == choice.others[0].request.chunks.value());
  BOOST_TEST(first["heads_per_group"] == choice.others[0].request.heads_per_group.value());
  BOOST_TEST(first["seconds"] == choice.others[0].prediction.seconds);
  BOOST_TEST(json["smallest_budget"]["device"] == smallest_device_budget(choice.plan.request));
  BOOST_TEST(json["smallest_budget"]["host"] == smallest_host_budget(choice.plan.request));
  // Costs are not in it: what is said of other plans is not compared when it is read.
  auto changed = json;
  changed["alternatives"] = "something else";
  std::stringstream in(changed.dump());
  BOOST_TEST(testing::json_of(read_plan(in, "plan.json")) == testing::json_of(choice.plan));
}

BOOST_AUTO_TEST_CASE(a_pinned_order_is_kept_and_read_back) {
  PlanRequest request = plain_job();
  request.chunks = 7;
  request.heads_per_group = 2;
  for (const auto order : {ScheduleOrder::groups_outer, ScheduleOrder::groups_inner}) {
    request.order = order;
    const Plan plan = make_plan(request);
    BOOST_TEST((plan.order == order));
    const bool on_device = plan.placement == AccumulatorPlacement::device;
    BOOST_TEST(on_device == (order == ScheduleOrder::groups_outer));
    std::stringstream in(testing::json_of(plan));
    BOOST_TEST((read_plan(in, "plan.json").request == request));
  }
  request.host_accumulators = true;
  request.order.reset();
  request.host_budget = smallest_host_budget(request);
  make_plan(request);
  request.order = ScheduleOrder::groups_inner;
  BOOST_CHECK_EXCEPTION(make_plan(request), InputError, [](const InputError& error) {
    return std::string(error.what()).find("host memory") == 0;
  });
}
