// Master, mergers and workers against the same plan on one rank: the same bytes. Every rank runs
// this file.
#define BOOST_TEST_MODULE mpi_ranks
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <chrono>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <thread>

#include "engine/merge_shares.hpp"
#include "mpi/communicator.hpp"
#include "mpi/environment.hpp"
#include "mpi/master.hpp"
#include "mpi/merger.hpp"
#include "mpi/worker.hpp"
#include "stream_cqsa/error.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"
#include "support/durable_run.hpp"
#include "support/run_plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

struct Mpi {
  Mpi()
      : environment(boost::unit_test::framework::master_test_suite().argc,
                    boost::unit_test::framework::master_test_suite().argv) {
    communicator.emplace();
  }
  ~Mpi() { communicator.reset(); }
  MpiEnvironment environment;
  static inline std::optional<Communicator> communicator;
};
BOOST_TEST_GLOBAL_FIXTURE(Mpi);

Communicator& world() { return *Mpi::communicator; }

/// What all ranks do alike, from the same seed.
struct Case {
  Problem problem;
  Layout layout = Layout::bshd;
  Plan plan;
  TestInput input;
};

Case random_case(std::mt19937_64& random, AccumulatorPlacement placement, int mergers = 0) {
  const Problem problem = random_problem(random, 150, 24, 1);
  const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
  const auto backend = make_cpu_backend({1});
  const bool by_groups = placement == AccumulatorPlacement::device;
  PlanRequest request = roomy_request(problem, layout, *backend,
                                      by_groups ? placement : AccumulatorPlacement::memory);
  request.chunks = std::array<std::int64_t, 7>{1, 2, 3, 7, 12, 13, 31}[random() % 7];
  request.mergers = mergers;
  // For one worker any number of head groups may be merged on the device.
  request.workers = by_groups ? 1 : world().size() - 1 - mergers;
  if (random() % 2) request.heads_per_group = 1;
  Plan plan = make_plan(request);
  if (placement == AccumulatorPlacement::file) plan = with_accumulators_in_a_file(plan);
  BOOST_REQUIRE((plan.placement == placement));
  return {problem, layout, plan, random_input(problem, layout, 2.0, random)};
}

AccumulatorPlacement placement_of(std::uint64_t trial) {
  return std::array{AccumulatorPlacement::memory, AccumulatorPlacement::device,
                    AccumulatorPlacement::file}[trial % 3];
}

using MakeBackend = std::function<std::unique_ptr<Backend>()>;
using OpenSource = std::function<std::unique_ptr<TensorSource>(const TestTensor&)>;

/// Called before a rank writes to O for the nth time, from 0 on.
using BeforeWrite = std::function<void(int)>;

/// The part of a rank that merges: the rows that it merges are in the outcome.
Outcome merge_on_rank(const Case& own, const RunOptions& options, Telemetry& telemetry,
                      MasterResult& master, MergerResult& merger, const BeforeWrite& before_write,
                      const OpenSource& through_master) {
  const Plan& plan = own.plan;
  Outcome outcome;
  TensorDesc desc = own.input.query.desc;
  desc.name = "o";
  desc.dtype = own.problem.output_dtype;
  outcome.output.resize(static_cast<std::size_t>(desc.bytes()));
  const TensorDesc lse =
      lse_desc(own.problem.batch, own.problem.query_heads, own.problem.query_length);
  outcome.lse.resize(static_cast<std::size_t>(lse.bytes()));
  WatchedSink output_sink(make_memory_sink(desc, outcome.output), before_write);
  const auto lse_sink = make_memory_sink(lse, outcome.lse);
  const Outputs outputs{output_sink, lse_sink.get()};
  const std::int64_t budget = plan.request.host_budget;
  if (world().rank() == 0) {
    const int workers = world().size() - 1 - options.mergers;
    const MergeShares shares(plan, options.mergers);
    const auto run = [&](const Inputs* served) {
      master = run_master(
          merger_plan(plan, workers, shares.chunks(0), budget, served != nullptr), outputs, options,
          telemetry, world(), [] {}, served);
    };
    if (through_master) {
      const auto query = through_master(own.input.query), key = through_master(own.input.key),
                 value = through_master(own.input.value);
      const Inputs inputs{*query, *key, *value};
      run(&inputs);
    } else {
      run(nullptr);
    }
    outcome.result = master.run;
  } else {
    merger = run_merger(
        plan, budget, [&] { return outputs; }, options, telemetry, world());
    outcome.result = merger.run;
  }
  BOOST_TEST(outcome.result.host_bytes <= budget);
  return outcome;
}

/// This rank's part of a distributed run.
Outcome run_on_ranks(
    const Case& own, const MakeBackend& make_backend, MasterResult& master, WorkerResult& worker,
    int mergers = 0, MergerResult* merger = nullptr, const BeforeWrite& before_write = [](int) {},
    const OpenSource& through_master = nullptr) {
  // Rank 0 has ended the run before this one, and would take a message of this one for one of it.
  world().broadcast("");
  const Plan& plan = own.plan;
  Telemetry telemetry;
  RunOptions options;
  options.scratch = std::filesystem::temp_directory_path();
  options.mergers = mergers;
  MergerResult unseen;
  if (world().rank() <= mergers) {
    return merge_on_rank(own, options, telemetry, master, merger ? *merger : unseen, before_write,
                         through_master);
  }
  const auto backend = make_backend();
  const WorkerBudgets budgets{plan.request.device_budget, plan.request.host_budget};
  if (through_master) {
    RemoteInputs remote(own.input.query.desc, own.input.key.desc, own.input.value.desc, world());
    worker =
        run_worker(plan, budgets, remote.inputs(), *backend, options, telemetry, world(), &remote);
    return {};
  }
  const auto query = block_source(own.input.query), key = block_source(own.input.key),
             value = block_source(own.input.value);
  worker = run_worker(plan, budgets, {*query, *key, *value}, *backend, options, telemetry, world());
  return {};
}

/// The parts of all ranks that merged, which share no byte, at rank 0.
Outcome together(const Outcome& part, int mergers) {
  const auto text = [](const auto& values) {
    return std::string(reinterpret_cast<const char*>(values.data()),
                       values.size() * sizeof values[0]);
  };
  const auto outputs = world().gather(text(part.output)), lses = world().gather(text(part.lse)),
             scores = world().gather(text(part.result.merged_scores)),
             nans = world().gather(std::to_string(part.result.output.nan));
  Outcome all = part;
  if (world().rank() > 0) return all;
  const auto add = [](std::vector<std::byte>& to, const std::string& from) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] |= static_cast<std::byte>(from.at(i));
  };
  for (int rank = 1; rank <= mergers; ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    add(all.output, outputs[at]);
    add(all.lse, lses[at]);
    std::vector<std::uint64_t> own(scores[at].size() / sizeof(std::uint64_t));
    std::memcpy(own.data(), scores[at].data(), scores[at].size());
    for (std::size_t i = 0; i < own.size(); ++i) all.result.merged_scores.at(i) += own[i];
    all.result.output.nan += std::stoll(nans[at]);
  }
  return all;
}

void check_same_bytes(const Case& own, const Outcome& outcome) {
  const auto backend = make_cpu_backend({1});
  Plan plan = own.plan;
  if (plan.request.mergers > 0) {
    // The same division for one rank, which needs all accumulators.
    PlanRequest request = roomy_request(own.problem, own.layout, *backend);
    request.chunks = plan.request.chunks;
    request.heads_per_group = plan.request.heads_per_group;
    plan = make_plan(request);
    BOOST_TEST(plan.groups.size() == own.plan.groups.size());
  }
  const Outcome alone = run_plan(plan, own.input, *backend, true);
  BOOST_TEST(outcome.output == alone.output);
  BOOST_TEST(outcome.lse == alone.lse);
  BOOST_TEST(outcome.result.merged_scores == expected_scores(own.plan));
  if (!computes_by_groups(own.plan))
    BOOST_TEST(outcome.result.output.nan == alone.result.output.nan);
}

/// Reads late, at random, and fails at the reads from `fails_from` up to before `fails_to`, counted
/// over all tensors.
class TroubledSource : public TensorSource {
 public:
  struct Trouble {
    int fails_from = std::numeric_limits<int>::max();
    int fails_to = std::numeric_limits<int>::max();
    std::atomic<std::uint64_t> reads{0};
  };
  TroubledSource(const TestTensor& tensor, Trouble& trouble)
      : TensorSource(tensor.desc), inner_(block_source(tensor)), trouble_(trouble) {}

  void read(const Block& block, std::span<std::byte> into) override {
    const std::uint64_t read = trouble_.reads++;
    const std::uint64_t draw = std::mt19937_64(read)();
    if (draw % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(draw / 3 % 900));
    const auto number = static_cast<int>(read);
    if (number >= trouble_.fails_from && number < trouble_.fails_to)
      throw Error("q.npy: injected failure");
    inner_->read(block, into);
  }

 private:
  std::unique_ptr<TensorSource> inner_;
  Trouble& trouble_;
};

OpenSource open_with(TroubledSource::Trouble& trouble) {
  return
      [&](const TestTensor& tensor) { return std::make_unique<TroubledSource>(tensor, trouble); };
}

std::unique_ptr<Backend> delayed_backend(int trial) {
  return std::make_unique<DelayedBackend>(make_cpu_backend({1}),
                                          static_cast<std::uint64_t>(100 * trial + world().rank()));
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

BOOST_AUTO_TEST_CASE(bytes_do_not_depend_on_ranks_and_timing) {
  std::mt19937_64 random(11);
  for (int trial = 0; trial < 40; ++trial) {
    const Case own = random_case(random, placement_of(static_cast<std::uint64_t>(trial)));
    const auto seed = static_cast<std::uint64_t>(100 * trial + world().rank());
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own, [&] { return std::make_unique<DelayedBackend>(make_cpu_backend({1}), seed); }, master,
        worker);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (world().rank() == 0) check_same_bytes(own, outcome);
      BOOST_TEST(worker.failure == "");
    }
  }
}

BOOST_AUTO_TEST_CASE(little_memory_at_the_master_is_enough) {
  std::mt19937_64 random(12);
  for (int trial = 0; trial < 20; ++trial) {
    Case own = random_case(random, AccumulatorPlacement::memory);
    // Not even the partials of one subproblem may come early.
    own.plan.host.state_buffers = 2;
    own.plan.request.host_budget = own.plan.host.bytes();
    MasterResult master;
    WorkerResult worker;
    const auto seed = static_cast<std::uint64_t>(100 * trial + world().rank());
    const Outcome outcome = run_on_ranks(
        own, [&] { return std::make_unique<DelayedBackend>(make_cpu_backend({1}), seed); }, master,
        worker);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (world().rank() == 0) check_same_bytes(own, outcome);
    }
  }
}

BOOST_AUTO_TEST_CASE(a_worker_that_fails_is_replaced_by_the_others) {
  if (world().size() < 3) return;
  std::mt19937_64 random(13);
  for (int trial = 0; trial < 20; ++trial) {
    const Case own = random_case(random, placement_of(static_cast<std::uint64_t>(trial)));
    const int failing = 1 + trial % (world().size() - 1);
    const auto lane = static_cast<Lane>(trial % lane_count);
    const int after = static_cast<int>(random() % 6);
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own,
        [&]() -> std::unique_ptr<Backend> {
          if (world().rank() == failing)
            return std::make_unique<FailingBackend>(make_cpu_backend({1}), lane, after);
          return std::make_unique<DelayedBackend>(make_cpu_backend({1}), 1);
        },
        master, worker);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (world().rank() == 0) check_same_bytes(own, outcome);
      if (world().rank() != failing) BOOST_TEST(worker.failure == "");
    }
  }
}

BOOST_AUTO_TEST_CASE(when_every_worker_fails_the_run_says_so) {
  std::mt19937_64 random(14);
  const Case own = random_case(random, AccumulatorPlacement::memory);
  MasterResult master;
  WorkerResult worker;
  const auto run = [&] {
    run_on_ranks(
        own,
        [] { return std::make_unique<FailingBackend>(make_cpu_backend({1}), Lane::compute, 0); },
        master, worker);
  };
  if (world().rank() > 0) return run();
  BOOST_CHECK_EXCEPTION(run(), Error, [](const Error& error) {
    return std::string(error.what()).find("no worker is left") != std::string::npos &&
           std::string(error.what()).find("injected failure") != std::string::npos;
  });
}

namespace {

// Calls `test(mergers)` for every number of mergers that leaves a worker.
template <typename Test>
void for_mergers(const Test& test) {
  for (int mergers = 1; mergers <= 3 && mergers + 2 <= world().size(); ++mergers) {
    BOOST_TEST_CONTEXT(mergers << " mergers, " << world().size() << " ranks") { test(mergers); }
  }
}

// Runs a case with mergers and delayed workers, and compares with one rank.
void check_with_mergers(const Case& own, int mergers, std::uint64_t seed) {
  MasterResult master;
  WorkerResult worker;
  MergerResult merger;
  const Outcome part = run_on_ranks(
      own,
      [&] {
        const auto delays = 100 * seed + static_cast<std::uint64_t>(world().rank());
        return std::make_unique<DelayedBackend>(make_cpu_backend({1}), delays);
      },
      master, worker, mergers, &merger);
  const Outcome all = together(part, mergers);
  BOOST_TEST_CONTEXT("seed " << seed << ", c " << own.plan.division.chunk_count()) {
    if (world().rank() == 0) check_same_bytes(own, all);
    BOOST_TEST(worker.failure == "");
    BOOST_TEST(merger.failure == "");
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(bytes_do_not_depend_on_mergers) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(15);
    for (std::uint64_t trial = 0; trial < 24; ++trial) {
      // Planned for so many mergers, or for none.
      check_with_mergers(random_case(random, placement_of(trial), trial % 2 ? mergers : 0), mergers,
                         trial);
    }
  });
}

BOOST_AUTO_TEST_CASE(little_memory_at_mergers_is_enough) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(16);
    for (std::uint64_t trial = 0; trial < 16; ++trial) {
      Case own = random_case(random, AccumulatorPlacement::memory, mergers);
      own.plan.host.state_buffers = 2;
      own.plan.host.output_buffers = 1;
      own.plan.request.host_budget = own.plan.host.bytes();
      check_with_mergers(own, mergers, trial);
    }
  });
}

BOOST_AUTO_TEST_CASE(a_worker_that_fails_is_replaced_where_several_ranks_merge) {
  for_mergers([](int mergers) {
    const int workers = world().size() - 1 - mergers;
    if (workers < 2) return;
    std::mt19937_64 random(17);
    for (int trial = 0; trial < 16; ++trial) {
      Case own = random_case(random, placement_of(static_cast<std::uint64_t>(trial)), mergers);
      if (trial % 2 && own.plan.placement == AccumulatorPlacement::memory) {
        own.plan.host.state_buffers = 2;
        own.plan.request.host_budget = own.plan.host.bytes();
      }
      const int failing = 1 + mergers + trial % workers;
      const auto lane = static_cast<Lane>(trial % lane_count);
      const int after = static_cast<int>(random() % 6);
      MasterResult master;
      WorkerResult worker;
      const Outcome part = run_on_ranks(
          own,
          [&]() -> std::unique_ptr<Backend> {
            if (world().rank() == failing)
              return std::make_unique<FailingBackend>(make_cpu_backend({1}), lane, after);
            return std::make_unique<DelayedBackend>(make_cpu_backend({1}), 1);
          },
          master, worker, mergers);
      const Outcome all = together(part, mergers);
      BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
        if (world().rank() == 0) check_same_bytes(own, all);
        if (world().rank() != failing) BOOST_TEST(worker.failure == "");
      }
    }
  });
}

BOOST_AUTO_TEST_CASE(a_merger_that_fails_ends_the_run_with_its_rank_and_reason) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(18);
    for (int trial = 0; trial < 6; ++trial) {
      Case own = random_case(random, AccumulatorPlacement::memory, mergers);
      while (own.plan.division.chunk_count() < 7)
        own = random_case(random, AccumulatorPlacement::memory, mergers);
      const int failing = 1 + trial % mergers;
      MasterResult master;
      WorkerResult worker;
      MergerResult merger;
      const auto run = [&] {
        run_on_ranks(
            own, [] { return std::make_unique<DelayedBackend>(make_cpu_backend({1}), 1); }, master,
            worker, mergers, &merger,
            [&](int) {
              if (world().rank() == failing) throw Error("the disk is full");
            });
      };
      const bool writes = !MergeShares(own.plan, mergers).chunks(failing).empty();
      if (world().rank() > 0 || !writes) {
        run();
        BOOST_TEST(merger.failure ==
                   (world().rank() == failing && writes ? "the disk is full" : ""));
        continue;
      }
      BOOST_CHECK_EXCEPTION(run(), Error, [&](const Error& error) {
        return error.what() == "rank " + std::to_string(failing) + ": the disk is full";
      });
    }
  });
}

BOOST_AUTO_TEST_CASE(a_merger_with_too_little_memory_ends_the_run_before_it_begins) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(19);
    Case own = random_case(random, AccumulatorPlacement::memory, mergers);
    if (world().rank() == mergers) own.plan.request.host_budget = 1;
    MasterResult master;
    WorkerResult worker;
    MergerResult merger;
    const auto run = [&] {
      run_on_ranks(
          own, [] { return make_cpu_backend({1}); }, master, worker, mergers, &merger);
    };
    if (world().rank() > 0) return run();
    BOOST_CHECK_EXCEPTION(run(), InputError, [&](const InputError& error) {
      const std::string text = error.what();
      return text.find("rank " + std::to_string(mergers) + ": host memory") == 0;
    });
  });
}

BOOST_AUTO_TEST_CASE(inputs_through_the_master_give_the_same_bytes) {
  std::mt19937_64 random(15);
  for (int trial = 0; trial < 30; ++trial) {
    Case own = random_case(random, placement_of(static_cast<std::uint64_t>(trial)));
    if (trial % 3 == 0) {
      // No room for more than the fewest blocks and partials on their way.
      own.plan.host.state_buffers = 2;
      own.plan.request.host_budget = own.plan.host.bytes();
    }
    TroubledSource::Trouble trouble;
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own, [&] { return delayed_backend(trial); }, master, worker, 0, nullptr, [](int) {},
        open_with(trouble));
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      BOOST_TEST(worker.failure == "");
      if (world().rank() > 0) continue;
      check_same_bytes(own, outcome);
      BOOST_TEST(master.served.buffers >= 1);
      BOOST_TEST(master.served.blocks > 0);
      BOOST_TEST(outcome.result.host_bytes <= own.plan.request.host_budget);
    }
  }
}

BOOST_AUTO_TEST_CASE(a_read_that_fails_at_the_master_ends_the_worker_that_asked) {
  if (world().size() < 3) return;
  std::mt19937_64 random(16);
  for (int trial = 0; trial < 20; ++trial) {
    const Case own = random_case(random, AccumulatorPlacement::memory);
    TroubledSource::Trouble trouble;
    trouble.fails_from = trial % 5;
    trouble.fails_to = trouble.fails_from + 1;
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own, [&] { return delayed_backend(trial); }, master, worker, 0, nullptr, [](int) {},
        open_with(trouble));
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (worker.failure != "") {
        BOOST_TEST(worker.failure ==
                   "rank 0 could not read for this rank: q.npy: injected failure");
      }
      if (world().rank() > 0) continue;
      check_same_bytes(own, outcome);
      const auto failed = [](const std::string& failure) { return !failure.empty(); };
      BOOST_TEST(std::count_if(master.failures.begin(), master.failures.end(), failed) <= 1);
    }
  }
}

BOOST_AUTO_TEST_CASE(workers_that_fail_do_not_keep_the_buffers_of_the_master) {
  if (world().size() < 3) return;
  std::mt19937_64 random(17);
  for (int trial = 0; trial < 20; ++trial) {
    const Case own = random_case(random, AccumulatorPlacement::memory);
    const int failing = 1 + trial % (world().size() - 1);
    const auto lane = static_cast<Lane>(trial % lane_count);
    const int after = static_cast<int>(random() % 6);
    TroubledSource::Trouble trouble;
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own,
        [&]() -> std::unique_ptr<Backend> {
          if (world().rank() != failing) return delayed_backend(trial);
          return std::make_unique<FailingBackend>(make_cpu_backend({1}), lane, after);
        },
        master, worker, 0, nullptr, [](int) {}, open_with(trouble));
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (world().rank() == 0) check_same_bytes(own, outcome);
      if (world().rank() != failing) BOOST_TEST(worker.failure == "");
    }
  }
}

BOOST_AUTO_TEST_CASE(an_input_that_cannot_be_read_ends_the_run_with_the_reason) {
  std::mt19937_64 random(18);
  const Case own = random_case(random, AccumulatorPlacement::memory);
  TroubledSource::Trouble trouble;
  trouble.fails_from = 2;
  MasterResult master;
  WorkerResult worker;
  const auto run = [&] {
    run_on_ranks(
        own, [] { return delayed_backend(0); }, master, worker, 0, nullptr, [](int) {},
        open_with(trouble));
  };
  if (world().rank() > 0) return run();
  BOOST_CHECK_EXCEPTION(run(), Error, [](const Error& error) {
    return contains(error.what(), "no worker is left") &&
           contains(error.what(), "q.npy: injected failure");
  });
}
