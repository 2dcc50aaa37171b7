#define BOOST_TEST_MODULE engine_slots
#include <boost/test/unit_test.hpp>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <tuple>

#include "core/plan_sizes.hpp"
#include "engine/slot_cache.hpp"
#include "engine/use_table.hpp"
#include "stream_cqsa/difference_cover.hpp"
#include "support/small_plan.hpp"

using namespace stream_cqsa;
using stream_cqsa::testing::small_plan;
using stream_cqsa::testing::SmallPlan;

namespace {

// Next use by walking the whole schedule.
std::int64_t next_by_search(const Plan& plan, Side side, std::int64_t batch, std::int64_t group,
                            std::int64_t chunk, std::int64_t after) {
  for (std::int64_t id = after + 1; id < plan.subproblem_count(); ++id) {
    const SubproblemKey key = plan.key(id);
    if (key.batch != batch || (group >= 0 && key.group != group)) continue;
    const QuorumWork work = plan.work(id);
    for (const ChunkPair& pair : work.pairs) {
      const auto position = static_cast<std::size_t>(side == Side::query ? pair.query : pair.key);
      if (work.chunks[position].index == chunk) return id;
    }
  }
  return never;
}

// The rule of SlotCache in plain words: all slots are looked through for the best one to take.
class PlainSlots {
 public:
  explicit PlainSlots(std::int64_t slots) : slots_(static_cast<std::size_t>(slots)) {}

  std::vector<SlotCache::Assignment> assign(const std::vector<SlotCache::Need>& needs) {
    for (Slot& slot : slots_) {
      if (slot.next_use < step_) slot.next_use = never;
    }
    std::vector<SlotCache::Assignment> assigned(needs.size(), {-1, true});
    for (const bool load : {false, true}) {
      for (std::size_t i = 0; i < needs.size(); ++i) {
        if (assigned[i].slot >= 0) continue;
        const std::size_t at = load ? best() : holder(needs[i].key);
        if (at == slots_.size()) continue;
        slots_[at] = {needs[i].key, needs[i].next_use, step_};
        assigned[i] = {static_cast<std::int32_t>(at), load};
      }
    }
    ++step_;
    return assigned;
  }

 private:
  struct Slot {
    std::optional<ChunkKey> key;
    std::int64_t next_use = never;
    std::int64_t last_step = -2;
  };
  std::size_t holder(const ChunkKey& key) const {
    std::size_t at = 0;
    while (at < slots_.size() && slots_[at].key != key) ++at;
    return at;
  }
  std::size_t best() const {
    const auto rank = [&](const Slot& slot) {
      return std::tuple(slot.last_step != step_, !slot.key, slot.last_step < step_ - 1,
                        slot.next_use);
    };
    std::size_t best = 0;
    for (std::size_t i = 1; i < slots_.size(); ++i) {
      if (rank(slots_[i]) > rank(slots_[best])) best = i;
    }
    return best;
  }
  std::vector<Slot> slots_;
  std::int64_t step_ = 0;
};

// Lengths of fewer tiles than chunks leave chunks empty; more queries than keys leave rows blind.
void check_uses(SmallPlan small) {
  for (const bool causal : {false, true}) {
    for (const auto& [queries, keys] : {std::pair{60, 60}, {60, 9}, {9, 60}, {5, 5}}) {
      small.length = queries;
      small.key_length = keys;
      small.causal = causal;
      const Plan plan = small_plan(small);
      UseTable uses(plan);
      for (std::int64_t chunk = 0; chunk < plan.division.chunk_count(); ++chunk) {
        const auto of_query = plan.division.quorums_of_query(chunk);
        const auto of_key = plan.division.quorums_of_key(chunk);
        const QuorumList query = uses.quorums(Side::query, chunk);
        const QuorumList key = uses.quorums(Side::key, chunk);
        BOOST_TEST(query.size() == of_query.size());
        BOOST_TEST(std::equal(query.begin(), query.end(), of_query.begin(), of_query.end()));
        BOOST_TEST(std::equal(key.begin(), key.end(), of_key.begin(), of_key.end()));
      }
    }
  }
}

void check_next_uses(SmallPlan small) {
  small.batch = small.kv_heads = 2;
  const Plan plan = small_plan(small);
  UseTable uses(plan);
  for (std::int64_t id = -1; id < plan.subproblem_count(); ++id) {
    for (std::int64_t chunk = 0; chunk < plan.division.chunk_count(); ++chunk) {
      for (const Side side : {Side::query, Side::key}) {
        BOOST_TEST(uses.next(side, 1, 0, chunk, id) == next_by_search(plan, side, 1, 0, chunk, id));
        BOOST_TEST(uses.next_of_any_group(side, 0, chunk, id) ==
                   next_by_search(plan, side, 0, -1, chunk, id));
      }
    }
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(quorums_are_those_of_the_division) {
  for (const std::int64_t c : {1, 2, 4, 13, 57}) check_uses({.chunks = c});
}

BOOST_AUTO_TEST_CASE(tiles_of_a_chunk_are_those_of_the_division) {
  for (const Grid& grid : {Grid{1, 1}, {1, 7}, {7, 1}, {3, 57}, {57, 3}, {13, 13}})
    check_uses({.grid = grid});
}

BOOST_AUTO_TEST_CASE(slots_are_taken_by_the_rule) {
  std::mt19937_64 random(17);
  for (int trial = 0; trial < 300; ++trial) {
    const std::int64_t slots = 4 + static_cast<std::int64_t>(random() % 9);
    SlotCache cache(slots);
    PlainSlots plain(slots);
    for (std::int64_t step = 0; step < 50; ++step) {
      std::map<ChunkKey, std::int64_t> chunks;
      const std::uint64_t count = random() % 5;
      while (chunks.size() < count) {
        // Few different next uses: ties are common.
        const std::int64_t next =
            random() % 4 ? step + 1 + static_cast<std::int64_t>(random() % 6) : never;
        chunks[{0, static_cast<std::int64_t>(random() % 2),
                static_cast<std::int64_t>(random() % 8)}] = next;
      }
      std::vector<SlotCache::Need> needs;
      for (const auto& [key, next] : chunks) needs.push_back({key, next});
      const auto assigned = cache.assign(needs, step), expected = plain.assign(needs);
      for (std::size_t i = 0; i < needs.size(); ++i) {
        BOOST_TEST(assigned[i].slot == expected[i].slot);
        BOOST_TEST(assigned[i].load == expected[i].load);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(next_use_is_that_of_the_schedule) {
  for (const bool causal : {false, true}) {
    for (const std::int64_t c : {1, 2, 7, 12}) check_next_uses({.causal = causal, .chunks = c});
    for (const Grid& grid : {Grid{1, 5}, {5, 1}, {3, 7}, {7, 3}})
      check_next_uses({.causal = causal, .grid = grid});
  }
}

BOOST_AUTO_TEST_CASE(a_kept_chunk_is_not_loaded_again_and_slots_are_never_shared) {
  std::mt19937_64 random(11);
  for (int trial = 0; trial < 200; ++trial) {
    const std::int64_t slots = 3 + static_cast<std::int64_t>(random() % 8);
    SlotCache cache(slots);
    std::map<std::int32_t, std::int64_t> content;  // slot: chunk
    for (int step = 0; step < 60; ++step) {
      std::set<std::int64_t> chunks;
      while (static_cast<std::int64_t>(chunks.size()) < 3)
        chunks.insert(static_cast<std::int64_t>(random() % 12));
      std::vector<SlotCache::Need> needs;
      for (const std::int64_t chunk : chunks) {
        needs.push_back({{0, 0, chunk}, step + 1 + static_cast<std::int64_t>(random() % 20)});
      }
      const auto assigned = cache.assign(needs, step);
      std::set<std::int32_t> used;
      for (std::size_t i = 0; i < needs.size(); ++i) {
        const auto [slot, load] = assigned[i];
        BOOST_TEST(slot >= 0);
        BOOST_TEST(slot < slots);
        BOOST_TEST(used.insert(slot).second);
        const bool there = content.count(slot) && content[slot] == needs[i].key.chunk;
        BOOST_TEST(load == !there);
        content[slot] = needs[i].key.chunk;
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(the_farthest_next_use_goes_first) {
  SlotCache cache(3);
  const SlotCache::Need first[] = {{{0, 0, 0}, 9}, {{0, 0, 1}, 4}, {{0, 0, 2}, 6}};
  cache.assign(first, 0);
  cache.assign({}, 1);  // nothing is computing any more
  cache.assign({}, 2);
  const SlotCache::Need second[] = {{{0, 0, 3}, 5}};
  BOOST_TEST(cache.assign(second, 3)[0].slot == cache.assign(second, 4)[0].slot);
  const SlotCache::Need third[] = {{{0, 0, 1}, 8}, {{0, 0, 2}, 8}};
  for (const auto& kept : cache.assign(third, 5)) BOOST_TEST(!kept.load);
}

BOOST_AUTO_TEST_CASE(a_slot_that_is_computing_is_spared) {
  SlotCache cache(4);
  const SlotCache::Need first[] = {{{0, 0, 0}, 9}, {{0, 0, 1}, 9}};
  const SlotCache::Need second[] = {{{0, 0, 2}, 100}, {{0, 0, 3}, 100}};
  cache.assign(first, 0);
  const auto busy = cache.assign(second, 1);
  const SlotCache::Need third[] = {{{0, 0, 4}, 5}, {{0, 0, 5}, 5}};
  for (const auto& assigned : cache.assign(third, 2)) {
    for (const auto& other : busy) BOOST_TEST(assigned.slot != other.slot);
  }
}

BOOST_AUTO_TEST_CASE(a_next_use_that_has_passed_is_none) {
  SlotCache cache(2);
  const SlotCache::Need first[] = {{{0, 0, 0}, 3}, {{0, 0, 1}, 7}};
  cache.assign(first, 0);
  const SlotCache::Need second[] = {{{0, 0, 2}, 9}};  // subproblem 3 was left out
  cache.assign(second, 5);
  const SlotCache::Need third[] = {{{0, 0, 1}, never}};
  BOOST_TEST(!cache.assign(third, 7)[0].load);
}

BOOST_AUTO_TEST_CASE(more_needs_than_slots_are_refused) {
  SlotCache cache(1);
  const SlotCache::Need needs[] = {{{0, 0, 0}, 1}, {{0, 0, 1}, 1}};
  BOOST_CHECK_THROW(cache.assign(needs, 0), std::logic_error);
}

// By the rule of the engine.
double loads_of(const Plan& plan, Side side) {
  UseTable uses(plan);
  SlotCache cache(side == Side::query ? plan.device.query_slots : plan.device.kv_slots);
  std::int64_t loads = 0;
  for (std::int64_t id = 0; id < plan.subproblem_count(); ++id) {
    const SubproblemKey key = plan.key(id);
    const QuorumWork work = plan.work(id);
    std::set<std::int64_t> chunks;
    for (const ChunkPair& pair : work.pairs) {
      const auto position = static_cast<std::size_t>(side == Side::query ? pair.query : pair.key);
      chunks.insert(work.chunks[position].index);
    }
    std::vector<SlotCache::Need> needs;
    for (const std::int64_t chunk : chunks) {
      needs.push_back(
          {{key.batch, key.group, chunk}, uses.next(side, key.batch, key.group, chunk, id)});
    }
    for (const auto& assigned : cache.assign(needs, id)) loads += assigned.load;
  }
  return static_cast<double>(loads);
}

// Compares at budgets from the smallest on; how many.
int compare_loads(PlanRequest request, std::int64_t chunks) {
  request.problem.query_length = request.problem.key_length = chunks * 128;
  request.problem.head_dim = 64;
  request.chunks = chunks;
  request.host_accumulators = true;
  request.host_budget = std::int64_t{1} << 30;
  const double chunk_bytes = 128 * 64 * 4;
  const std::int64_t smallest = smallest_device_budget(request);
  int compared = 0;
  for (std::int64_t budget = smallest; budget < 16 * smallest; budget += budget / 8) {
    request.device_budget = budget;
    const Plan plan = make_plan(request);
    if (plan.device.query_slots < difference_cover_size(chunks)) continue;  // in parts
    const double counted =
        chunk_bytes * (loads_of(plan, Side::query) + 2 * loads_of(plan, Side::key));
    BOOST_TEST_CONTEXT("c = " << chunks << ", " << plan.groups.size() << " head groups, "
                              << plan.device.query_slots << " and " << plan.device.kv_slots
                              << " slots") {
      BOOST_TEST(estimate_traffic(plan).copied_in == counted, boost::test_tools::tolerance(0.25));
    }
    ++compared;
  }
  return compared;
}

BOOST_AUTO_TEST_CASE(the_estimated_bytes_into_the_device_are_about_those_loaded) {
  int compared = 0;
  for (const Mask mask : {Mask::none, Mask::causal}) {
    for (const std::int64_t chunks : {31, 57, 133}) {
      PlanRequest request;
      request.problem.mask = mask;
      compared += compare_loads(request, chunks);
    }
  }
  BOOST_TEST(compared > 50);
}

BOOST_AUTO_TEST_CASE(head_groups_that_take_turns_load_more) {
  int compared = 0;
  for (const Mask mask : {Mask::none, Mask::causal}) {
    for (const std::int64_t heads : {4, 8}) {
      PlanRequest request;
      request.problem.mask = mask;
      request.problem.query_heads = request.problem.kv_heads = heads;
      request.heads_per_group = 1;
      request.order = ScheduleOrder::groups_inner;
      for (const std::int64_t chunks : {3, 7, 31, 57}) compared += compare_loads(request, chunks);
    }
  }
  BOOST_TEST(compared > 50);
}
