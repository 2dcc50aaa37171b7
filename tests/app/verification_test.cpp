// What a comparison with the reference may and may not pass, and which rows are compared.
#define BOOST_TEST_MODULE app_verification
#include "app/verification.hpp"

#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <set>
#include <tuple>

using namespace stream_cqsa;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

Problem problem_of(std::int64_t batch, std::int64_t length, std::int64_t heads) {
  Problem problem;
  problem.batch = batch;
  problem.query_heads = problem.kv_heads = heads;
  problem.query_length = problem.key_length = length;
  problem.head_dim = 2;
  return problem;
}

// A row whose values, or whose scores, may leave fp32.
ReferenceRow row_of(double max_abs_value, double max_score_magnitude) {
  ReferenceRow row;
  row.output = {1.0, -1.0};
  row.lse = 3;
  row.max_abs_value = max_abs_value;
  row.max_score_magnitude = max_score_magnitude;
  return row;
}

RowCheck check(const ReferenceRow& row, std::vector<double> output) {
  return check_row(problem_of(1, 100, 1), row, output);
}

RowCheck lse_check(double want, double got, double score_magnitude = 10) {
  ReferenceRow row = row_of(1, score_magnitude);
  row.lse = want;
  return check_lse(problem_of(1, 100, 1), row, got);
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_row_without_a_bound_is_not_comparable_and_never_nan) {
  BOOST_TEST(check(row_of(2, 10), {1.0, -1.0}).comparable());
  for (const ReferenceRow& row : {row_of(1e38, 10), row_of(2, 1e38), row_of(infinity, 10)}) {
    for (const double got : {1.0, 5.0, infinity, -infinity}) {
      const RowCheck found = check(row, {got, -1.0});
      BOOST_TEST(!found.comparable());
      BOOST_TEST(found.ok);
    }
    BOOST_TEST(!check(row, {not_a_number, -1.0}).ok);
    BOOST_TEST(!check(row, {1.0, not_a_number}).ok);
    BOOST_TEST(!check(row, {1.0}).ok);
  }
  ReferenceRow poisoned = row_of(1e38, 10);
  poisoned.output = {not_a_number, 1.0};
  BOOST_TEST(check(poisoned, {not_a_number, 1.0}).ok);
  BOOST_TEST(!check(poisoned, {0.0, 1.0}).ok);
}

BOOST_AUTO_TEST_CASE(a_value_beyond_the_type_overflows_to_its_own_side) {
  Problem problem = problem_of(1, 4, 1);
  problem.output_dtype = DType::f16;
  ReferenceRow row = row_of(80000, 1);
  row.output = {70000.0, -70000.0};
  const auto ok = [&](std::vector<double> got) { return check_row(problem, row, got).ok; };
  BOOST_TEST(ok({infinity, -infinity}));
  BOOST_TEST(!ok({infinity, infinity}));
  BOOST_TEST(!ok({not_a_number, -infinity}));
}

BOOST_AUTO_TEST_CASE(lse_within_its_bound) {
  const double allowed = lse_check(3, 3).allowed;
  BOOST_TEST(allowed > 0);
  BOOST_TEST(allowed < 1e-4);
  BOOST_TEST(lse_check(3, 3 + 0.9 * allowed).ok);
  BOOST_TEST(!lse_check(3, 3 + 1.1 * allowed).ok);
  for (const double got : {not_a_number, infinity, -infinity}) BOOST_TEST(!lse_check(3, got).ok);
  BOOST_TEST(lse_check(3, -infinity, 1e38).ok);
  BOOST_TEST(!lse_check(3, 3, 1e38).comparable());
  BOOST_TEST(!lse_check(3, not_a_number, 1e38).ok);
}

BOOST_AUTO_TEST_CASE(lse_that_is_not_finite) {
  BOOST_TEST(lse_check(-infinity, -infinity).ok);
  for (const double got : {not_a_number, infinity, 0.0}) BOOST_TEST(!lse_check(-infinity, got).ok);
  BOOST_TEST(lse_check(not_a_number, not_a_number).ok);
  BOOST_TEST(lse_check(not_a_number, infinity).ok);
  BOOST_TEST(!lse_check(not_a_number, 3).ok);
}

BOOST_AUTO_TEST_CASE(counts_and_words) {
  Verification verification;
  BOOST_TEST(describe(verification) == "no rows checked");
  const RowCheck good{1e-6, 1e-3, true};
  const RowCheck free{1.0, infinity, true};
  const RowCheck nan{0, infinity, false};
  verification.rows = {{{0, 1, 2}, free, {}}, {{0, 2, 2}, free, {}}};
  BOOST_TEST(verification.ok());
  BOOST_TEST(verification.compared() == 0);
  BOOST_TEST(describe(verification).starts_with("NOT COMPARABLE: "));
  verification.rows.push_back({{0, 7, 2}, good, {}});
  BOOST_TEST(verification.not_comparable() == 2);
  BOOST_TEST(describe(verification) ==
             "verified: 1 row against fp64; worst at batch 0, token 7, head 2: error 1e-06, "
             "allowed 0.001; not comparable: 2 rows with infinite bound");
  BOOST_TEST(to_json(verification)["rows"][0]["comparable"] == false);
  verification.rows.push_back({{0, 8, 2}, good, RowCheck{2, 1, false}});
  BOOST_TEST(!verification.ok());
  BOOST_TEST(describe(verification).find("FAILED") == 0);
  BOOST_TEST(describe(verification).find("lse: worst at batch 0, token 8") != std::string::npos);
  verification.rows.push_back({{0, 9, 2}, nan, {}});
  BOOST_TEST(describe(verification).find("token 9, head 2: NaN") != std::string::npos);
}

BOOST_AUTO_TEST_CASE(rows_are_limited_by_their_work_and_their_memory) {
  Problem problem = problem_of(1, 1 << 20, 8);
  problem.head_dim = 64;
  BOOST_TEST(most_rows(problem) == 1 << 16);
  problem.key_length = std::int64_t{1} << 30;
  problem.head_dim = 128;
  BOOST_TEST(most_rows(problem) == 32);
  problem.key_length = std::int64_t{1} << 40;
  BOOST_TEST(most_rows(problem) == 1);
  problem.key_length = 1;
  const std::int64_t rows = most_rows(problem);
  BOOST_TEST(rows > 100000);
  BOOST_TEST(rows * 3 * 8 * problem.head_dim < std::int64_t{1} << 30);
}

BOOST_AUTO_TEST_CASE(visible_keys_are_those_that_the_mask_keeps) {
  Problem problem = problem_of(2, 10, 3);
  problem.key_length = 7;
  const auto rows = sample_rows(problem, 60, 1);
  BOOST_TEST(visible_keys(problem, rows) == 60 * 7);
  problem.mask = Mask::causal;
  // Queries 0 to 2 see no key, query i sees i - 2.
  BOOST_TEST(visible_keys(problem, rows) == 6 * (1 + 2 + 3 + 4 + 5 + 6 + 7));
}

BOOST_AUTO_TEST_CASE(sampled_rows_are_different_and_start_with_the_ends) {
  for (const auto& [batch, length, heads, count] : {std::tuple{1, 1, 1, 8},
                                                    {1, 2, 1, 2},
                                                    {3, 100, 2, 50},
                                                    {2, 50, 2, 200},
                                                    {2, 50, 2, 199},
                                                    {1, 1 << 20, 16, 100000}}) {
    const Problem problem = problem_of(batch, length, heads);
    const auto rows = sample_rows(problem, count, 1);
    const std::int64_t total = std::int64_t{batch} * length * heads;
    BOOST_REQUIRE(static_cast<std::int64_t>(rows.size()) == std::min<std::int64_t>(count, total));
    BOOST_TEST((rows.front() == RowIndex{0, 0, 0}));
    if (rows.size() > 1) BOOST_TEST((rows[1] == RowIndex{batch - 1, length - 1, heads - 1}));
    std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> seen;
    for (const RowIndex& row : rows) {
      BOOST_REQUIRE((row.batch < batch && row.token < length && row.head < heads));
      seen.insert({row.batch, row.token, row.head});
    }
    BOOST_TEST(seen.size() == rows.size());
    BOOST_TEST((sample_rows(problem, count, 1) == rows));
  }
  BOOST_TEST(sample_rows(problem_of(1, 10, 1), 0, 1).empty());
}
