// Master and workers against the same plan on one rank: the same bytes. Every rank runs this file.
#define BOOST_TEST_MODULE mpi_ranks
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <chrono>
#include <limits>
#include <optional>
#include <random>
#include <thread>

#include "mpi/communicator.hpp"
#include "mpi/environment.hpp"
#include "mpi/master.hpp"
#include "mpi/worker.hpp"
#include "stream_cqsa/error.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"
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

Case random_case(std::mt19937_64& random, AccumulatorPlacement placement) {
  const Problem problem = random_problem(random, 150, 24, 1);
  const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
  const auto backend = make_cpu_backend({1});
  PlanRequest request = roomy_request(problem, layout, *backend);
  request.chunks = std::array<std::int64_t, 7>{1, 2, 3, 7, 12, 13, 31}[random() % 7];
  request.workers = world().size() - 1;
  if (random() % 2) request.heads_per_group = 1;
  Plan plan = make_plan(request);
  if (placement == AccumulatorPlacement::file) plan = with_accumulators_in_a_file(plan);
  return {problem, layout, plan, random_input(problem, layout, 2.0, random)};
}

using MakeBackend = std::function<std::unique_ptr<Backend>()>;
using OpenSource = std::function<std::unique_ptr<TensorSource>(const TestTensor&)>;

/// This rank's part of a distributed run. Rank 0 returns what came of it. With `through_master`,
/// it alone has sources, opened so.
Outcome run_on_ranks(const Case& own, const MakeBackend& make_backend, MasterResult& master,
                     WorkerResult& worker, const OpenSource& through_master = nullptr) {
  const Plan& plan = own.plan;
  Outcome outcome;
  Telemetry telemetry;
  RunOptions options;
  options.scratch = std::filesystem::temp_directory_path();
  const int workers = world().size() - 1;
  if (world().rank() == 0) {
    TensorDesc desc = own.input.query.desc;
    desc.name = "o";
    desc.dtype = own.problem.output_dtype;
    outcome.output.resize(static_cast<std::size_t>(desc.bytes()));
    const TensorDesc lse =
        lse_desc(own.problem.batch, own.problem.query_heads, own.problem.query_length);
    outcome.lse.resize(static_cast<std::size_t>(lse.bytes()));
    const auto output_sink = make_memory_sink(desc, outcome.output);
    const auto lse_sink = make_memory_sink(lse, outcome.lse);
    const Outputs outputs{*output_sink, lse_sink.get()};
    const auto run = [&](const Inputs* served) {
      master = run_master(
          master_plan(plan, workers, served != nullptr), outputs, options, telemetry, world(),
          [] {}, served);
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
    return outcome;
  }
  const auto backend = make_backend();
  const WorkerBudgets budgets{plan.request.device_budget, plan.request.host_budget};
  if (through_master) {
    RemoteInputs remote(own.input.query.desc, own.input.key.desc, own.input.value.desc, world());
    worker =
        run_worker(plan, budgets, remote.inputs(), *backend, options, telemetry, world(), &remote);
    return outcome;
  }
  const auto query = block_source(own.input.query), key = block_source(own.input.key),
             value = block_source(own.input.value);
  worker = run_worker(plan, budgets, {*query, *key, *value}, *backend, options, telemetry, world());
  return outcome;
}

void check_same_bytes(const Case& own, const Outcome& outcome) {
  const auto backend = make_cpu_backend({1});
  const Outcome alone = run_plan(own.plan, own.input, *backend, true);
  BOOST_TEST(outcome.output == alone.output);
  BOOST_TEST(outcome.lse == alone.lse);
  BOOST_TEST(outcome.result.merged_scores == expected_scores(own.plan));
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
    const Case own = random_case(
        random, trial % 4 == 3 ? AccumulatorPlacement::file : AccumulatorPlacement::memory);
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
    const Case own = random_case(random, AccumulatorPlacement::memory);
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

BOOST_AUTO_TEST_CASE(inputs_through_the_master_give_the_same_bytes) {
  std::mt19937_64 random(15);
  for (int trial = 0; trial < 30; ++trial) {
    Case own = random_case(
        random, trial % 4 == 3 ? AccumulatorPlacement::file : AccumulatorPlacement::memory);
    if (trial % 3 == 0) {
      // No room for more than the fewest blocks and partials on their way.
      own.plan.host.state_buffers = 2;
      own.plan.request.host_budget = own.plan.host.bytes();
    }
    TroubledSource::Trouble trouble;
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own, [&] { return delayed_backend(trial); }, master, worker, open_with(trouble));
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
        own, [&] { return delayed_backend(trial); }, master, worker, open_with(trouble));
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
        master, worker, open_with(trouble));
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
        own, [] { return delayed_backend(0); }, master, worker, open_with(trouble));
  };
  if (world().rank() > 0) return run();
  BOOST_CHECK_EXCEPTION(run(), Error, [](const Error& error) {
    return contains(error.what(), "no worker is left") &&
           contains(error.what(), "q.npy: injected failure");
  });
}
