#define BOOST_TEST_MODULE problem
#include "stream_cqsa/problem.hpp"

#include <boost/test/unit_test.hpp>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;

namespace {

Problem make_problem(std::int64_t query_length, std::int64_t key_length, Mask mask) {
  Problem problem;
  problem.query_length = query_length;
  problem.key_length = key_length;
  problem.head_dim = 64;
  problem.mask = mask;
  problem.scale = default_scale(64);
  return problem;
}

// The rows `rows` of such a problem.
Problem part_of(Problem problem, Range rows) {
  problem.queries_before = rows.begin;
  problem.queries_after = problem.query_length - rows.end;
  problem.query_length = rows.size();
  return problem;
}

// The mask's definition, score by score of the whole sequence.
std::int64_t count_scores(const Problem& problem, Range queries, Range keys) {
  const std::int64_t first = problem.queries_before;
  const std::int64_t whole = first + problem.query_length + problem.queries_after;
  std::int64_t count = 0;
  for (std::int64_t i = first + queries.begin; i < first + queries.end; ++i) {
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      count += problem.mask == Mask::none || j <= i + problem.key_length - whole;
    }
  }
  return count;
}

void check_block(const Problem& problem, Range queries, Range keys) {
  const std::int64_t count = count_scores(problem, queries, keys);
  const std::int64_t all = queries.empty() || keys.empty() ? 0 : queries.size() * keys.size();
  const Liveness expected = count == 0     ? Liveness::dead
                            : count == all ? Liveness::full
                                           : Liveness::partial;
  BOOST_REQUIRE_EQUAL(problem.live_scores(queries, keys), count);
  BOOST_REQUIRE(problem.liveness(queries, keys) == expected);
}

void check_refused(const std::function<void(Problem&)>& spoil, const std::string& word) {
  Problem problem = make_problem(100, 50, Mask::causal);
  spoil(problem);
  BOOST_CHECK_EXCEPTION(validate(problem), InputError, [&](const InputError& error) {
    const std::string text = error.what();
    BOOST_TEST_MESSAGE(text);
    return text.find(word) != std::string::npos && text.find('\n') == std::string::npos;
  });
}

}  // namespace

BOOST_AUTO_TEST_CASE(every_small_block_is_counted) {
  for (std::int64_t nq = 1; nq <= 6; ++nq) {
    for (std::int64_t nk = 1; nk <= 6; ++nk) {
      for (const Mask mask : {Mask::none, Mask::causal}) {
        const Problem problem = make_problem(nq, nk, mask);
        for (std::int64_t q = 0; q < 7 * 7; ++q) {
          for (std::int64_t k = 0; k < 7 * 7; ++k) {
            if (q / 7 <= nq && q % 7 <= nq && k / 7 <= nk && k % 7 <= nk) {
              check_block(problem, {q / 7, q % 7}, {k / 7, k % 7});
            }
          }
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(random_blocks_are_counted) {
  const unsigned seed = 7;
  BOOST_TEST_CONTEXT("seed " << seed) {
    std::mt19937 random(seed);
    const auto draw = [&](std::int64_t below) {
      return static_cast<std::int64_t>(random() % below);
    };
    for (int trial = 0; trial < 3000; ++trial) {
      const Problem problem =
          make_problem(1 + draw(90), 1 + draw(90), trial % 4 == 0 ? Mask::none : Mask::causal);
      const std::int64_t q = draw(problem.query_length);
      const std::int64_t k = draw(problem.key_length);
      check_block(problem, {q, q + draw(problem.query_length - q + 1)},
                  {k, k + draw(problem.key_length - k + 1)});
    }
  }
}

BOOST_AUTO_TEST_CASE(rows_of_a_sequence_are_masked_as_in_the_whole) {
  const unsigned seed = 13;
  BOOST_TEST_CONTEXT("seed " << seed) {
    std::mt19937 random(seed);
    const auto draw = [&](std::int64_t below) {
      return static_cast<std::int64_t>(random() % below);
    };
    for (int trial = 0; trial < 3000; ++trial) {
      const Problem whole =
          make_problem(1 + draw(70), 1 + draw(70), trial % 4 == 0 ? Mask::none : Mask::causal);
      const std::int64_t begin = draw(whole.query_length);
      const Range rows{begin, begin + 1 + draw(whole.query_length - begin)};
      const Problem part = part_of(whole, rows);
      validate(part);
      BOOST_REQUIRE_EQUAL(part.sequence_length(), whole.query_length);
      const std::int64_t q = draw(rows.size());
      const std::int64_t k = draw(whole.key_length);
      const Range queries{q, q + draw(rows.size() - q + 1)};
      const Range keys{k, k + draw(whole.key_length - k + 1)};
      const Range in_whole{begin + queries.begin, begin + queries.end};
      check_block(part, queries, keys);
      BOOST_REQUIRE_EQUAL(part.live_scores(queries, keys), whole.live_scores(in_whole, keys));
      BOOST_REQUIRE_EQUAL(part.visible_keys(q), whole.visible_keys(begin + q));
    }
  }
}

BOOST_AUTO_TEST_CASE(more_queries_than_keys_leaves_rows_without_keys) {
  const Problem problem = make_problem(10, 4, Mask::causal);
  BOOST_TEST(problem.visible_keys(5) == 0);
  BOOST_TEST(problem.visible_keys(6) == 1);
  BOOST_TEST(problem.visible_keys(9) == 4);
  BOOST_TEST((problem.liveness({0, 6}, {0, 4}) == Liveness::dead));
  BOOST_TEST(problem.live_scores({0, 10}, {0, 4}) == 10);
}

BOOST_AUTO_TEST_CASE(counts_are_exact_at_the_limits) {
  const std::int64_t n = std::int64_t{1} << 31;
  const Problem square = make_problem(n, n, Mask::causal);
  BOOST_TEST(square.live_scores({0, n}, {0, n}) == n / 2 * (n + 1));
  BOOST_TEST(square.live_scores({n - 1, n}, {0, n}) == n);
  BOOST_TEST(square.live_scores({n / 2, n}, {0, n / 2}) == n / 2 * (n / 2));
  BOOST_TEST(make_problem(n, n, Mask::none).live_scores({0, n}, {0, n}) == n * n);

  const std::int64_t long_keys = std::int64_t{1} << 40;
  const Problem flat = make_problem(3, long_keys, Mask::causal);
  BOOST_TEST(flat.live_scores({0, 3}, {0, long_keys}) == 3 * long_keys - 3);
  const Problem tall = make_problem(long_keys, 3, Mask::causal);
  BOOST_TEST(tall.live_scores({0, long_keys}, {0, 3}) == 6);
}

BOOST_AUTO_TEST_CASE(a_split_of_large_blocks_adds_up) {
  const unsigned seed = 11;
  BOOST_TEST_CONTEXT("seed " << seed) {
    std::mt19937_64 random(seed);
    for (int trial = 0; trial < 1000; ++trial) {
      const auto nq = static_cast<std::int64_t>(1 + random() % (std::uint64_t{1} << 31));
      const auto nk = static_cast<std::int64_t>(1 + random() % (std::uint64_t{1} << 31));
      const Problem problem = make_problem(nq, nk, Mask::causal);
      const auto q = static_cast<std::int64_t>(random() % nq);
      const auto k = static_cast<std::int64_t>(random() % nk);
      const std::int64_t parts =
          problem.live_scores({0, q}, {0, k}) + problem.live_scores({0, q}, {k, nk}) +
          problem.live_scores({q, nq}, {0, k}) + problem.live_scores({q, nq}, {k, nk});
      BOOST_REQUIRE_EQUAL(parts, problem.live_scores({0, nq}, {0, nk}));
    }
  }
}

BOOST_AUTO_TEST_CASE(good_problems_are_accepted) {
  BOOST_CHECK_NO_THROW(validate(make_problem(1, 1, Mask::none)));
  Problem grouped = make_problem(std::int64_t{1} << 30, std::int64_t{1} << 30, Mask::causal);
  grouped.query_heads = 4;
  grouped.kv_heads = 2;
  grouped.head_dim = 256;
  grouped.scale = -0.5;
  BOOST_CHECK_NO_THROW(validate(grouped));
}

BOOST_AUTO_TEST_CASE(bad_problems_are_refused_in_one_line) {
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t bad : {std::int64_t{0}, std::int64_t{-1}, -huge - 1}) {
    check_refused([&](Problem& p) { p.batch = bad; }, "batch");
    check_refused([&](Problem& p) { p.query_heads = bad; }, "query heads");
    check_refused([&](Problem& p) { p.kv_heads = bad; }, "key/value heads");
    check_refused([&](Problem& p) { p.query_length = bad; }, "query length");
    check_refused([&](Problem& p) { p.key_length = bad; }, "key length");
    check_refused([&](Problem& p) { p.head_dim = bad; }, "head dimension");
  }
  check_refused([](Problem& p) { p.head_dim = 257; }, "256");
  check_refused([](Problem& p) { p.query_heads = 8, p.kv_heads = 3; }, "multiple");
  check_refused([](Problem& p) { p.kv_heads = 2; }, "multiple");
  check_refused([](Problem& p) { p.scale = std::numeric_limits<double>::infinity(); }, "scale");
  check_refused([](Problem& p) { p.scale = std::numeric_limits<double>::quiet_NaN(); }, "scale");
  check_refused([&](Problem& p) { p.query_length = huge; }, "too large");
  check_refused([&](Problem& p) { p.batch = huge; }, "too large");
  check_refused([&](Problem& p) { p.queries_before = -1; }, "-1 query rows before");
  check_refused([&](Problem& p) { p.queries_after = -huge - 1; }, "after");
  check_refused([&](Problem& p) { p.queries_before = huge, p.queries_after = huge; }, "too large");
  check_refused([&](Problem& p) { p.queries_after = std::int64_t{1} << 43; }, "too large");
  check_refused([&](Problem& p) { p.query_heads = huge, p.kv_heads = huge; }, "too large");
  check_refused([](Problem& p) { p.query_length = p.key_length = std::int64_t{1} << 32; },
                "scores");
}

BOOST_AUTO_TEST_CASE(head_groups_map_to_query_heads) {
  Problem problem = make_problem(4, 4, Mask::none);
  problem.query_heads = 12;
  problem.kv_heads = 4;
  const HeadGroup group{1, 2};
  BOOST_TEST((group.kv_heads() == Range{1, 3}));
  BOOST_TEST((group.query_heads(problem) == Range{3, 9}));
}

BOOST_AUTO_TEST_CASE(split_is_a_partition_on_tile_boundaries) {
  BOOST_TEST((split(1000, 128, 3, 0) == Range{0, 256}));
  BOOST_TEST((split(1000, 128, 3, 1) == Range{256, 640}));
  BOOST_TEST((split(1000, 128, 3, 2) == Range{640, 1000}));
  for (const std::int64_t length : {1, 5, 127, 128, 129, 1000, 4096}) {
    for (const std::int64_t tile : {1, 16, 128}) {
      for (const std::int64_t parts : {1, 2, 3, 7, 31, 300}) {
        std::int64_t end = 0;
        for (std::int64_t i = 0; i < parts; ++i) {
          const Range part = split(length, tile, parts, i);
          BOOST_REQUIRE_EQUAL(part.begin, end);
          BOOST_REQUIRE(part.end >= part.begin && (part.begin % tile == 0 || part.empty()));
          const std::int64_t tiles = ceil_div(part.size(), tile);
          BOOST_REQUIRE(tiles * parts > ceil_div(length, tile) - parts);
          BOOST_REQUIRE(tiles * parts < ceil_div(length, tile) + parts);
          end = part.end;
        }
        BOOST_REQUIRE_EQUAL(end, length);
      }
    }
  }
}
