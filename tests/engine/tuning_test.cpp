// Runs whose rest is planned again. What stages take is told to the telemetry: nothing here depends
// on how fast anything is.
#define BOOST_TEST_MODULE engine_tuning
#include <algorithm>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"
#include "support/durable_run.hpp"
#include "support/run_plan.hpp"
#include "support/test_backend.hpp"
#include "support/trials.hpp"
#include "support/tuned_run.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// What is slow, and what fails.
struct Disturbed {
  bool read = false, device_merge = false, host_merge = false;
  Lane lane = Lane::compute;
  int submissions = never_fails;
};

// `told` gets what the run says.
Outcome run_tuned(const Plan& plan, const TestInput& input, const Disturbed& disturbed,
                  std::vector<std::string>& told) {
  Telemetry telemetry;
  const auto open = [&](const TestTensor& tensor) {
    return SlowSource(tensor, disturbed.read ? &telemetry : nullptr);
  };
  SlowSource query = open(input.query), key = open(input.key), value = open(input.value);
  SlowBackend backend(disturbed.lane, disturbed.submissions);
  backend.slow_device = disturbed.device_merge;
  backend.slow_host = disturbed.host_merge;
  RunOptions options;
  options.warn = [&](const std::string& line) { told.push_back(line); };
  options.tuning = wrong_tuning(plan);
  return run_with(plan, {query, key, value}, backend, options, telemetry);
}

Outcome check(const TunedCase& own, const Disturbed& disturbed) {
  std::vector<std::string> told;
  const Outcome outcome = run_tuned(own.plan, own.input, disturbed, told);
  const Outcome plain = run_plan(own.plan, own.input, *make_test_backend(2), false);
  BOOST_TEST((outcome.output == plain.output));
  BOOST_TEST((outcome.lse == plain.lse));
  BOOST_TEST(outcome.result.merged_scores == expected_scores(own.plan));
  BOOST_TEST(outcome.result.output.nan == plain.result.output.nan);
  BOOST_TEST(outcome.result.output.infinite == plain.result.output.infinite);
  BOOST_TEST(outcome.result.scores_computed == plain.result.scores_computed);
  std::int64_t device = own.plan.device.bytes(), host = own.plan.host.bytes(), done = 0;
  for (const PlannedAgain& again : outcome.result.planned_again) {
    device = std::max(device, again.plan.device.bytes());
    host = std::max(host, again.plan.host.bytes());
    BOOST_TEST(again.plan.groups_done > done);
    done = again.plan.groups_done;
  }
  BOOST_TEST(outcome.result.device_bytes == device);
  BOOST_TEST(outcome.result.host_bytes == host);
  BOOST_REQUIRE(told.size() == outcome.result.planned_again.size());
  for (std::size_t i = 0; i < told.size(); ++i)
    BOOST_TEST(told[i] == describe(outcome.result.planned_again[i]));
  const Expected expected = brute_force(own.plan.problem(), own.input);
  TensorDesc desc = own.input.query.desc;
  desc.dtype = own.plan.problem().output_dtype;
  BOOST_TEST(largest_error(desc, outcome.output, expected.output) <=
             test_tolerance(own.plan.problem().dtype));
  return outcome;
}

}  // namespace

BOOST_AUTO_TEST_CASE(slow_reads_are_made_once_for_all_head_groups_with_the_same_bytes) {
  std::mt19937_64 random(41);
  for (int trial = 0; trial < 8; ++trial) {
    const auto placement = trial % 2 ? AccumulatorPlacement::device : AccumulatorPlacement::memory;
    const TunedCase own = half_cached_case(random, placement);
    BOOST_TEST_CONTEXT("trial " << trial << ", causal "
                                << (own.plan.problem().mask == Mask::causal)) {
      Disturbed disturbed;
      disturbed.read = true;
      const auto again = check(own, disturbed).result.planned_again;
      BOOST_REQUIRE(!again.empty());
      BOOST_TEST((again.back().plan.order == ScheduleOrder::groups_inner));
    }
  }
}

BOOST_AUTO_TEST_CASE(accumulators_are_moved_with_the_same_bytes) {
  std::mt19937_64 random(42);
  for (int trial = 0; trial < 8; ++trial) {
    const bool to_host = trial % 2 == 0;
    const auto from = to_host ? AccumulatorPlacement::device : AccumulatorPlacement::memory;
    const TunedCase own = random_tuned_case(random, from, ScheduleOrder::groups_outer);
    Disturbed disturbed;
    (to_host ? disturbed.device_merge : disturbed.host_merge) = true;
    BOOST_TEST_CONTEXT("trial " << trial) {
      const auto again = check(own, disturbed).result.planned_again;
      BOOST_REQUIRE(!again.empty());
      BOOST_TEST((again.front().plan.placement == AccumulatorPlacement::device) == !to_host);
    }
  }
}

// There only a batch entry's end leaves nothing open.
BOOST_AUTO_TEST_CASE(batch_entries_that_go_through_all_groups_at_once_end_before_another_plan) {
  std::mt19937_64 random(43);
  for (int trial = 0; trial < 4; ++trial) {
    const TunedCase own =
        random_tuned_case(random, AccumulatorPlacement::memory, ScheduleOrder::groups_inner);
    Disturbed disturbed;
    disturbed.host_merge = true;
    BOOST_TEST_CONTEXT("trial " << trial) {
      const auto again = check(own, disturbed).result.planned_again;
      BOOST_REQUIRE(again.empty() == (own.plan.problem().batch == 1));
      if (again.empty()) continue;
      BOOST_TEST(again.front().plan.groups_done % own.plan.problem().kv_heads == 0);
    }
  }
}

// Both places are slow at merging: it is moved once.
BOOST_AUTO_TEST_CASE(no_run_goes_to_and_fro) {
  std::mt19937_64 random(44);
  for (int trial = 0; trial < 3; ++trial) {
    const TunedCase own =
        random_tuned_case(random, AccumulatorPlacement::device, ScheduleOrder::groups_outer);
    Disturbed disturbed;
    disturbed.device_merge = disturbed.host_merge = true;
    std::vector<ScheduleForm> forms = {form_of(own.plan)};
    for (const PlannedAgain& again : check(own, disturbed).result.planned_again) {
      BOOST_TEST((std::ranges::find(forms, form_of(again.plan)) == forms.end()));
      forms.push_back(form_of(again.plan));
    }
    BOOST_TEST(forms.size() >= 2u);
  }
}

BOOST_AUTO_TEST_CASE(a_failure_behind_the_second_plan_ends_the_run_with_its_own_error) {
  std::mt19937_64 random(45);
  const TunedCase own =
      random_tuned_case(random, AccumulatorPlacement::device, ScheduleOrder::groups_outer);
  Disturbed disturbed;
  disturbed.device_merge = true;
  // With accumulators on the device each chunk's rows are copied out once, and then each partial.
  disturbed.lane = Lane::copy_out;
  const std::int64_t done = check(own, disturbed).result.planned_again.at(0).plan.groups_done;
  for (const int more : {1, 8, 20}) {
    disturbed.submissions = static_cast<int>(13 * done) + more;
    std::vector<std::string> told;
    BOOST_CHECK_EXCEPTION(
        run_tuned(own.plan, own.input, disturbed, told), Error,
        [](const Error& error) { return std::string(error.what()) == "device: injected failure"; });
    BOOST_TEST(told.size() == 1u);
  }
}

namespace {

RunOptions durable_options(const Plan& plan, const std::filesystem::path& directory) {
  RunOptions options;
  options.tuning = wrong_tuning(plan);
  options.tuning->has_room = [](const Plan&) { return true; };
  options.checkpoint.directory = directory;
  return options;
}

std::unique_ptr<SlowBackend> slow_reader(Lane lane = Lane::compute, int submissions = never_fails) {
  auto backend = std::make_unique<SlowBackend>(lane, submissions);
  backend->slow_reads = true;
  return backend;
}

}  // namespace

// Every run begins by the first plan, whichever the one before was ended by.
BOOST_AUTO_TEST_CASE(a_run_that_has_changed_over_is_continued_from_its_checkpoint) {
  std::mt19937_64 random(46);
  int ended_early = 0, after_the_change = 0, changed_again = 0, keyless_changed = 0;
  for (int trial = 0; trial < trials(24); ++trial) {
    const TunedCase own = half_cached_case(random, AccumulatorPlacement::memory, trial % 3 == 0);
    const Outcome plain = run_plan(own.plan, own.input, *make_test_backend(2), false);
    const TestDirectory directory;
    DurableRuns runs(own.plan, own.input);
    std::vector<std::string> told;
    bool changed = false;
    int resumed = 0;
    const auto run = [&](Backend& backend, StopRequest* stop, double interval) {
      RunOptions options = durable_options(own.plan, directory.path());
      options.goes_direct = [direct = random() % 2 == 0](std::int64_t) { return direct; };
      options.warn = [&](const std::string& line) { told.push_back(line); };
      options.checkpoint.stop = stop;
      options.checkpoint.interval = interval;
      options.checkpoint.resumed = [&](const Resumed& found) {
        ++resumed;
        BOOST_TEST(!found.is_damaged());
      };
      told.clear();
      resumed = 0;
      return runs.run(backend, options);
    };
    const auto end_early = [&](Backend& backend, StopRequest* stop) {
      try {
        run(backend, stop, random() % 2 ? 1e-3 : 60);
      } catch (const Error&) {
        ++ended_early;
        after_the_change += !told.empty();
      }
      changed |= !told.empty();
      BOOST_TEST(resumed <= 1);
    };
    const auto launches = static_cast<std::uint64_t>(own.plan.subproblem_count());
    {
      StopRequest stop;
      HoldingBackend backend(slow_reader(), stop, static_cast<std::int64_t>(random() % launches));
      end_early(backend, &stop);
    }
    const auto failing = slow_reader(Lane::compute, static_cast<int>(random() % launches));
    end_early(*failing, nullptr);
    const auto last = slow_reader();
    const RunResult result = run(*last, nullptr, 60);
    BOOST_TEST((runs.output == plain.output));
    BOOST_TEST((runs.lse == plain.lse));
    BOOST_TEST((result.output == plain.result.output));
    for (const PlannedAgain& again : result.planned_again)
      BOOST_TEST((again.plan.order == ScheduleOrder::groups_inner));
    changed |= !result.planned_again.empty();
    keyless_changed += trial % 3 == 0 && changed;
    changed_again += !result.planned_again.empty() && resumed > 0;
  }
  // Of a few trials, as slow tests make, any may end before it is stopped or changes over.
  BOOST_TEST(ended_early >= trials(24) / 2);
  BOOST_TEST(after_the_change >= trials(24) / 4);
  BOOST_TEST(changed_again >= trials(24) / 8);
  BOOST_TEST(keyless_changed >= trials(24) / 8);
}

BOOST_AUTO_TEST_CASE(accumulators_stay_where_a_checkpoint_can_be_made_and_has_room) {
  std::mt19937_64 random(47);
  const TunedCase own = half_cached_case(random, AccumulatorPlacement::memory);
  const auto plans = [&](SlowBackend& backend, const PlanFilter& has_room) {
    const TestDirectory directory;
    RunOptions options = durable_options(own.plan, directory.path());
    options.tuning->has_room = has_room;
    return DurableRuns(own.plan, own.input).run(backend, options).planned_again;
  };
  SlowBackend merging(Lane::compute, never_fails);
  merging.slow_host = true;
  const auto any = [](const Plan&) { return true; };
  for (const PlannedAgain& again : plans(merging, any))
    BOOST_TEST((again.plan.placement != AccumulatorPlacement::device));
  BOOST_TEST(!plans(*slow_reader(), any).empty());
  // States of all head groups are more than those of one.
  BOOST_TEST(plans(*slow_reader(), nullptr).empty());
  BOOST_TEST(plans(*slow_reader(), [](const Plan&) { return false; }).empty());
}
