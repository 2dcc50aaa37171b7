// Master and workers against the same plan on one rank. Every rank runs this file.
#define BOOST_TEST_MODULE mpi_ranks
#include <boost/test/unit_test.hpp>
#include <random>

#include "on_ranks.hpp"
#include "stream_cqsa/error.hpp"
#include "support/crowded_backend.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(MpiWorld);

namespace {

/// Comes to no end with its first launch while its results are wanted.
class StuckBackend : public DelayedBackend {
 public:
  using DelayedBackend::DelayedBackend;

  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    while (!cancelled_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return DelayedBackend::launch(std::move(work), after);
  }
  void cancel() noexcept override {
    cancelled_ = true;
    DelayedBackend::cancel();
  }

 private:
  std::atomic<bool> cancelled_{false};
};

}  // namespace

BOOST_AUTO_TEST_CASE(bytes_do_not_depend_on_ranks_and_timing) {
  std::mt19937_64 random(11);
  for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(40); ++trial) {
    const Case own = random_case(random, placement_of(trial));
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own, [&] { return delayed_backend(trial); }, master, worker);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (world().rank() == 0) check_same_bytes(own, outcome);
      BOOST_TEST(worker.failure == "");
    }
  }
}

BOOST_AUTO_TEST_CASE(little_memory_at_the_master_is_enough) {
  std::mt19937_64 random(12);
  for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(20); ++trial) {
    Case own = random_case(random, AccumulatorPlacement::memory);
    // Not even the partials of one subproblem may come early.
    own.plan.host.state_buffers = 2;
    own.plan.request.host_budget = own.plan.host.bytes();
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own, [&] { return delayed_backend(trial); }, master, worker);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (world().rank() == 0) check_same_bytes(own, outcome);
    }
  }
}

BOOST_AUTO_TEST_CASE(a_worker_that_fails_is_replaced_by_the_others) {
  if (world().size() < 3) return;
  std::mt19937_64 random(13);
  for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(20); ++trial) {
    const Case own = random_case(random, placement_of(trial));
    const int failing = 1 + static_cast<int>(trial) % (world().size() - 1);
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(own, failing_on(failing, trial, random), master, worker);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (world().rank() == 0) check_same_bytes(own, outcome);
      if (world().rank() != failing) BOOST_TEST(worker.failure == "");
    }
  }
}

BOOST_AUTO_TEST_CASE(a_worker_whose_device_has_less_memory_left_computes_in_parts) {
  std::mt19937_64 random(16);
  int crowded = 0;
  for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(20); ++trial) {
    const Case own =
        random_case(random, trial % 2 ? AccumulatorPlacement::memory : AccumulatorPlacement::file);
    const PlanRequest& request = own.plan.request;
    const auto arena = [&](std::int64_t budget) {
      const DeviceTraits device = CrowdedBackend(make_cpu_backend({1}), 0).traits(own.problem);
      return worker_plan(own.plan, device, budget, request.host_budget).device.bytes();
    };
    // All workers alike.
    const std::int64_t all = arena(request.device_budget);
    const std::int64_t left = all - static_cast<std::int64_t>(random() % 5) * all / 10 - 1;
    try {
      arena(left / 10 * 9);
    } catch (const InputError&) {
      continue;
    }
    ++crowded;
    MasterResult master;
    WorkerResult worker;
    const Outcome outcome = run_on_ranks(
        own, [&] { return std::make_unique<CrowdedBackend>(make_cpu_backend({1}), left); }, master,
        worker);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      if (world().rank() == 0) check_same_bytes(own, outcome);
      BOOST_TEST(worker.failure == "");
      BOOST_TEST(worker.device_bytes <= left);
    }
  }
  BOOST_TEST(crowded >= trials(5));
}

BOOST_AUTO_TEST_CASE(what_others_have_computed_is_withdrawn_from_a_worker_that_is_stuck) {
  if (world().size() < 3) return;
  std::mt19937_64 random(17);
  // How much the one that is stuck holds when the others are done is a matter of time: only that
  // something is withdrawn in some trial is certain enough, and what must be true in all of them.
  std::int64_t withdrawn = 0;
  for (std::uint64_t trial = 0; trial < 6 || (trial < 60 && withdrawn == 0); ++trial) {
    // Head groups, or subproblems, enough that the last worker has one that waits.
    const bool by_groups = trial % 2 == 1;
    const auto is_long = [&](const Case& own) {
      const Plan& plan = own.plan;
      const std::int64_t groups =
          plan.problem().batch * static_cast<std::int64_t>(plan.groups.size());
      const std::int64_t orders = by_groups ? groups : plan.subproblem_count();
      return plan.division.chunk_count() >= (by_groups ? 2 : 7) && orders >= world().size();
    };
    const auto placement = by_groups ? AccumulatorPlacement::device : AccumulatorPlacement::memory;
    Case own = random_case(random, placement);
    while (!is_long(own)) own = random_case(random, placement);
    // Room for all that waits for the one that is stuck.
    if (!by_groups) own.plan.host.state_buffers = 4096;
    MasterResult master;
    WorkerResult worker;
    const auto backend = [&]() -> std::unique_ptr<Backend> {
      if (world().rank() != world().size() - 1) return delayed_backend(trial);
      return std::make_unique<StuckBackend>(make_cpu_backend({1}), trial);
    };
    const Outcome outcome = run_on_ranks(own, backend, master, worker);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << own.plan.division.chunk_count()) {
      BOOST_TEST(worker.failure == "");
      if (world().rank() == 0) {
        check_same_bytes(own, outcome);
        BOOST_TEST(master.withdrawn <= master.repeated);
        BOOST_TEST(master.subproblems.back() == 0);
        withdrawn += master.withdrawn;
      }
    }
    MPI_Bcast(&withdrawn, 1, MPI_INT64_T, 0, MPI_COMM_WORLD);
  }
  BOOST_TEST(withdrawn > 0);
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
