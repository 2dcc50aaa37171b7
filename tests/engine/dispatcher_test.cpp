#define BOOST_TEST_MODULE engine_dispatcher
#include "engine/dispatcher.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <set>

#include "core/merge_shares.hpp"
#include "engine/partial.hpp"
#include "engine/use_table.hpp"
#include "support/run_plan.hpp"
#include "support/small_plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

/// A run with several ranks that merge, which tell the dispatcher late what they have merged and
/// received, and hear late what it has dropped. Workers compute in the order given and hold a few
/// partials; a merging rank takes those in turn, and early ones within its own window.
class Simulation {
 public:
  Simulation(const Plan& plan, int workers, std::int64_t window, int buffers, std::uint64_t seed,
             int mergers = 0)
      : plan_(plan),
        uses_(plan),
        shares_(plan, mergers),
        buffers_(buffers),
        random_(seed),
        workers_(static_cast<std::size_t>(workers)),
        mergers_(static_cast<std::size_t>(shares_.ranks())),
        dispatcher_(plan, workers, {window, 3, 4}, [&](const SubproblemKey&, std::int64_t chunk) {
          return piece_count(plan_, plan_.division.chunk(chunk).queries);
        }) {
    for (Merger& merger : mergers_) {
      merger.window = window + static_cast<std::int64_t>(random_() % 3);
      if (mergers == 0) merger.window = window;
    }
    for (std::int64_t id = 0; id < plan.subproblem_count(); ++id) {
      for (const PieceKey& key : pieces_of(id)) ++merger_of(key).unmerged[id];
    }
  }

  /// One event somewhere. False where nothing can happen any more.
  bool step() {
    std::vector<int> order(workers_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    std::shuffle(order.begin(), order.end(), random_);
    const bool assign_first = random_() % 2 == 0;
    for (const auto& [worker, id] : dispatcher_.withdrawals()) {
      Worker& has = workers_[static_cast<std::size_t>(worker)];
      has.withdrawn.push_back(has.given.at(id));
    }
    if (random_() % 2 == 0 && hear()) return true;
    for (const int worker : order)
      if (assign_first && assign(worker)) return true;
    for (const int worker : order)
      if (send(worker) || compute(worker)) return true;
    for (const int worker : order)
      if (assign(worker)) return true;
    return hear();
  }
  void lose(int worker, bool with_partials) {
    Worker& lost = workers_[static_cast<std::size_t>(worker)];
    lost.lost = true;
    // What was offered of the one that it computed can still be had, but never all of it.
    if (!lost.undelivered.empty()) parts_[lost.undelivered.front().order].computed = false;
    for (const Held& held : lost.undelivered) parts_[held.order].waiting[held.merger] += 1000;
    lost.orders.clear();
    lost.undelivered.clear();
    lost.withdrawn.clear();
    if (with_partials) lost.held.clear();
    dispatcher_.lost(worker, with_partials);
  }
  const Dispatcher& dispatcher() const { return dispatcher_; }
  std::int64_t furthest_ahead() const { return furthest_; }
  /// Every piece has exactly its quorums, in order.
  bool complete() const {
    for (const auto& [key, merged] : merged_) {
      if (merged.size() != uses_.quorums(Side::query, key.chunk).size()) return false;
    }
    return true;
  }

 private:
  struct Order {
    std::int64_t number = 0;
    std::int64_t id = 0;
  };
  struct Held {
    PieceKey key;
    std::int64_t id = 0;
    std::int64_t order = 0;
    int merger = 0;
  };
  struct Worker {
    bool lost = false;
    std::deque<Order> orders;
    std::deque<Held> undelivered;  ///< of the subproblem that it computes
    std::deque<Held> held;
    std::map<std::int64_t, std::int64_t> given;  ///< order numbers, by subproblem
    std::deque<std::int64_t> withdrawn;          ///< order numbers: told, and not heard yet
  };
  struct Merger {
    std::int64_t window = 0;
    std::map<std::int64_t, std::int64_t> unmerged;  ///< pieces, by subproblem
    std::set<std::int64_t> dropped;                 ///< order numbers
    std::deque<std::int64_t> to_drop;               ///< told, and not heard yet
    std::deque<std::function<void()>> told;         ///< to the dispatcher, and not heard yet
  };
  /// What an order's merging ranks still wait for.
  struct Parts {
    int worker = 0;
    std::int64_t id = 0;
    bool computed = false;
    std::map<int, std::int64_t> waiting;  ///< partials, by merger
    std::set<int> unheard;                ///< mergers of which the dispatcher has not heard that
  };

  std::vector<PieceKey> pieces_of(std::int64_t id) const {
    const QuorumWork work = plan_.work(id);
    std::set<std::int32_t> queries;
    for (const ChunkPair& pair : work.pairs) queries.insert(pair.query);
    const auto [batch, group, quorum] = plan_.key(id);
    std::vector<PieceKey> keys;
    for (const std::int32_t query : queries) {
      const Chunk& chunk = work.chunks[static_cast<std::size_t>(query)];
      for (std::int64_t piece = 0; piece < piece_count(plan_, chunk.queries); ++piece)
        keys.push_back({batch, group, chunk.index, piece});
    }
    return keys;
  }
  Merger& merger_of(const PieceKey& key) {
    return mergers_[static_cast<std::size_t>(shares_.rank_of(key.chunk))];
  }

  // A message between dispatcher and a merger, or about what is withdrawn to a worker, arrives.
  bool hear() {
    for (std::size_t number = 0; number < workers_.size(); ++number) {
      if (workers_[number].withdrawn.empty() || random_() % 2) continue;
      leave_out(static_cast<int>(number));
      return true;
    }
    std::vector<Merger*> order;
    for (Merger& merger : mergers_) order.push_back(&merger);
    std::shuffle(order.begin(), order.end(), random_);
    for (Merger* merger : order) {
      if (!merger->told.empty()) {
        merger->told.front()();
        merger->told.pop_front();
        return true;
      }
      if (!merger->to_drop.empty()) {
        merger->dropped.insert(merger->to_drop.front());
        merger->to_drop.pop_front();
        return true;
      }
    }
    return false;
  }

  void leave_out(int number) {
    Worker& worker = workers_[static_cast<std::size_t>(number)];
    const std::int64_t withdrawn = worker.withdrawn.front();
    worker.withdrawn.pop_front();
    const auto at = std::find_if(worker.orders.begin(), worker.orders.end(),
                                 [&](const Order& order) { return order.number == withdrawn; });
    const bool begun = at == worker.orders.begin() && !worker.undelivered.empty();
    if (at == worker.orders.end() || begun) return;
    const std::int64_t id = at->id;
    worker.orders.erase(at);
    dispatcher_.left_out(number, id);
  }

  bool assign(int number) {
    const auto order = dispatcher_.next(number);
    if (!order) return false;
    Worker& worker = workers_[static_cast<std::size_t>(number)];
    BOOST_TEST(!worker.lost);
    for (const std::int64_t id : order->abandon) {
      for (Merger& merger : mergers_) merger.to_drop.push_back(worker.given.at(id));
    }
    const std::int64_t id = order->assignment.id;
    worker.given[id] = ++last_order_;
    parts_[last_order_] = {number, id, false, {}, {}};
    worker.orders.push_back({last_order_, id});
    furthest_ = std::max(furthest_, id - dispatcher_.oldest_unmerged());
    return true;
  }

  bool compute(int number) {
    Worker& worker = workers_[static_cast<std::size_t>(number)];
    if (worker.undelivered.empty()) {
      if (worker.orders.empty()) return false;
      const Order order = worker.orders.front();
      Parts& parts = parts_[order.number];
      for (const PieceKey& key : pieces_of(order.id)) {
        const int merger = shares_.rank_of(key.chunk);
        worker.undelivered.push_back({key, order.id, order.number, merger});
        ++parts.waiting[merger];
        parts.unheard.insert(merger);
      }
    }
    if (worker.held.size() >= static_cast<std::size_t>(buffers_)) return false;
    worker.held.push_back(worker.undelivered.front());
    worker.undelivered.pop_front();
    if (worker.undelivered.empty()) {
      const Order order = worker.orders.front();
      worker.orders.pop_front();
      dispatcher_.computed(number, order.id);
      parts_[order.number].computed = true;
      received(order.number);
    }
    return true;
  }

  bool send(int number) {
    Worker& worker = workers_[static_cast<std::size_t>(number)];
    for (auto held = worker.held.begin(); held != worker.held.end(); ++held) {
      if (!take(*held)) continue;
      const Held taken = *held;
      worker.held.erase(held);
      if (--parts_[taken.order].waiting[taken.merger] > 0) return true;
      mergers_[static_cast<std::size_t>(taken.merger)].told.push_back([this, taken] {
        parts_[taken.order].unheard.erase(taken.merger);
        received(taken.order);
      });
      return true;
    }
    return false;
  }
  void received(std::int64_t order) {
    const Parts& parts = parts_[order];
    if (parts.computed && parts.unheard.empty()) dispatcher_.received(parts.worker, parts.id);
  }

  bool take(const Held& held) {
    Merger& merger = mergers_[static_cast<std::size_t>(held.merger)];
    if (merger.dropped.contains(held.order)) return true;
    std::vector<std::int64_t>& merged = merged_[held.key];
    const std::int64_t quorum = plan_.key(held.id).quorum;
    const QuorumList quorums = uses_.quorums(Side::query, held.key.chunk);
    const auto done = quorums.begin() + static_cast<std::ptrdiff_t>(merged.size());
    if (std::find(done, quorums.end(), quorum) == quorums.end()) return true;  // a duplicate
    if (early_.contains({held.key, held.id})) return true;
    if (quorum != *done) {
      if (held.id >= merger.unmerged.begin()->first + merger.window) return false;
      early_.insert({held.key, held.id});
      return true;
    }
    merge(held.key, held.id);
    return true;
  }
  void merge(const PieceKey& key, std::int64_t id) {
    std::vector<std::int64_t>& merged = merged_[key];
    merged.push_back(plan_.key(id).quorum);
    early_.erase({key, id});
    Merger& merger = merger_of(key);
    if (--merger.unmerged.at(id) == 0) merger.unmerged.erase(id);
    merger.told.push_back([this, id] { dispatcher_.merged_piece(id); });
    const QuorumList quorums = uses_.quorums(Side::query, key.chunk);
    if (merged.size() == quorums.size()) return;
    const std::int64_t next = plan_.id({key.batch, key.group, quorums[merged.size()]});
    if (early_.contains({key, next})) merge(key, next);
  }

  const Plan& plan_;
  mutable UseTable uses_;
  MergeShares shares_;
  int buffers_;
  std::mt19937_64 random_;
  std::vector<Worker> workers_;
  std::vector<Merger> mergers_;
  Dispatcher dispatcher_;
  std::int64_t last_order_ = 0;
  std::map<std::int64_t, Parts> parts_;  ///< by order number
  std::map<PieceKey, std::vector<std::int64_t>> merged_;
  std::set<std::pair<PieceKey, std::int64_t>> early_;
  std::int64_t furthest_ = 0;
};

SmallPlan random_plan(std::mt19937_64& random) {
  SmallPlan small;
  small.batch = 1 + static_cast<std::int64_t>(random() % 2);
  small.kv_heads = 1 + static_cast<std::int64_t>(random() % 3);
  small.length = 20 + static_cast<std::int64_t>(random() % 60);
  small.causal = random() % 2 == 0;
  small.chunks = std::array<std::int64_t, 5>{1, 3, 7, 13, 31}[random() % 5];
  if (random() % 3 == 0) small.grid = random_grid(random);
  return small;
}

}  // namespace

BOOST_AUTO_TEST_CASE(every_piece_gets_every_partial_once_and_nobody_waits_for_ever) {
  std::mt19937_64 random(5);
  for (int trial = 0; trial < 300; ++trial) {
    const Plan plan = small_plan(random_plan(random));
    const int workers = 1 + static_cast<int>(random() % 7);
    const auto window = static_cast<std::int64_t>(random() % 6);
    const int mergers = trial % 4;
    Simulation run(plan, workers, window, 1 + static_cast<int>(random() % 4), random(), mergers);
    BOOST_TEST_CONTEXT("trial " << trial << ", " << workers << " workers, " << mergers
                                << " mergers, window " << window) {
      while (run.step()) {
      }
      BOOST_TEST(run.dispatcher().all_merged());
      BOOST_TEST(run.complete());
    }
  }
}

BOOST_AUTO_TEST_CASE(what_lost_workers_had_goes_to_the_others) {
  std::mt19937_64 random(6);
  for (int trial = 0; trial < 400; ++trial) {
    const Plan plan = small_plan(random_plan(random));
    const int workers = 2 + static_cast<int>(random() % 5);
    const auto window = static_cast<std::int64_t>(random() % 4);
    const int mergers = trial % 4;
    Simulation run(plan, workers, window, 1 + static_cast<int>(random() % 3), random(), mergers);
    const int survivor = static_cast<int>(random() % static_cast<std::uint64_t>(workers));
    BOOST_TEST_CONTEXT("trial " << trial << ", " << workers << " workers, " << mergers
                                << " mergers, window " << window) {
      int next = 0;
      for (int steps = 0;; ++steps) {
        if (random() % 40 == 0 && next < workers) {
          if (next != survivor) run.lose(next, random() % 2 == 0);
          ++next;
        }
        if (!run.step()) break;
      }
      BOOST_TEST(run.dispatcher().all_merged());
      BOOST_TEST(run.complete());
    }
  }
}

BOOST_AUTO_TEST_CASE(nothing_is_handed_out_that_is_not_lacking) {
  SmallPlan small;
  small.chunks = 13;
  const Plan plan = small_plan(small);
  Dispatcher nothing(plan, 2, {}, [](const SubproblemKey&, std::int64_t) { return 0; });
  BOOST_TEST(nothing.all_merged());
  BOOST_TEST(!nothing.next(0).has_value());

  // One query chunk is lacking one quorum's partial.
  const QuorumWork work = plan.work(4);
  const std::int64_t lacking = work.chunks[static_cast<std::size_t>(work.pairs[0].query)].index;
  Dispatcher one(plan, 2, {}, [&](const SubproblemKey& key, std::int64_t chunk) {
    return key.quorum == 4 && chunk == lacking ? 1 : 0;
  });
  const auto order = one.next(1);
  BOOST_REQUIRE(order.has_value());
  BOOST_TEST(order->assignment.id == 4);
  const auto& wanted = order->assignment.wanted;
  BOOST_TEST(std::count(wanted.begin(), wanted.end(), true) == 1);
  one.computed(1, 4);
  one.received(1, 4);
  BOOST_TEST(!one.all_merged());
  one.merged_piece(4);
  BOOST_TEST(one.all_merged());
}

BOOST_AUTO_TEST_CASE(every_worker_has_one_before_any_has_two) {
  for (const int workers : {2, 4, 8}) {
    for (const int more : {0, 1}) {
      Dispatcher::Options options{100, 2, 0};
      double clock = 0;
      options.now = [&] { return clock; };
      Dispatcher dispatcher(workers + more, workers, options, [](std::int64_t) {
        Dispatcher::Work work;
        work.pieces = 1;
        return work;
      });
      std::vector<std::vector<std::int64_t>> has(static_cast<std::size_t>(workers));
      const auto take_all = [&] {
        for (int pass = 0; pass < 3; ++pass) {
          for (int worker = 0; worker < workers; ++worker) {
            while (const auto order = dispatcher.next(worker))
              has[static_cast<std::size_t>(worker)].push_back(order->assignment.id);
          }
        }
      };
      take_all();
      std::size_t given = 0;
      for (int worker = 0; worker < workers; ++worker) {
        const auto& own = has[static_cast<std::size_t>(worker)];
        BOOST_TEST_REQUIRE(own.size() >= 1u);
        BOOST_TEST(own[0] == worker);
        given += own.size();
      }
      BOOST_TEST(given == has.size() + static_cast<std::size_t>(more));
      // All are as fast: nobody has reason to repeat what another computes.
      clock = 10;
      for (int worker = workers - 1; worker >= 0; --worker) {
        dispatcher.computed(worker, worker);
        take_all();
        clock += 0.01;
      }
      BOOST_TEST(dispatcher.repeated() == 0);
    }
  }
}

BOOST_AUTO_TEST_CASE(what_is_held_back_waits_and_may_never_come) {
  Dispatcher::Options options{100, 2, 0};
  options.held_from = 3;
  // Of the one numbered 4 nothing is lacking.
  Dispatcher dispatcher(8, 2, options, [](std::int64_t id) {
    return Dispatcher::Work{{}, {}, id == 4 ? 0 : 1};
  });
  const auto take = [&](int worker) {
    const auto order = dispatcher.next(worker);
    return order ? order->assignment.id : -1;
  };
  const auto finish = [&](int worker, std::int64_t id) {
    dispatcher.computed(worker, id);
    dispatcher.received(worker, id);
    dispatcher.merged_piece(id);
  };
  BOOST_TEST(!dispatcher.has_come_to_held());
  BOOST_TEST(take(0) == 0);
  BOOST_TEST(take(1) == 1);
  BOOST_TEST(take(0) == 2);
  BOOST_TEST(dispatcher.has_come_to_held());
  BOOST_TEST(take(1) == -1);
  // What a lost worker had comes before what is held.
  dispatcher.lost(0, true);
  BOOST_TEST(!dispatcher.has_come_to_held());
  BOOST_TEST(take(1) == 0);
  finish(1, 0);
  BOOST_TEST(take(1) == 2);
  dispatcher.hold_from(5);
  BOOST_TEST(!dispatcher.has_come_to_held());
  for (const std::int64_t id : {1, 2}) finish(1, id);
  BOOST_TEST(take(1) == 3);
  BOOST_TEST(dispatcher.has_come_to_held());
  BOOST_TEST(!dispatcher.all_merged());
  dispatcher.leave_held();
  BOOST_TEST(!dispatcher.has_come_to_held());
  BOOST_TEST(!dispatcher.all_merged());
  BOOST_TEST(take(1) == -1);
  finish(1, 3);
  BOOST_TEST(dispatcher.all_merged());
}
