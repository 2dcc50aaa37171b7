#define BOOST_TEST_MODULE divide
#include "stream_cqsa/divide.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <numeric>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "core/exactly_once.hpp"
#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// Whether r(d) has the difference d for every d and r(-d) is r(d) swapped: with c quorums, this
// is what makes every ordered pair of chunks computed exactly once.
bool responsibilities_are_good(const Division& division) {
  const std::int64_t c = division.chunk_count();
  const auto& residues = division.cover().residues;
  const auto r = division.responsibilities();
  if (static_cast<std::int64_t>(r.size()) != c || !(r[0] == Responsibility{0, 0})) return false;
  for (std::int64_t d = 1; d < c; ++d) {
    if ((residues.at(r[d].key) - residues.at(r[d].query) + c) % c != d) return false;
    const Responsibility swapped{r[d].key, r[d].query};
    if (2 * d != c && !(r[c - d] == swapped)) return false;
  }
  return true;
}

std::vector<IndexPair> index_pairs(const QuorumWork& work) {
  std::vector<IndexPair> result;
  for (const ChunkPair& pair : work.pairs) {
    result.emplace_back(work.chunks[pair.query].index, work.chunks[pair.key].index);
  }
  return result;
}

// owner(), quorums_of_query() and quorums_of_key() against what work() hands out.
void check_inverse_maps(const Problem& problem, std::int64_t c, std::int64_t tile) {
  const Division division(problem, c, tile);
  std::vector<std::set<std::int64_t>> of_query(c);
  std::vector<std::set<std::int64_t>> of_key(c);
  for (std::int64_t i = 0; i < c; ++i) {
    const QuorumWork work = division.work(i);
    for (const Chunk& chunk : work.chunks) BOOST_REQUIRE(chunk == division.chunk(chunk.index));
    for (const auto& [p, q] : index_pairs(work)) {
      BOOST_REQUIRE_EQUAL(division.owner(p, q), i);
      of_query[p].insert(i);
      of_key[q].insert(i);
    }
  }
  for (std::int64_t p = 0; p < c; ++p) {
    const std::vector<std::int64_t> query(of_query[p].begin(), of_query[p].end());
    const std::vector<std::int64_t> key(of_key[p].begin(), of_key[p].end());
    BOOST_REQUIRE_MESSAGE(division.quorums_of_query(p) == query, "c " << c << ", chunk " << p);
    BOOST_REQUIRE_MESSAGE(division.quorums_of_key(p) == key, "c " << c << ", chunk " << p);
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(worked_example) {
  const Division division(make_problem(7, 7, Mask::none), 7, 1);
  const std::vector<IndexPair> expected = {{2, 2}, {2, 3}, {2, 5}, {3, 2}, {3, 5}, {5, 2}, {5, 3}};
  BOOST_TEST((index_pairs(division.work(2)) == expected));
  const Division causal(make_problem(7, 7, Mask::causal), 7, 1);
  const std::vector<IndexPair> live = {{2, 2}, {3, 2}, {5, 2}, {5, 3}};
  BOOST_TEST((index_pairs(causal.work(2)) == live));
}

// Of several pairs with one difference the first stands, and where d = -d only one order.
BOOST_AUTO_TEST_CASE(choice_of_responsibilities) {
  const Division division(make_problem(4, 4, Mask::none), 4, 1);  // A = {0, 1, 2}
  const std::vector<Responsibility> expected = {{0, 0}, {0, 1}, {0, 2}, {1, 0}};
  const auto r = division.responsibilities();
  BOOST_TEST(std::equal(r.begin(), r.end(), expected.begin(), expected.end()));
}

BOOST_AUTO_TEST_CASE(depth_0_every_c) {
  for (std::int64_t c = 1; c <= 300; c += stride)
    check_both_masks(tokens_for(c, 1), tokens_for(c, 1), c, 1);
}

BOOST_AUTO_TEST_CASE(responsibilities_up_to_20000) {
  std::vector<std::int64_t> moduli(300);
  std::iota(moduli.begin(), moduli.end(), 1);
  for (std::int64_t q = 11; q * q + q + 1 <= max_modulus; ++q) moduli.push_back(q * q + q + 1);
  const unsigned seed = 3;
  std::mt19937 random(seed);
  for (int i = 0; i < 20; ++i) moduli.push_back(301 + random() % (max_modulus - 300));
  moduli.push_back(max_modulus);
  for (const std::int64_t c : moduli) {
    const Division division(make_problem(c, c, Mask::none), c, 1);
    BOOST_REQUIRE_MESSAGE(responsibilities_are_good(division), "c " << c << ", seed " << seed);
  }
}

BOOST_AUTO_TEST_CASE(work_of_large_divisions) {
  for (const std::int64_t c : {11557L, 16257L, 19999L, 20000L}) {
    const std::int64_t n = c * 64 - 17;
    const Division division(make_problem(n, n, Mask::none), c, 64);
    for (const std::int64_t i : {std::int64_t{0}, c / 2, c - 1}) {
      const QuorumWork work = division.work(i);
      BOOST_TEST(static_cast<std::int64_t>(work.pairs.size()) == c);
      BOOST_TEST(static_cast<std::int64_t>(work.chunks.size()) == division.quorum_size());
      const auto pairs = index_pairs(work);
      BOOST_TEST(std::is_sorted(pairs.begin(), pairs.end()));
      for (const auto& [p, q] : pairs) BOOST_REQUIRE_EQUAL(division.owner(p, q), i);
    }
  }
}

BOOST_AUTO_TEST_CASE(queries_and_keys_differ) {
  for (const std::int64_t c : {1, 2, 3, 7, 12, 31, 57}) {
    for (const auto& [nq, nk] : {IndexPair{50, 130}, {130, 50}, {1, 100}, {100, 1}, {64, 63}}) {
      check_both_masks(nq, nk, c, 1);
      check_both_masks(nq, nk, c, 16);
      check_both_masks(nq, nk, c, 1, {2});
      check_both_masks(nq, nk, c, 4, {3, 2});
    }
  }
}

BOOST_AUTO_TEST_CASE(fewer_tokens_than_chunks) {
  for (const std::int64_t n : {1, 2, 5, 30, 129}) {
    for (const std::int64_t c : {2, 6, 7, 31, 133, 300}) {
      check_both_masks(n, n, c, 1);
      check_both_masks(n, n, c, 8, {2});
      check_both_masks(n, n, c, 128);
    }
  }
}

BOOST_AUTO_TEST_CASE(random_problems) {
  const unsigned seed = 5;
  BOOST_TEST_CONTEXT("seed " << seed) {
    std::mt19937 random(seed);
    const auto draw = [&](std::int64_t low, std::int64_t high) {
      return low + static_cast<std::int64_t>(random() % (high - low + 1));
    };
    for (int trial = 0; trial < 150; ++trial) {
      std::vector<std::int64_t> parts(draw(0, 2));
      for (std::int64_t& m : parts) m = draw(1, 5);
      check_both_masks(draw(1, 200), draw(1, 200), draw(1, 40), draw(1, 20), parts);
      Problem rows = make_problem(draw(1, 200), draw(1, 200), Mask::causal);
      rows.queries_before = draw(0, 200);
      rows.queries_after = draw(0, 200);
      check_exactly_once(rows, draw(1, 40), draw(1, 20), parts);
    }
  }
}

BOOST_AUTO_TEST_CASE(inverse_maps_agree_with_work) {
  for (const Mask mask : {Mask::none, Mask::causal}) {
    for (std::int64_t c = 1; c <= 120; ++c) check_inverse_maps(make_problem(c, c, mask), c, 1);
    for (const std::int64_t c : {2, 7, 12, 31, 57, 133, 300}) {
      check_inverse_maps(make_problem(1000, 1000, mask), c, 4);
      check_inverse_maps(make_problem(20, 20, mask), c, 1);
      check_inverse_maps(make_problem(90, 400, mask), c, 1);
      check_inverse_maps(make_problem(400, 90, mask), c, 1);
    }
  }
}

BOOST_AUTO_TEST_CASE(causal_work_is_balanced_for_odd_c) {
  for (std::int64_t c = 1; c <= 301; c += 2) {
    const Division division(make_problem(c * 32, c * 32, Mask::causal), c, 16);
    for (std::int64_t i = 0; i < c; ++i) {
      const QuorumWork work = division.work(i);
      const auto full = std::count_if(work.pairs.begin(), work.pairs.end(), [](const auto& pair) {
        return pair.liveness == Liveness::full;
      });
      BOOST_REQUIRE_EQUAL(full, (c - 1) / 2);
      BOOST_REQUIRE_EQUAL(static_cast<std::int64_t>(work.pairs.size()), (c - 1) / 2 + 1);
    }
  }
}

BOOST_AUTO_TEST_CASE(parts_keep_the_index_and_range_of_their_chunk) {
  const Problem problem = make_problem(1000, 1500, Mask::causal);
  const Division division(problem, 13, 8);
  for (std::int64_t i = 0; i < 13; ++i) {
    for (const QuorumWork& piece : divide_again(problem, division.work(i), 3, 8)) {
      for (const Chunk& part : piece.chunks) {
        const Chunk whole = division.chunk(part.index);
        BOOST_REQUIRE(part.queries.begin >= whole.queries.begin);
        BOOST_REQUIRE(part.queries.end <= whole.queries.end);
        BOOST_REQUIRE(part.keys.begin >= whole.keys.begin && part.keys.end <= whole.keys.end);
        BOOST_REQUIRE(part.queries.begin % 8 == 0 || part.queries.empty());
        BOOST_REQUIRE(part.keys.begin % 8 == 0 || part.keys.empty());
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(hostile_arguments) {
  const Problem problem = make_problem(64, 64, Mask::none);
  for (const std::int64_t c : {std::int64_t{0}, std::int64_t{-1}, max_modulus + 1, INT64_MAX}) {
    BOOST_CHECK_THROW(Division(problem, c, 1), InputError);
  }
  for (const std::int64_t tile : {0, -16}) {
    BOOST_CHECK_THROW(Division(problem, 7, tile), InputError);
  }
  const QuorumWork work = Division(problem, 7, 1).work(0);
  for (const std::int64_t parts : {std::int64_t{0}, std::int64_t{-2}, max_modulus, INT64_MAX}) {
    BOOST_CHECK_THROW(divide_again(problem, work, parts, 1), InputError);
  }
  BOOST_CHECK_THROW(divide_again(problem, work, 2, 0), InputError);
  BOOST_TEST(divide_again(problem, {}, 2, 1).empty());
}
