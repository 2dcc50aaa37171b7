// What is repeated for a slow worker, and withdrawn from it.
#define BOOST_TEST_MODULE engine_dispatcher_repeats
#include <boost/test/unit_test.hpp>
#include <map>
#include <set>
#include <vector>

#include "engine/dispatcher.hpp"
#include "support/small_plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

/// Two workers with four things to compute, of which one works a second at each and the other one
/// is stuck at its first: 0, with 3 behind it.
struct Stuck {
  Stuck() {
    for (int pass = 0; pass < 2; ++pass) {
      for (int worker = 0; worker < 2; ++worker) {
        while (const auto order = dispatcher.next(worker)) has[worker].insert(order->assignment.id);
      }
    }
    for (const std::int64_t id : {1, 2}) {
      ++clock;
      finish(id);
    }
    ++clock;
  }
  // The working one has computed it, and it is merged.
  void finish(std::int64_t id) {
    dispatcher.computed(1, id);
    dispatcher.received(1, id);
    dispatcher.merged_piece(id);
  }
  std::int64_t again() {
    const auto order = dispatcher.next(1);
    return order ? order->assignment.id : -1;
  }
  // What is withdrawn of the one that is stuck.
  std::set<std::int64_t> withdrawn() {
    std::set<std::int64_t> ids;
    for (const auto& [worker, id] : dispatcher.withdrawals()) {
      BOOST_TEST(worker == 0);
      ids.insert(id);
    }
    return ids;
  }
  std::int64_t next_of_stuck() {
    const auto order = dispatcher.next(0);
    return order ? order->assignment.id : -1;
  }

  double clock = 0;
  std::set<std::int64_t> has[2];
  Dispatcher dispatcher{4, 2, {100, 2, 0, [this] { return clock; }}, [](std::int64_t) {
                          Dispatcher::Work work;
                          work.pieces = 1;
                          return work;
                        }};
};

}  // namespace

BOOST_AUTO_TEST_CASE(an_idle_worker_repeats_what_another_is_slow_at) {
  SmallPlan small;
  small.chunks = 3;
  const Plan plan = small_plan(small);
  Dispatcher dispatcher(plan, 2, {8, 3, 0}, [](const SubproblemKey&, std::int64_t) { return 1; });
  const std::int64_t own = dispatcher.next(1)->assignment.id;
  std::set<std::int64_t> first;
  while (const auto order = dispatcher.next(0)) first.insert(order->assignment.id);
  BOOST_TEST(first.size() == 2u);
  dispatcher.computed(1, own);
  const auto again = dispatcher.next(1);
  BOOST_REQUIRE(again.has_value());
  BOOST_TEST(again->assignment.id == *first.rbegin());
  BOOST_TEST(dispatcher.repeated() == 1);
}

BOOST_AUTO_TEST_CASE(what_another_does_as_fast_is_not_repeated) {
  SmallPlan small;
  small.chunks = 7;
  const Plan plan = small_plan(small);
  double clock = 0;
  Dispatcher::Options options{8, 2, 0};
  options.now = [&] { return clock; };
  Dispatcher dispatcher(plan, 2, options, [](const SubproblemKey&, std::int64_t) { return 1; });
  std::vector<std::set<std::int64_t>> has(2);
  const auto take_all = [&](int worker) {
    while (const auto order = dispatcher.next(worker))
      has[static_cast<std::size_t>(worker)].insert(order->assignment.id);
  };
  const auto compute = [&](int worker) {
    auto& own = has[static_cast<std::size_t>(worker)];
    dispatcher.computed(worker, *own.begin());
    own.erase(own.begin());
  };
  take_all(0);
  take_all(1);
  // 7 subproblems of 10 s each: the first worker computes one more than the second.
  for (int round = 0; round < 3; ++round) {
    clock += 10;
    compute(0);
    take_all(0);
    compute(1);
    take_all(1);
  }
  BOOST_TEST(has[0].size() == 1u);
  BOOST_TEST(has[1].empty());
  BOOST_TEST(dispatcher.repeated() == 0);
  // The other should be done first; but not if it takes ever longer.
  clock += 9;
  BOOST_TEST(!dispatcher.next(1).has_value());
  clock += 12;
  const auto again = dispatcher.next(1);
  BOOST_REQUIRE(again.has_value());
  BOOST_TEST(again->assignment.id == *has[0].begin());
  BOOST_TEST(dispatcher.repeated() == 1);
}

BOOST_AUTO_TEST_CASE(a_fast_worker_repeats_what_a_slow_one_has_begun) {
  SmallPlan small;
  small.chunks = 7;
  const Plan plan = small_plan(small);
  double clock = 0;
  Dispatcher::Options options{8, 1, 0};
  options.now = [&] { return clock; };
  Dispatcher dispatcher(plan, 2, options, [](const SubproblemKey&, std::int64_t) { return 1; });
  // The slow one takes 35 s, the fast one 10.
  std::int64_t slow = dispatcher.next(0)->assignment.id;
  for (int second = 10; second <= 50; second += 10) {
    const std::int64_t fast = dispatcher.next(1)->assignment.id;
    clock = second;
    dispatcher.computed(1, fast);
    if (second != 30) continue;
    clock = 35;
    dispatcher.computed(0, slow);
    slow = dispatcher.next(0)->assignment.id;
  }
  BOOST_TEST(dispatcher.repeated() == 0);
  const auto again = dispatcher.next(1);
  BOOST_REQUIRE(again.has_value());
  BOOST_TEST(again->assignment.id == slow);
  BOOST_TEST(dispatcher.repeated() == 1);
}

BOOST_AUTO_TEST_CASE(what_nobody_has_begun_is_repeated_first) {
  // Two slow workers, and one that computes all the rest.
  Dispatcher::Options options{100, 2, 0};
  double clock = 0;
  options.now = [&] { return clock; };
  Dispatcher dispatcher(8, 3, options, [](std::int64_t) {
    Dispatcher::Work work;
    work.pieces = 1;
    return work;
  });
  std::vector<std::set<std::int64_t>> has(3);
  const auto take_all = [&] {
    for (int pass = 0; pass < 3; ++pass) {
      for (int worker = 0; worker < 3; ++worker) {
        while (const auto order = dispatcher.next(worker))
          has[static_cast<std::size_t>(worker)].insert(order->assignment.id);
      }
    }
  };
  const auto compute = [&](int worker) {
    auto& own = has[static_cast<std::size_t>(worker)];
    const std::int64_t id = *own.begin();
    own.erase(own.begin());
    dispatcher.computed(worker, id);
    dispatcher.received(worker, id);
    dispatcher.merged_piece(id);
    take_all();
  };
  take_all();  // {0, 4}, {1, 5}, {2, 3}
  clock = 1;
  compute(2);  // {3, 6}
  clock = 2;
  compute(2);  // {6, 7}
  clock = 3;
  compute(2);
  BOOST_TEST(dispatcher.repeated() == 0);
  clock = 4;
  compute(2);
  BOOST_TEST_REQUIRE(has[2].size() == 1u);
  const std::int64_t again = *has[2].begin();
  BOOST_TEST((again == 4 || again == 5));  // not 0 or 1, which they began
  BOOST_TEST(dispatcher.repeated() == 1);
}

BOOST_AUTO_TEST_CASE(what_another_has_computed_is_withdrawn) {
  Stuck run;
  BOOST_TEST((run.has[0] == std::set<std::int64_t>{0, 3}));
  BOOST_TEST(run.again() == 3);
  BOOST_TEST(run.withdrawn().empty());
  ++run.clock;
  run.dispatcher.computed(1, 3);
  BOOST_TEST((run.withdrawn() == std::set<std::int64_t>{3}));
  BOOST_TEST(run.withdrawn().empty());
  run.dispatcher.left_out(0, 3);
  BOOST_TEST(run.dispatcher.withdrawn() == 1);
  run.dispatcher.received(1, 3);
  run.dispatcher.merged_piece(3);
  // What has begun is told of as well, and may be computed to its end.
  BOOST_TEST(run.again() == 0);
  ++run.clock;
  run.finish(0);
  BOOST_TEST((run.withdrawn() == std::set<std::int64_t>{0}));
  BOOST_TEST(run.dispatcher.all_merged());
  run.dispatcher.computed(0, 0);
  run.dispatcher.received(0, 0);
  BOOST_TEST(run.withdrawn().empty());
  BOOST_TEST(run.next_of_stuck() == -1);
  BOOST_TEST(run.dispatcher.repeated() == 2);
  BOOST_TEST(run.dispatcher.withdrawn() == 1);
}

BOOST_AUTO_TEST_CASE(what_was_left_out_is_not_handed_out_while_its_partials_wait_to_be_merged) {
  Stuck run;
  BOOST_TEST(run.again() == 3);
  run.dispatcher.computed(1, 3);
  // The one that is stuck has it still: no reason to repeat it.
  BOOST_TEST(run.again() == 0);
  run.dispatcher.received(1, 3);
  run.dispatcher.left_out(0, 3);
  BOOST_TEST(run.next_of_stuck() == -1);
  BOOST_TEST(!run.dispatcher.all_merged());
  run.dispatcher.merged_piece(3);
  run.dispatcher.merged_piece(0);
  BOOST_TEST(run.dispatcher.all_merged());
}

BOOST_AUTO_TEST_CASE(what_was_left_out_comes_back_when_its_partials_are_lost) {
  for (const bool lost_first : {false, true}) {
    Stuck run;
    BOOST_TEST(run.again() == 3);
    run.dispatcher.computed(1, 3);
    BOOST_TEST((run.withdrawn() == std::set<std::int64_t>{3}));
    if (lost_first) run.dispatcher.lost(1, true);
    run.dispatcher.left_out(0, 3);
    if (!lost_first) run.dispatcher.lost(1, true);
    BOOST_TEST(run.next_of_stuck() == 3);
  }
}

BOOST_AUTO_TEST_CASE(what_a_worker_gives_up_after_another_has_computed_it_is_done) {
  Stuck run;
  BOOST_TEST(run.again() == 3);
  run.dispatcher.computed(1, 3);
  run.dispatcher.received(1, 3);
  run.dispatcher.lost(0, false);  // with 0 and 3
  BOOST_TEST(run.again() == 0);
  BOOST_TEST(run.again() == -1);
}
