// Master, mergers and workers that go on by another plan, against the first plan on one rank. Every
// rank runs this file.
#define BOOST_TEST_MODULE mpi_ranks_tuning
#include <boost/test/unit_test.hpp>
#include <filesystem>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "mpi/remote_inputs.hpp"
#include "on_ranks.hpp"
#include "stream_cqsa/error.hpp"
#include "support/durable_run.hpp"
#include "support/trials.hpp"
#include "support/tuned_run.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(MpiWorld);

namespace {

/// A stage that workers are slow at.
struct SlowAt {
  bool SlowBackend::*told;
  double Costs::*rate;
};
constexpr SlowAt reads{&SlowBackend::slow_reads, &Costs::read};
constexpr SlowAt device_merges{&SlowBackend::slow_device, &Costs::device_merge};

// Costs of every rank are far too good, but that all workers are known to be slow at that: what the
// first of them is found to do otherwise is reason enough for another plan.
Tuning wrong_tuning_of_all(const Plan& plan, int mergers, const SlowAt& slow) {
  Tuning tuning = wrong_tuning(plan);
  Costs worker = tuning.costs;
  worker.*slow.rate = 1 / slow_seconds;
  tuning.workers.assign(static_cast<std::size_t>(world().size() - 1 - mergers), worker);
  tuning.has_room = [](const Plan&) { return true; };
  return tuning;
}

/// Runs of one case on all ranks, which write the same outputs in turn.
class TunedRuns {
 public:
  TunedRuns(const TunedCase& own, int mergers, const SlowAt& slow)
      : own_(own), mergers_(mergers), slow_(slow), output_desc_(own.input.query.desc) {
    const Problem& problem = own.plan.problem();
    output_desc_.name = "o";
    output_desc_.dtype = problem.output_dtype;
    lse_desc_ = lse_desc(problem.batch, problem.query_heads, problem.query_length);
    part_.output.resize(static_cast<std::size_t>(output_desc_.bytes()));
    part_.lse.resize(static_cast<std::size_t>(lse_desc_.bytes()));
  }

  /// This rank's part of one. Throws, at rank 0, what the run does. `before_write` as of rank 0.
  void run(
      const MakeBackend& make_backend, const CheckpointOptions& checkpoint = {},
      const BeforeWrite& before_write = [](int) {}, bool through_master = false) {
    world().broadcast("");
    const Plan& plan = own_.plan;
    Telemetry telemetry;
    RunOptions options;
    options.scratch = std::filesystem::temp_directory_path();
    options.mergers = mergers_;
    options.checkpoint = checkpoint;
    const auto query = block_source(own_.input.query), key = block_source(own_.input.key),
               value = block_source(own_.input.value);
    const Inputs inputs{*query, *key, *value};
    const int rank = world().rank();
    if (rank > mergers_) {
      const auto backend = make_backend();
      std::optional<RemoteInputs> remote;
      if (through_master) {
        remote.emplace(own_.input.query.desc, own_.input.key.desc, own_.input.value.desc, world());
      }
      worker = run_worker(plan, {plan.request.device_budget, plan.request.host_budget},
                          remote ? remote->inputs() : inputs, *backend, options, telemetry, world(),
                          remote ? &*remote : nullptr);
      return;
    }
    WatchedSink output(make_memory_sink(output_desc_, part_.output), before_write);
    const auto lse = make_memory_sink(lse_desc_, part_.lse);
    const Outputs outputs{output, lse.get()};
    if (rank > 0) {
      merger = run_merger(
          plan, plan.request.host_budget, [&] { return outputs; }, options, telemetry, world());
      part_.result = merger.run;
      return;
    }
    options.tuning = wrong_tuning_of_all(plan, mergers_, slow_);
    options.tuning->has_memory = has_memory;
    options.warn = [&](const std::string& line) { told.push_back(line); };
    told.clear();
    master = run_master(
        plan, outputs, options, telemetry, world(), [] {}, through_master ? &inputs : nullptr);
    part_.result = master.run;
  }

  /// Collective: at rank 0 the last run's outputs are those of one rank, and so is what is told.
  void check() const {
    const Outcome all = together(part_, mergers_);
    if (world().rank() > 0) return;
    const Outcome alone = run_plan(own_.plan, own_.input, *make_cpu_backend({1}), true);
    BOOST_TEST((all.output == alone.output));
    BOOST_TEST((all.lse == alone.lse));
    BOOST_TEST(all.result.merged_scores == expected_scores(own_.plan));
    std::int64_t done = 0;
    for (const PlannedAgain& again : again_of()) {
      BOOST_TEST(again.plan.groups_done > done);
      done = again.plan.groups_done;
    }
    BOOST_REQUIRE(told.size() == again_of().size());
    for (std::size_t i = 0; i < told.size(); ++i) BOOST_TEST(told[i] == describe(again_of()[i]));
  }

  const std::vector<PlannedAgain>& again_of() const { return master.run.planned_again; }

  MasterResult master;
  WorkerResult worker;
  MergerResult merger;
  std::vector<std::string> told;
  /// Of the next run, see Tuning.
  std::function<bool(const Plan&, const WorkersSoFar&)> has_memory;

 private:
  const TunedCase& own_;
  const int mergers_;
  const SlowAt slow_;
  TensorDesc output_desc_, lse_desc_;
  Outcome part_;
};

// Calls `test(mergers)` for every number of mergers, none included, that leaves a worker.
template <typename Test>
void for_mergers(const Test& test) {
  for (int mergers = 0; mergers <= 2 && mergers + 2 <= world().size(); ++mergers) {
    BOOST_TEST_CONTEXT(mergers << " mergers, " << world().size() << " ranks") { test(mergers); }
  }
}

MakeBackend slow_workers(const SlowAt& slow, Lane lane = Lane::compute,
                         int submissions = never_fails) {
  return [=] {
    auto backend = std::make_unique<SlowBackend>(lane, submissions);
    (*backend).*slow.told = true;
    return backend;
  };
}

// Head groups enough that no number of workers here has them all before one of them is computed.
TunedCase many_groups(std::mt19937_64& random, AccumulatorPlacement placement) {
  Problem problem = random_groups(random);
  problem.batch = 3;
  problem.query_heads = problem.kv_heads = 5;
  return make_case(problem, placement, ScheduleOrder::groups_outer, random);
}

}  // namespace

BOOST_AUTO_TEST_CASE(accumulators_move_to_the_ranks_that_merge_with_the_same_bytes) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(51);
    for (int trial = 0; trial < trials(3); ++trial) {
      const TunedCase own = many_groups(random, AccumulatorPlacement::device);
      TunedRuns runs(own, mergers, device_merges);
      runs.run(slow_workers(device_merges));
      BOOST_TEST_CONTEXT("trial " << trial) { runs.check(); }
      BOOST_TEST(runs.worker.failure == "");
      if (world().rank() > 0) continue;
      BOOST_REQUIRE(!runs.again_of().empty());
      const Plan& again = runs.again_of().front().plan;
      BOOST_TEST((again.placement != AccumulatorPlacement::device));
    }
  });
}

BOOST_AUTO_TEST_CASE(slow_reads_of_workers_are_made_once_for_all_head_groups) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(52);
    for (int trial = 0; trial < trials(3); ++trial) {
      const bool through_master = trial % 2 == 1;
      const TunedCase own = half_cached_case(random, AccumulatorPlacement::memory);
      TunedRuns runs(own, mergers, reads);
      runs.run(
          slow_workers(reads), {}, [](int) {}, through_master);
      BOOST_TEST_CONTEXT("trial " << trial) { runs.check(); }
      BOOST_TEST(runs.worker.failure == "");
      if (world().rank() > 0) continue;
      BOOST_REQUIRE(!runs.again_of().empty());
      // With accumulators on the device the host may cache more: then no row is read twice either.
      const Plan& again = runs.again_of().front().plan;
      BOOST_TEST((again.order == ScheduleOrder::groups_inner ||
                  again.placement == AccumulatorPlacement::device));
    }
  });
}

BOOST_AUTO_TEST_CASE(a_worker_that_fails_before_or_after_the_change_is_replaced) {
  for_mergers([](int mergers) {
    const int workers = world().size() - 1 - mergers;
    if (workers < 2) return;
    std::mt19937_64 random(53);
    for (int trial = 0; trial < trials(4); ++trial) {
      const TunedCase own = trial % 2 ? many_groups(random, AccumulatorPlacement::device)
                                      : half_cached_case(random, AccumulatorPlacement::memory);
      const SlowAt slow = trial % 2 ? device_merges : reads;
      const int failing = world().size() - 1 - trial % workers;
      const int after = static_cast<int>(random() % 100);
      TunedRuns runs(own, mergers, slow);
      runs.run(slow_workers(slow, static_cast<Lane>(trial % lane_count),
                            world().rank() == failing ? after : never_fails));
      BOOST_TEST_CONTEXT("trial " << trial) { runs.check(); }
      if (world().rank() != failing) BOOST_TEST(runs.worker.failure == "");
      BOOST_TEST((world().rank() > 0 || !runs.again_of().empty()));
    }
  });
}

// Every run begins by the first plan, whichever the one before was ended by.
BOOST_AUTO_TEST_CASE(a_run_on_ranks_that_has_changed_over_is_continued_from_its_checkpoint) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(54);
    int ended_early = 0, after_the_change = 0;
    for (int trial = 0; trial < trials(6); ++trial) {
      const TunedCase own = half_cached_case(random, AccumulatorPlacement::memory, trial % 3 == 0);
      std::optional<TestDirectory> made;
      if (world().rank() == 0) made.emplace();
      const std::filesystem::path all =
          world().broadcast(world().rank() == 0 ? made->path().string() : "");
      TunedRuns runs(own, mergers, reads);
      int resumed = 0;
      StopRequest stop;
      CheckpointOptions checkpoint;
      checkpoint.directory = all / std::to_string(world().rank());
      std::filesystem::create_directory(checkpoint.directory);
      checkpoint.identity = 7;
      checkpoint.interval = random() % 2 ? 1e-3 : 60;
      if (world().rank() == 0) checkpoint.stop = &stop;
      checkpoint.resumed = [&](const Resumed& found) {
        ++resumed;
        BOOST_TEST(!found.is_damaged());
      };
      const auto end_early = [&](const MakeBackend& make_backend, const BeforeWrite& before_write) {
        resumed = 0;
        try {
          runs.run(make_backend, checkpoint, before_write);
        } catch (const Error&) {
          ++ended_early;
          after_the_change += !runs.told.empty();
        }
        BOOST_TEST(resumed <= 1);
        stop.stop = false;
      };
      const int stopping = static_cast<int>(random() % 40);
      end_early(slow_workers(reads),
                [&](int written) { stop.stop = stop.stop || written == stopping; });
      end_early(slow_workers(reads, Lane::compute, static_cast<int>(random() % 60)), [](int) {});
      runs.run(slow_workers(reads), checkpoint);
      BOOST_TEST_CONTEXT("trial " << trial) { runs.check(); }
      world().broadcast("");  // only now may the directory go
    }
    if (world().rank() > 0) return;
    BOOST_TEST(ended_early >= trials(6) / 3);
    BOOST_TEST(after_the_change >= trials(6) / 9);
  });
}

// Without a mask all subproblems have as many scores.
BOOST_AUTO_TEST_CASE(workers_tell_what_they_have_done_and_their_memory_is_asked_about) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(56);
    for (const bool has_memory : {true, false}) {
      constexpr std::int64_t queries = 130;
      const TunedCase own = half_cached_case(random, AccumulatorPlacement::memory, false, queries);
      const std::int64_t quorums = own.plan.division.quorum_count();
      TunedRuns runs(own, mergers, reads);
      int asked = 0;
      runs.has_memory = [&](const Plan&, const WorkersSoFar& workers) {
        ++asked;
        std::int64_t subproblems = 0;
        BOOST_TEST(std::ssize(workers) == world().size() - 1 - mergers);
        for (const auto& worker : workers) {
          BOOST_REQUIRE(worker.has_value());
          subproblems += worker->subproblems;
          BOOST_TEST(static_cast<std::int64_t>(worker->scores) * quorums ==
                     worker->subproblems * queries * 3 * queries);
          BOOST_TEST(worker->totals[static_cast<std::size_t>(Stage::compute)].operations >=
                     worker->subproblems);
        }
        BOOST_TEST(subproblems > 0);
        return has_memory;
      };
      runs.run(slow_workers(reads));
      runs.check();
      if (world().rank() > 0) continue;
      BOOST_TEST(asked > 0);
      BOOST_TEST(runs.again_of().empty() == !has_memory);
    }
  });
}

BOOST_AUTO_TEST_CASE(a_plan_that_other_ranks_have_no_room_for_is_not_taken) {
  std::mt19937_64 random(55);
  const TunedCase own = many_groups(random, AccumulatorPlacement::device);
  Tuning tuning = wrong_tuning(own.plan);
  tuning.workers.assign(static_cast<std::size_t>(world().size() - 1), tuning.costs);
  RunSoFar slow;
  slow.totals[static_cast<std::size_t>(Stage::merge)] = {slow_seconds, 1, 1};
  const WorkersSoFar all(tuning.workers.size(), slow);
  const auto ask = [&](const PlanFilter& may_take, const WorkersSoFar& workers) {
    return Tuner(tuning).ask(own.plan, {}, 3, 0, may_take, workers).has_value();
  };
  BOOST_TEST(ask(nullptr, all));
  BOOST_TEST(!ask([](const Plan&) { return false; }, all));
  // Rates of a worker that takes no part any more are no reason.
  WorkersSoFar others(tuning.workers.size(), RunSoFar{});
  BOOST_TEST(!ask(nullptr, others));
  others.front() = slow;
  if (others.size() > 1) {
    others.front().reset();
    BOOST_TEST(!ask(nullptr, others));
  }
}
