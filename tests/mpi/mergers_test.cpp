// Master, mergers and workers against the same plan on one rank. Every rank runs this file.
#define BOOST_TEST_MODULE mpi_mergers
#include <boost/test/unit_test.hpp>
#include <random>

#include "engine/merge_shares.hpp"
#include "on_ranks.hpp"
#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(MpiWorld);

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
      own, [&] { return delayed_backend(seed); }, master, worker, mergers, &merger);
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
    for (std::uint64_t trial = 0; trial < 16; ++trial) {
      Case own = random_case(random, placement_of(trial), mergers);
      if (trial % 2 && own.plan.placement == AccumulatorPlacement::memory) {
        own.plan.host.state_buffers = 2;
        own.plan.request.host_budget = own.plan.host.bytes();
      }
      const int failing = 1 + mergers + static_cast<int>(trial) % workers;
      MasterResult master;
      WorkerResult worker;
      const Outcome part =
          run_on_ranks(own, failing_on(failing, trial, random), master, worker, mergers);
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
    for (std::uint64_t trial = 0; trial < 6; ++trial) {
      Case own = random_case(random, AccumulatorPlacement::memory, mergers);
      while (own.plan.division.chunk_count() < 7)
        own = random_case(random, AccumulatorPlacement::memory, mergers);
      const int failing = 1 + static_cast<int>(trial) % mergers;
      MasterResult master;
      WorkerResult worker;
      MergerResult merger;
      const auto run = [&] {
        run_on_ranks(
            own, [] { return delayed_backend(1); }, master, worker, mergers, &merger,
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
