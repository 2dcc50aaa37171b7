// Lanes: order, dependencies, failures; and the thread pool below the compute lane.
#define BOOST_TEST_MODULE lanes
#include "cpu/lanes.hpp"

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <numeric>
#include <random>
#include <string>

#include "cpu/thread_pool.hpp"
#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;

namespace {

std::string failure_of(Lanes& lanes, Ticket ticket) {
  try {
    lanes.wait(ticket);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

Ticket submit(Lanes& lanes, Lane lane, std::function<void()> work, std::vector<Ticket> after = {}) {
  return lanes.submit(lane, std::move(work), after);
}

}  // namespace

BOOST_AUTO_TEST_CASE(sequence_zero_is_complete) {
  Lanes lanes;
  lanes.wait({Lane::compute, 0});
  lanes.quiesce();
}

BOOST_AUTO_TEST_CASE(a_lane_runs_in_order) {
  Lanes lanes;
  std::vector<int> seen;
  Ticket last;
  for (int i = 0; i < 1000; ++i) {
    last = submit(lanes, Lane::compute, [&seen, i] { seen.push_back(i); });
    BOOST_TEST(last.sequence == static_cast<std::uint64_t>(i + 1));
  }
  lanes.wait(last);
  std::vector<int> expected(1000);
  std::iota(expected.begin(), expected.end(), 0);
  BOOST_TEST((seen == expected));
  lanes.wait({Lane::compute, 1});
  lanes.wait(last);
}

BOOST_AUTO_TEST_CASE(dependencies_across_lanes_are_honoured) {
  constexpr std::uint64_t seed = 12;
  std::mt19937_64 random(seed);
  Lanes lanes;
  std::vector<std::atomic<bool>> done(3000);
  std::vector<Ticket> tickets;
  std::atomic<int> violations{0};
  for (std::size_t i = 0; i < done.size(); ++i) {
    std::vector<std::size_t> needs;
    std::vector<Ticket> after;
    for (std::uint64_t n = i == 0 ? 0 : random() % 4; n > 0; --n) {
      needs.push_back(random() % i);
      after.push_back(tickets[needs.back()]);
    }
    const auto lane = static_cast<Lane>(random() % lane_count);
    tickets.push_back(submit(
        lanes, lane,
        [&done, &violations, needs, i] {
          for (const std::size_t need : needs) violations += !done[need];
          done[i] = true;
        },
        after));
  }
  lanes.quiesce();
  for (const Ticket ticket : tickets) lanes.wait(ticket);
  BOOST_TEST(violations == 0);
  BOOST_TEST(std::all_of(done.begin(), done.end(), [](const auto& flag) { return flag.load(); }));
}

BOOST_AUTO_TEST_CASE(a_failure_reaches_what_waits_for_it_and_nothing_else) {
  Lanes lanes;
  std::atomic<int> ran{0};
  const auto count = [&ran] { ++ran; };
  const Ticket before = submit(lanes, Lane::copy_in, count);
  const Ticket independent = submit(lanes, Lane::copy_out, count, {before});
  const Ticket failed = submit(lanes, Lane::copy_in, [] { throw Error("no such luck"); });
  const Ticket behind = submit(lanes, Lane::copy_in, count);
  const Ticket dependent = submit(lanes, Lane::compute, count, {before, failed});
  const Ticket second_hand = submit(lanes, Lane::copy_out, count, {dependent});
  lanes.quiesce();
  BOOST_TEST(failure_of(lanes, before) == "");
  BOOST_TEST(failure_of(lanes, independent) == "");
  for (const Ticket ticket : {failed, behind, dependent, second_hand, failed}) {
    BOOST_TEST(failure_of(lanes, ticket) == "no such luck");
  }
  BOOST_TEST(ran == 2);
}

BOOST_AUTO_TEST_CASE(the_pool_runs_every_worker_once) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    BOOST_TEST(pool.threads() == threads);
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(threads));
    for (int round = 0; round < 200; ++round) {
      pool.run([&calls](int worker) { ++calls[static_cast<std::size_t>(worker)]; });
    }
    for (const auto& count : calls) BOOST_TEST(count == 200);
  }
}

BOOST_AUTO_TEST_CASE(the_pool_survives_a_throwing_worker) {
  ThreadPool pool(3);
  for (int thrower = 0; thrower < 3; ++thrower) {
    BOOST_CHECK_THROW(pool.run([thrower](int worker) {
      if (worker == thrower) throw Error("worker");
    }),
                      Error);
  }
  std::atomic<int> calls{0};
  pool.run([&calls](int) { ++calls; });
  BOOST_TEST(calls == 3);
}
