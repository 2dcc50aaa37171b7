#define BOOST_TEST_MODULE engine_slots
#include <boost/test/unit_test.hpp>
#include <map>
#include <random>
#include <set>

#include "engine/slot_cache.hpp"
#include "engine/use_table.hpp"
#include "support/small_plan.hpp"

using namespace stream_cqsa;
using stream_cqsa::testing::small_plan;

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

}  // namespace

BOOST_AUTO_TEST_CASE(next_use_is_that_of_the_schedule) {
  for (const bool causal : {false, true}) {
    for (const std::int64_t c : {1, 2, 7, 12}) {
      const Plan plan =
          small_plan({.batch = 2, .kv_heads = 2, .length = 24, .causal = causal, .chunks = c});
      UseTable uses(plan);
      for (std::int64_t id = -1; id < plan.subproblem_count(); ++id) {
        for (std::int64_t chunk = 0; chunk < c; ++chunk) {
          for (const Side side : {Side::query, Side::key}) {
            BOOST_TEST(uses.next(side, 1, 0, chunk, id) ==
                       next_by_search(plan, side, 1, 0, chunk, id));
            BOOST_TEST(uses.next_of_any_group(side, 0, chunk, id) ==
                       next_by_search(plan, side, 0, -1, chunk, id));
          }
        }
      }
    }
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
      const auto assigned = cache.assign(needs);
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
  cache.assign(first);
  cache.assign({});  // nothing is computing any more
  cache.assign({});
  const SlotCache::Need second[] = {{{0, 0, 3}, 5}};
  BOOST_TEST(cache.assign(second)[0].slot == cache.assign(second)[0].slot);
  const SlotCache::Need third[] = {{{0, 0, 1}, 8}, {{0, 0, 2}, 8}};
  for (const auto& kept : cache.assign(third)) BOOST_TEST(!kept.load);
}

BOOST_AUTO_TEST_CASE(a_slot_that_is_computing_is_spared) {
  SlotCache cache(4);
  const SlotCache::Need first[] = {{{0, 0, 0}, 9}, {{0, 0, 1}, 9}};
  const SlotCache::Need second[] = {{{0, 0, 2}, 100}, {{0, 0, 3}, 100}};
  cache.assign(first);
  const auto busy = cache.assign(second);
  const SlotCache::Need third[] = {{{0, 0, 4}, 5}, {{0, 0, 5}, 5}};
  for (const auto& assigned : cache.assign(third)) {
    for (const auto& other : busy) BOOST_TEST(assigned.slot != other.slot);
  }
}

BOOST_AUTO_TEST_CASE(more_needs_than_slots_are_refused) {
  SlotCache cache(1);
  const SlotCache::Need needs[] = {{{0, 0, 0}, 1}, {{0, 0, 1}, 1}};
  BOOST_CHECK_THROW(cache.assign(needs), std::logic_error);
}
