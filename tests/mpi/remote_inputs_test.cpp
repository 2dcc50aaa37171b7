// Inputs that the master sends, against the same plan on one rank. Every rank runs this file.
#define BOOST_TEST_MODULE mpi_remote_inputs
#include <algorithm>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <chrono>
#include <limits>
#include <random>
#include <thread>

#include "on_ranks.hpp"
#include "stream_cqsa/error.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(MpiWorld);

namespace {

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

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

BOOST_AUTO_TEST_CASE(inputs_through_the_master_give_the_same_bytes) {
  std::mt19937_64 random(15);
  for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(30); ++trial) {
    Case own = random_case(random, placement_of(trial));
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
      const Problem& problem = own.plan.problem();
      const std::int64_t scores =
          problem.live_scores({0, problem.query_length}, {0, problem.key_length});
      BOOST_TEST((master.served.blocks > 0) == (scores > 0));
      BOOST_TEST(outcome.result.host_bytes <= own.plan.request.host_budget);
    }
  }
}

BOOST_AUTO_TEST_CASE(a_read_that_fails_at_the_master_ends_the_worker_that_asked) {
  if (world().size() < 3) return;
  std::mt19937_64 random(16);
  for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(20); ++trial) {
    const Case own = random_case(random, AccumulatorPlacement::memory);
    TroubledSource::Trouble trouble;
    trouble.fails_from = static_cast<int>(trial) % 5;
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
  for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(20); ++trial) {
    const Case own = random_case(random, AccumulatorPlacement::memory);
    const int failing = 1 + static_cast<int>(trial) % (world().size() - 1);
    TroubledSource::Trouble trouble;
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own, failing_on(failing, trial, random), master, worker, 0, nullptr, [](int) {},
        open_with(trouble));
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
