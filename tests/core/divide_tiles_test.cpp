// Divisions into rectangular tiles.
#include <boost/test/unit_test.hpp>
#include <random>
#include <set>
#include <vector>

#include "core/exactly_once.hpp"
#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

// What every method says of the tiles against what work() hands out.
void check_maps(const Problem& problem, const Division& division) {
  const std::int64_t chunks = division.chunk_count();
  std::vector<std::set<std::int64_t>> of_query(chunks), of_key(chunks);
  for (std::int64_t i = 0; i < division.quorum_count(); ++i) {
    const QuorumWork work = division.work(i);
    BOOST_REQUIRE(work.pairs.size() <= 1);
    for (const Chunk& chunk : work.chunks) BOOST_REQUIRE(chunk == division.chunk(chunk.index));
    for (const ChunkPair& pair : work.pairs) {
      const std::int64_t p = work.chunks[pair.query].index, q = work.chunks[pair.key].index;
      BOOST_REQUIRE_EQUAL(division.owner(p, q), i);
      BOOST_REQUIRE_EQUAL(division.query_chunk_of(i, 0), p);
      of_query[p].insert(i);
      of_key[q].insert(i);
    }
  }
  std::int64_t queries = 0, keys = 0;
  for (std::int64_t p = 0; p < chunks; ++p) {
    const std::vector<std::int64_t> query(of_query[p].begin(), of_query[p].end());
    const std::vector<std::int64_t> key(of_key[p].begin(), of_key[p].end());
    BOOST_REQUIRE_MESSAGE(division.quorums_of_query(p) == query, "row " << p);
    BOOST_REQUIRE_MESSAGE(division.quorums_of_key(p) == key, "column " << p);
    BOOST_REQUIRE(static_cast<std::int64_t>(query.size()) <= division.most_partials());
    // Chunks follow one another without a gap, on multiples of the tile.
    const Chunk chunk = division.chunk(p);
    BOOST_REQUIRE_EQUAL(chunk.index, p);
    BOOST_REQUIRE_EQUAL(chunk.queries.begin, queries);
    BOOST_REQUIRE_EQUAL(chunk.keys.begin, keys);
    BOOST_REQUIRE(chunk.queries.empty() || queries % division.tile() == 0);
    BOOST_REQUIRE(chunk.keys.empty() || keys % division.tile() == 0);
    queries = chunk.queries.end;
    keys = chunk.keys.end;
  }
  BOOST_REQUIRE_EQUAL(queries, problem.query_length);
  BOOST_REQUIRE_EQUAL(keys, problem.key_length);
}

void check_grid(std::int64_t nq, std::int64_t nk, const Grid& grid, std::int64_t tile,
                const std::vector<std::int64_t>& parts = {}) {
  for (const Mask mask : {Mask::none, Mask::causal}) {
    const Problem problem = make_problem(nq, nk, mask);
    const Division division(problem, grid, tile);
    BOOST_TEST_CONTEXT("a grid of " << grid.rows << "x" << grid.columns) {
      check_exactly_once(problem, division, parts);
      check_maps(problem, division);
    }
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(the_example_of_tiles) {
  const Division division(make_problem(4, 6, Mask::none), Grid{2, 3}, 1);
  BOOST_TEST((division.scheme() == Scheme::tiles));
  BOOST_TEST(division.chunk_count() == 3);
  BOOST_TEST(division.quorum_count() == 6);
  BOOST_TEST(division.quorum_size() == 1);
  BOOST_TEST(division.most_partials() == 3);
  const QuorumWork square = division.work(4), oblong = division.work(5);
  BOOST_TEST((square.chunks == std::vector<Chunk>{{1, {2, 4}, {2, 4}}}));
  BOOST_TEST((square.pairs == std::vector<ChunkPair>{{0, 0, Liveness::full}}));
  BOOST_TEST((oblong.chunks == std::vector<Chunk>{{1, {2, 4}, {2, 4}}, {2, {4, 4}, {4, 6}}}));
  BOOST_TEST((oblong.pairs == std::vector<ChunkPair>{{0, 1, Liveness::full}}));
}

BOOST_AUTO_TEST_CASE(tiles_of_any_grid_are_computed_once) {
  for (const Grid& grid :
       {Grid{1, 1}, {1, 9}, {9, 1}, {2, 7}, {7, 2}, {12, 12}, {5, 31}, {31, 5}}) {
    for (const auto& [nq, nk] :
         {IndexPair{50, 130}, {130, 50}, {1, 100}, {100, 1}, {64, 63}, {90, 90}, {5, 5}, {1, 1}}) {
      check_grid(nq, nk, grid, 1);
      check_grid(nq, nk, grid, 16);
      check_grid(nq, nk, grid, 128);
      check_grid(nq, nk, grid, 1, {2});
      check_grid(nq, nk, grid, 4, {3, 2});
    }
  }
}

BOOST_AUTO_TEST_CASE(random_tiles) {
  const unsigned seed = 7;
  BOOST_TEST_CONTEXT("seed " << seed) {
    std::mt19937 random(seed);
    const auto draw = [&](std::int64_t low, std::int64_t high) {
      return low + static_cast<std::int64_t>(random() % (high - low + 1));
    };
    for (int trial = 0; trial < 300; ++trial) {
      std::vector<std::int64_t> parts(draw(0, 2));
      for (std::int64_t& m : parts) m = draw(1, 5);
      const std::int64_t nq = draw(1, 200), nk = draw(0, 1) ? nq : draw(1, 200);
      check_grid(nq, nk, {draw(1, 40), draw(1, 40)}, draw(1, 20), parts);
    }
  }
}

BOOST_AUTO_TEST_CASE(tiles_of_hostile_grids) {
  const Problem problem = make_problem(64, 64, Mask::none);
  for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{-1}, max_modulus + 1, INT64_MAX}) {
    BOOST_CHECK_THROW(Division(problem, Grid{bad, 2}, 1), InputError);
    BOOST_CHECK_THROW(Division(problem, Grid{2, bad}, 1), InputError);
  }
  BOOST_CHECK_THROW(Division(problem, Grid{2, 2}, 0), InputError);
  const Division largest(problem, Grid{max_modulus, max_modulus}, 1);
  BOOST_TEST(largest.quorum_count() == max_modulus * max_modulus);
  BOOST_TEST(largest.work(63 * max_modulus + 63).pairs.size() == 1u);
  BOOST_TEST(largest.work(largest.quorum_count() - 1).pairs.empty());
}
