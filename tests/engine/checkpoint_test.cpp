#define BOOST_TEST_MODULE engine_checkpoint
#include <boost/test/unit_test.hpp>
#include <chrono>
#include <random>
#include <thread>

#include "support/delayed_backend.hpp"
#include "support/durable_run.hpp"
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

Case random_case(std::mt19937_64& random) {
  const Problem problem = random_problem(random, 90, 16, test_dim_step());
  TestInput input = random_input(problem, random() % 2 ? Layout::bshd : Layout::bhsd, 2, random);
  PlanRequest request = roomy_request(problem, input.query.desc.layout, *make_test_backend(1));
  request.device.tile = 1;
  request.lse = random() % 2;
  request.host_accumulators = true;
  random_division(request, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}, random);
  request.heads_per_group = 1;
  const Plan plan = make_plan(request);
  return {std::move(input), random() % 2 ? with_accumulators_in_a_file(plan) : plan};
}

RunOptions options_in(const std::filesystem::path& directory, StopRequest* stop,
                      std::mt19937_64& random) {
  RunOptions options;
  options.merge_threads = 1 + static_cast<int>(random() % 3);
  options.write_threads = 1 + static_cast<int>(random() % 3);
  options.goes_direct = [direct = random() % 2 == 0](std::int64_t) { return direct; };
  options.checkpoint.directory = directory;
  options.checkpoint.identity = 7;
  options.checkpoint.interval = random() % 2 ? 0.001 : 60;
  options.checkpoint.stop = stop;
  return options;
}

std::unique_ptr<Backend> delayed_backend(std::mt19937_64& random) {
  return std::make_unique<DelayedBackend>(make_test_backend(2), random());
}

// Stops the run at one of its launches, if it comes to that; tells whether it was stopped.
bool run_or_hold(DurableRuns& runs, const Plan& plan, const std::filesystem::path& directory,
                 std::mt19937_64& random) {
  StopRequest stop;
  const std::int64_t launch = static_cast<std::int64_t>(random() % 1000) % plan.subproblem_count();
  HoldingBackend backend(make_test_backend(2), stop, launch);
  try {
    runs.run(backend, options_in(directory, &stop, random));
  } catch (const Stopped&) {
    return true;
  }
  return false;
}

// Stops the run, perhaps, some time after it began; tells whether it was stopped.
bool run_or_stop(DurableRuns& runs, const std::filesystem::path& directory,
                 std::mt19937_64& random) {
  StopRequest stop;
  const std::chrono::microseconds pause(random() % 20000);
  std::thread stopper([&] {
    std::this_thread::sleep_for(pause);
    ++stop.checkpoints;
    std::this_thread::sleep_for(pause / 4);
    stop.stop = true;
  });
  bool stopped = false;
  try {
    runs.run(*delayed_backend(random), options_in(directory, &stop, random));
  } catch (const Stopped& thrown) {
    stopped = true;
    BOOST_TEST(thrown.merged() >= 0.0);
    BOOST_TEST(thrown.merged() <= 1.0);
  }
  stopper.join();
  BOOST_TEST(!stop.watched);
  return stopped;
}

}  // namespace

BOOST_AUTO_TEST_CASE(stopped_anywhere_and_continued_gives_the_same_bytes) {
  std::mt19937_64 random(11);
  int stops = 0;
  for (int trial = 0; trial < trials(60); ++trial) {
    const Case tried = random_case(random);
    DurableRuns undisturbed(tried.plan, tried.input);
    RunOptions plain;
    plain.scratch = std::filesystem::temp_directory_path();
    const RunResult expected = undisturbed.run(*make_test_backend(2), plain);

    const TestDirectory directory;
    DurableRuns runs(tried.plan, tried.input);
    for (int i = 0; i < 2; ++i) {
      if (i == 0 ? run_or_hold(runs, tried.plan, directory.path(), random)
                 : run_or_stop(runs, directory.path(), random)) {
        ++stops;
      }
    }
    const RunResult result =
        runs.run(*delayed_backend(random), options_in(directory.path(), nullptr, random));
    BOOST_TEST((runs.output == undisturbed.output));
    BOOST_TEST((runs.lse == undisturbed.lse));
    BOOST_TEST((result.output == expected.output));
    BOOST_TEST(!result.checkpoint.resumed.is_damaged());
  }
  BOOST_TEST(stops > trials(20));
}

BOOST_AUTO_TEST_CASE(a_finished_run_is_not_computed_again) {
  std::mt19937_64 random(12);
  const Case tried = random_case(random);
  const TestDirectory directory;
  DurableRuns runs(tried.plan, tried.input);
  runs.run(*make_test_backend(2), options_in(directory.path(), nullptr, random));
  const auto output = runs.output;
  const RunResult again =
      runs.run(*make_test_backend(2), options_in(directory.path(), nullptr, random),
               [](int) { BOOST_ERROR("a finished piece is written again"); });
  BOOST_TEST(again.scores_computed == 0);
  BOOST_TEST((runs.output == output));
}

BOOST_AUTO_TEST_CASE(what_is_durable_is_not_computed_again) {
  std::mt19937_64 random(13);
  std::uint64_t first = 0, second = 0, undisturbed = 0;
  for (int trial = 0; trial < trials(10); ++trial) {
    const Case tried = random_case(random);
    const TestDirectory directory;
    DurableRuns runs(tried.plan, tried.input);
    if (!run_or_hold(runs, tried.plan, directory.path(), random)) continue;
    const RunResult rest =
        runs.run(*make_test_backend(2), options_in(directory.path(), nullptr, random));
    RunOptions plain;
    plain.scratch = std::filesystem::temp_directory_path();
    undisturbed += runs.run(*make_test_backend(2), plain).scores_computed;
    first += rest.checkpoint.resumed.scores;
    second += rest.scores_computed;
  }
  BOOST_TEST(first > 0u);
  BOOST_TEST(second < undisturbed);
}

BOOST_AUTO_TEST_CASE(a_checkpoint_of_another_run_is_refused) {
  std::mt19937_64 random(14);
  const Case tried = random_case(random);
  const TestDirectory directory;
  DurableRuns runs(tried.plan, tried.input);
  RunOptions options = options_in(directory.path(), nullptr, random);
  runs.run(*make_test_backend(1), options);
  options.checkpoint.identity = 8;
  BOOST_CHECK_THROW(runs.run(*make_test_backend(1), options), InputError);
}

BOOST_AUTO_TEST_CASE(a_failing_device_leaves_what_was_durable) {
  std::mt19937_64 random(15);
  for (int trial = 0; trial < trials(10); ++trial) {
    const Case tried = random_case(random);
    DurableRuns undisturbed(tried.plan, tried.input);
    RunOptions plain;
    plain.scratch = std::filesystem::temp_directory_path();
    undisturbed.run(*make_test_backend(2), plain);
    const TestDirectory directory;
    DurableRuns runs(tried.plan, tried.input);
    RunOptions options = options_in(directory.path(), nullptr, random);
    options.checkpoint.interval = 0.001;
    try {
      FailingBackend failing(make_test_backend(2), Lane::compute, static_cast<int>(random() % 12));
      runs.run(failing, options);
    } catch (const Error&) {
    }
    runs.run(*make_test_backend(2), options);
    BOOST_TEST((runs.output == undisturbed.output));
    BOOST_TEST((runs.lse == undisturbed.lse));
  }
}
