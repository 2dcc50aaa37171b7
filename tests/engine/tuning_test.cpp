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

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// Of every operation of a stage that is said to be slow.
constexpr double slow_seconds = 1e4;

void tell_slow(Telemetry& telemetry, Stage stage) {
  telemetry.record(stage, {0, slow_seconds}, 1, -1);
}

class SlowSource : public TensorSource {
 public:
  SlowSource(const TestTensor& tensor, Telemetry* slow)
      : TensorSource(tensor.desc), inner_(block_source(tensor)), slow_(slow) {}
  void read(const Block& block, std::span<std::byte> into) override {
    inner_->read(block, into);
    if (slow_) tell_slow(*slow_, Stage::read);
  }

 private:
  std::unique_ptr<TensorSource> inner_;
  Telemetry* slow_;  ///< or null
};

// Is slow at merging: on the device, or of what it copies out. Whatever a plan had must be freed
// before it is prepared for the next one.
class SlowBackend : public FailingBackend {
 public:
  SlowBackend(Lane lane, int submissions)
      : FailingBackend(make_test_backend(2), lane, submissions) {}

  void prepare(const Plan& plan, Telemetry& telemetry) override {
    BOOST_TEST(pinned_ == 0);
    FailingBackend::prepare(plan, telemetry);
    telemetry_ = &telemetry;
  }
  std::shared_ptr<void> pin(std::span<std::byte>) override {
    ++pinned_;
    return {this, [this](void*) { --pinned_; }};
  }
  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    if (slow_device) tell_slow(*telemetry_, Stage::merge);
    return FailingBackend::merge(work, after);
  }
  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    if (slow_host) tell_slow(*telemetry_, Stage::merge);
    return FailingBackend::copy_out(copy, after);
  }

  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    if (slow_reads) tell_slow(*telemetry_, Stage::read);
    return FailingBackend::launch(std::move(work), after);
  }

  bool slow_device = false, slow_host = false, slow_reads = false;

 private:
  Telemetry* telemetry_ = nullptr;
  std::atomic<int> pinned_{0};
};

constexpr int never_fails = 1 << 30;

// What is slow, and what fails.
struct Disturbed {
  bool read = false, device_merge = false, host_merge = false;
  Lane lane = Lane::compute;
  int submissions = never_fails;
};

// By costs of which each is far too good, so that every rate is found to be another.
Tuning wrong_tuning(const Plan& plan) {
  Costs costs = builtin_costs(plan.request.device);
  for (double Costs::*rate : {&Costs::copy_in, &Costs::copy_out, &Costs::device_merge,
                              &Costs::merge, &Costs::read, &Costs::write, &Costs::rewrite})
    costs.*rate *= 1e6;
  for (KernelCost& kernel : costs.kernels) {
    kernel.flop_per_second *= 1e6;
    kernel.burst_flop_per_second *= 1e6;
    kernel.launch_seconds /= 1e6;
  }
  return {costs, InputKind::files, 0};
}

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

struct Case {
  TestInput input;
  Plan plan;
};

Case make_case(const Problem& problem, AccumulatorPlacement placement, ScheduleOrder order,
               std::mt19937_64& random) {
  PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(2), placement);
  request.device.merges = true;
  request.host_accumulators = placement != AccumulatorPlacement::device;
  request.device.tile = 1;
  request.chunks = 13;
  request.heads_per_group = 1;
  request.order = order;
  Plan plan = make_plan(request);
  BOOST_REQUIRE((plan.placement == placement));
  BOOST_REQUIRE((plan.order == order));
  return {random_input(problem, Layout::bshd, 2.0, random), plan};
}

Problem random_groups(std::mt19937_64& random) {
  Problem problem = random_problem(random, 150, 16, test_dim_step());
  problem.batch = 1 + static_cast<std::int64_t>(random() % 3);
  problem.kv_heads = 3 + static_cast<std::int64_t>(random() % 3);
  problem.query_heads = problem.kv_heads * (1 + static_cast<std::int64_t>(random() % 2));
  problem.query_length += 100;
  problem.key_length += 100;
  problem.queries_before = problem.queries_after = 0;
  return problem;
}

Case random_case(std::mt19937_64& random, AccumulatorPlacement placement, ScheduleOrder order) {
  return make_case(random_groups(random), placement, order, random);
}

// Token rows of six head groups, of which the host keeps about half: each group reads the others
// again, and a quorum's fit it beside the accumulators of all groups. Of the `keyless` ones the
// first half of the queries see no key.
Case half_cached_case(std::mt19937_64& random, AccumulatorPlacement placement,
                      bool keyless = false) {
  Problem problem = random_groups(random);
  problem.batch = 1 + static_cast<std::int64_t>(random() % 2);
  problem.dtype = DType::f32;
  problem.query_heads = problem.kv_heads = 6;
  problem.key_length = keyless ? 3 * problem.query_length / 4 : 3 * problem.query_length;
  if (keyless) problem.mask = Mask::causal;
  problem.head_dim = keyless ? 32 : 8;
  problem.scale = default_scale(problem.head_dim);
  Case own = make_case(problem, placement, ScheduleOrder::groups_outer, random);
  const double bytes = 4.0 * static_cast<double>((problem.query_length + 2 * problem.key_length) *
                                                 problem.query_heads * problem.head_dim);
  PlanRequest request = own.plan.request;
  request.scratch = false;
  request.host_budget = static_cast<std::int64_t>((keyless ? 0.87 : 0.6) * bytes);
  own.plan = make_plan(request);
  BOOST_REQUIRE((own.plan.placement == placement));
  return own;
}

Outcome check(const Case& own, const Disturbed& disturbed) {
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
    const Case own = half_cached_case(random, placement);
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
    const Case own = random_case(random, from, ScheduleOrder::groups_outer);
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
    const Case own = random_case(random, AccumulatorPlacement::memory, ScheduleOrder::groups_inner);
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
    const Case own = random_case(random, AccumulatorPlacement::device, ScheduleOrder::groups_outer);
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
  const Case own = random_case(random, AccumulatorPlacement::device, ScheduleOrder::groups_outer);
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
    const Case own = half_cached_case(random, AccumulatorPlacement::memory, trial % 3 == 0);
    const Outcome plain = run_plan(own.plan, own.input, *make_test_backend(2), false);
    const TestDirectory directory;
    DurableRuns runs(own.plan, own.input);
    std::vector<std::string> told;
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
    keyless_changed += trial % 3 == 0 && !result.planned_again.empty();
    changed_again += !result.planned_again.empty() && resumed > 0;
  }
  // Of a few trials, as slow tests make, any may end before it is stopped or changes over.
  BOOST_TEST(ended_early >= trials(24) / 2);
  BOOST_TEST(after_the_change >= trials(24) / 4);
  BOOST_TEST(changed_again >= trials(24) / 8);
  BOOST_TEST(keyless_changed >= trials(24) / 24);
}

BOOST_AUTO_TEST_CASE(accumulators_stay_where_a_checkpoint_can_be_made_and_has_room) {
  std::mt19937_64 random(47);
  const Case own = half_cached_case(random, AccumulatorPlacement::memory);
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
