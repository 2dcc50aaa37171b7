// Master, mergers and workers against the same plan on one rank. Every rank runs this file.
#define BOOST_TEST_MODULE mpi_mergers
#include <boost/test/unit_test.hpp>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <optional>
#include <random>
#include <thread>

#include "core/merge_shares.hpp"
#include "engine/piece_table.hpp"
#include "on_ranks.hpp"
#include "stream_cqsa/error.hpp"
#include "support/durable_run.hpp"
#include "support/trials.hpp"

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

constexpr std::uintmax_t journal_header = 32;  // bytes

// Waits for a file to be longer than that; not for ever, where it never is.
void wait_for_file(const std::filesystem::path& path, std::uintmax_t bytes) {
  using namespace std::chrono_literals;
  const auto size = [&] {
    std::error_code none;
    const std::uintmax_t bytes_there = std::filesystem::file_size(path, none);
    return none ? 0 : bytes_there;
  };
  for (auto left = 60s / 1ms; size() <= bytes; --left) {
    if (left == 0) throw Error(path.string() + " does not come");
    std::this_thread::sleep_for(1ms);
  }
}

// A case of which every rank that merges has several query chunks.
Case wide_case(std::mt19937_64& random, int mergers) {
  for (;;) {
    Case own = random_case(random, AccumulatorPlacement::memory, mergers);
    const MergeShares shares(own.plan, mergers);
    bool wide = true;
    for (int rank = 0; rank <= mergers; ++rank) wide = wide && shares.chunks(rank).size() >= 2;
    if (wide) return own;
  }
}

double share_of_scores(const Plan& plan, const Range& chunks) {
  const auto all = expected_scores(plan);
  const auto sum = [](auto begin, auto end) {
    return static_cast<double>(std::accumulate(begin, end, std::uint64_t{0}));
  };
  return sum(all.begin() + chunks.begin, all.begin() + chunks.end) / sum(all.begin(), all.end());
}

}  // namespace

BOOST_AUTO_TEST_CASE(bytes_do_not_depend_on_mergers) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(15);
    for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(24); ++trial) {
      // Planned for so many mergers, or for none.
      check_with_mergers(random_case(random, placement_of(trial), trial % 2 ? mergers : 0), mergers,
                         trial);
    }
  });
}

BOOST_AUTO_TEST_CASE(little_memory_at_mergers_is_enough) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(16);
    for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(16); ++trial) {
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
    for (std::uint64_t trial = 0; trial < trials<std::uint64_t>(16); ++trial) {
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
      const Range share = MergeShares(own.plan, mergers).chunks(failing);
      bool writes = false;
      for (std::int64_t chunk = share.begin; chunk < share.end; ++chunk)
        writes |= !own.plan.division.chunk(chunk).queries.empty();
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

BOOST_AUTO_TEST_CASE(a_stop_while_only_a_merger_still_writes_makes_its_checkpoint) {
  for_mergers([](int mergers) {
    std::mt19937_64 random(19);
    const Case own = wide_case(random, mergers);
    const MergeShares shares(own.plan, mergers);
    std::optional<TestDirectory> made;
    if (world().rank() == 0) made.emplace();
    const std::filesystem::path all =
        world().broadcast(world().rank() == 0 ? made->path().string() : "");
    const std::filesystem::path waits = all / "waits";
    StopRequest stop;
    CheckpointOptions checkpoint;
    checkpoint.directory = all / std::to_string(world().rank());
    std::filesystem::create_directory(checkpoint.directory);
    checkpoint.identity = 7;
    checkpoint.interval = 3600;
    if (world().rank() == 0) checkpoint.stop = &stop;
    // Rank 1 holds back its last rows until what it has is durable: only the stop can do that.
    const std::int64_t last = PieceTable(own.plan, shares.chunks(1)).count() - 1;
    const BeforeWrite hold = [&](int number) {
      if (world().rank() != 1 || number != last) return;
      std::ofstream(waits) << "here";
      wait_for_file(checkpoint.directory / "journal", journal_header);
    };
    MasterResult master;
    WorkerResult worker;
    MergerResult merger;
    const auto run = [&] {
      run_on_ranks(
          own, [] { return delayed_backend(1); }, master, worker, mergers, &merger, hold, nullptr,
          checkpoint);
    };
    if (world().rank() > 0) {
      run();
      BOOST_TEST(merger.failure == "");
      if (world().rank() == 1) BOOST_TEST(merger.run.checkpoint.records >= 1);
      world().broadcast("");
      return;
    }
    std::jthread stopper([&] {
      try {
        wait_for_file(waits, 0);
        wait_for_file(checkpoint.directory / "journal", journal_header);
      } catch (const Error& error) {
        BOOST_ERROR(error.what());
      }
      stop.stop = true;
    });
    const double own_share = share_of_scores(own.plan, shares.chunks(0));
    BOOST_CHECK_EXCEPTION(run(), Stopped, [&](const Stopped& stopped) {
      return stopped.merged() > own_share && stopped.merged() <= 1;
    });
    world().broadcast("");  // only now may the directory go
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
