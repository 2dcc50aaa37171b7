#define BOOST_TEST_MODULE merge_shares
#include "core/merge_shares.hpp"

#include <algorithm>
#include <array>
#include <boost/test/unit_test.hpp>
#include <numeric>
#include <random>
#include <vector>

#include "engine/piece_table.hpp"
#include "support/run_plan.hpp"
#include "support/small_plan.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

Plan random_plan(std::mt19937_64& random) {
  SmallPlan small;
  small.batch = 1 + static_cast<std::int64_t>(random() % 2);
  small.kv_heads = 1 + static_cast<std::int64_t>(random() % 3);
  small.length = 20 + static_cast<std::int64_t>(random() % 400);
  small.key_length = random() % 3 == 0 ? 1 + static_cast<std::int64_t>(random() % 100) : 0;
  small.causal = random() % 2 == 0;
  small.chunks = std::array<std::int64_t, 6>{1, 3, 7, 13, 31, 57}[random() % 6];
  if (random() % 3 == 0) small.grid = random_grid(random);
  return small_plan(small);
}

// Rows of a chunk that are merged, one after another, and written.
double work_of(const Plan& plan, std::int64_t chunk) {
  const auto partials = static_cast<double>(plan.division.quorums_of_query(chunk).size());
  return (partials + 1) * static_cast<double>(plan.division.chunk(chunk).queries.size());
}

}  // namespace

BOOST_AUTO_TEST_CASE(every_chunk_has_one_rank_and_the_ranks_have_about_equal_work) {
  std::mt19937_64 random(1);
  for (int trial = 0; trial < 200; ++trial) {
    const Plan plan = random_plan(random);
    const int mergers = static_cast<int>(random() % 5);
    const MergeShares shares(plan, mergers);
    BOOST_TEST(shares.ranks() == mergers + 1);
    const std::int64_t chunks = plan.division.chunk_count();
    double all = 0, largest_chunk = 0;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      all += work_of(plan, chunk);
      largest_chunk = std::max(largest_chunk, work_of(plan, chunk));
    }
    std::int64_t next = 0;
    for (int rank = 0; rank <= mergers; ++rank) {
      const Range own = shares.chunks(rank);
      BOOST_TEST(own.begin == next);
      next = own.end;
      double work = 0;
      for (std::int64_t chunk = own.begin; chunk < own.end; ++chunk) {
        BOOST_TEST(shares.rank_of(chunk) == rank);
        work += work_of(plan, chunk);
      }
      BOOST_TEST(work <= all / (mergers + 1) + largest_chunk);
    }
    BOOST_TEST(next == chunks);
  }
}

BOOST_AUTO_TEST_CASE(thirteen_chunks_of_three_ranks) {
  const MergeShares shares(small_plan({.length = 26, .chunks = 13}), 2);
  BOOST_TEST((shares.chunks(0) == Range{0, 5}));
  BOOST_TEST((shares.chunks(1) == Range{5, 9}));
  BOOST_TEST((shares.chunks(2) == Range{9, 13}));
}

BOOST_AUTO_TEST_CASE(the_pieces_of_all_shares_are_those_of_the_plan) {
  std::mt19937_64 random(2);
  for (int trial = 0; trial < 50; ++trial) {
    const Plan plan = random_plan(random);
    const PieceTable all(plan);
    const MergeShares shares(plan, static_cast<int>(random() % 4));
    std::vector<int> seen(static_cast<std::size_t>(all.count()), 0);
    for (int rank = 0; rank < shares.ranks(); ++rank) {
      const PieceTable own(plan, shares.chunks(rank));
      for (std::int64_t number = 0; number < own.count(); ++number) {
        const PieceKey key = own.key(number);
        BOOST_TEST(own.has(key));
        BOOST_TEST(own.number(key) == number);
        ++seen[static_cast<std::size_t>(all.number(key))];
        for (int other = 0; other < shares.ranks(); ++other) {
          if (other == rank) continue;
          const PieceTable theirs(plan, shares.chunks(other));
          BOOST_TEST(!theirs.has(key));
          BOOST_CHECK_THROW(theirs.number(key), std::logic_error);
        }
      }
    }
    BOOST_TEST(std::count(seen.begin(), seen.end(), 1) == std::ssize(seen));
  }
}
