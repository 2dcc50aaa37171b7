// The fp64 reference against attention by its definition, and its comparison rule.
#define BOOST_TEST_MODULE reference
#include "stream_cqsa/reference.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <random>
#include <utility>

#include "support/attention.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

Problem random_problem(std::mt19937_64& random) {
  Problem problem;
  problem.batch = 1 + static_cast<std::int64_t>(random() % 3);
  problem.kv_heads = 1 + static_cast<std::int64_t>(random() % 3);
  problem.query_heads = problem.kv_heads * (1 + static_cast<std::int64_t>(random() % 3));
  problem.query_length = 1 + static_cast<std::int64_t>(random() % 60);
  problem.key_length = 1 + static_cast<std::int64_t>(random() % 60);
  problem.head_dim = 1 + static_cast<std::int64_t>(random() % 20);
  problem.dtype = std::array{DType::f16, DType::bf16, DType::f32, DType::f64}[random() % 4];
  problem.mask = random() % 2 ? Mask::causal : Mask::none;
  problem.scale = default_scale(problem.head_dim);
  return problem;
}

std::vector<RowIndex> random_rows(const Problem& problem, std::mt19937_64& random) {
  std::vector<RowIndex> rows;
  for (int i = 0; i < 40; ++i) {
    rows.push_back({static_cast<std::int64_t>(random() % problem.batch),
                    static_cast<std::int64_t>(random() % problem.query_length),
                    static_cast<std::int64_t>(random() % problem.query_heads)});
  }
  return rows;
}

std::vector<ReferenceRow> reference_of(const Problem& problem, const TestInput& input,
                                       const std::vector<RowIndex>& rows, std::int64_t buffer) {
  const auto query = block_source(input.query);
  const auto key = block_source(input.key);
  const auto value = block_source(input.value);
  std::int64_t seen = 0;
  auto references = reference_rows(problem, *query, *key, *value, rows, buffer,
                                   [&seen](std::int64_t keys) { seen += keys; });
  std::int64_t visible = 0;
  for (const RowIndex& row : rows) {
    visible += std::clamp<std::int64_t>(problem.visible_keys(row.token), 0, problem.key_length);
  }
  BOOST_TEST(seen == visible);
  return references;
}

bool close(double a, double b) {
  if (!std::isfinite(a) || !std::isfinite(b)) {
    return (std::isnan(a) && std::isnan(b)) || a == b;
  }
  return std::abs(a - b) <= 1e-12 * (1 + std::abs(b));
}

// Two passes over the row's keys that the mask keeps.
ReferenceRow restricted_by_definition(const Problem& problem, const TestInput& input,
                                      const RowKeys& wanted) {
  const auto [batch, token, head] = wanted.row;
  const std::int64_t kv_head = head / problem.query_heads_per_kv_head();
  ReferenceRow row;
  row.output.assign(static_cast<std::size_t>(problem.head_dim), 0.0);
  std::vector<std::pair<std::int64_t, double>> scores;
  double top = -infinity;
  for (const Range& keys : wanted.keys) {
    for (std::int64_t k = keys.begin; k < std::min(keys.end, problem.visible_keys(token)); ++k) {
      double score = 0, magnitude = 0;
      for (std::int64_t i = 0; i < problem.head_dim; ++i) {
        const double product =
            input.query.at(batch, token, head, i) * input.key.at(batch, k, kv_head, i);
        score += product;
        magnitude += std::abs(product);
        row.max_abs_value =
            std::max(row.max_abs_value, std::abs(input.value.at(batch, k, kv_head, i)));
      }
      scores.emplace_back(k, score * problem.scale);
      top = std::max(top, score * problem.scale);
      row.max_score_magnitude =
          std::max(row.max_score_magnitude, magnitude * problem.scale / std::log(2.0));
    }
  }
  double total = 0;
  for (const auto& [k, score] : scores) total += std::exp(score - top);
  for (const auto& [k, score] : scores) {
    for (std::int64_t i = 0; i < problem.head_dim; ++i)
      row.output[static_cast<std::size_t>(i)] +=
          std::exp(score - top) / total * input.value.at(batch, k, kv_head, i);
  }
  row.lse = scores.empty() ? -infinity : top + std::log(total);
  return row;
}

ReferenceRow row_of(std::vector<double> output) {
  ReferenceRow row;
  row.output = std::move(output);
  row.max_abs_value = 2;
  row.max_score_magnitude = 10;
  return row;
}

bool ok(const Problem& problem, const ReferenceRow& row, std::vector<double> output) {
  return check_row(problem, row, output).ok;
}

}  // namespace

BOOST_AUTO_TEST_CASE(rows_agree_with_the_definition_for_any_buffer) {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    std::mt19937_64 random(seed);
    const Problem problem = random_problem(random);
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    const TestInput input = random_input(problem, layout, 3.0, random);
    const Expected expected = brute_force(problem, input);
    const std::vector<RowIndex> rows = random_rows(problem, random);
    for (const std::int64_t buffer : {std::int64_t{1}, std::int64_t{3000}, std::int64_t{1} << 26}) {
      const auto references = reference_of(problem, input, rows, buffer);
      for (std::size_t r = 0; r < rows.size(); ++r) {
        const auto [batch, token, head] = rows[r];
        const auto at = static_cast<std::size_t>(
            ((batch * problem.query_length + token) * problem.query_heads + head) *
            problem.head_dim);
        bool equal =
            close(references[r].lse,
                  expected.lse[static_cast<std::size_t>(
                      (batch * problem.query_heads + head) * problem.query_length + token)]);
        for (std::size_t i = 0; i < references[r].output.size(); ++i) {
          equal = equal && close(references[r].output[i], expected.output[at + i]);
        }
        BOOST_TEST(equal, fmt::format("seed {}, buffer {}, row {} {} {}", seed, buffer, batch,
                                      token, head));
      }
    }
  }
}

// A row restricted to some keys is that of a problem with those keys alone.
BOOST_AUTO_TEST_CASE(restricted_rows_see_the_keys_that_they_have_on_any_number_of_threads) {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    std::mt19937_64 random(seed);
    Problem problem = random_problem(random);
    problem.key_length += 20;
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    const TestInput input = random_input(problem, layout, 3.0, random);
    const auto query = block_source(input.query);
    const auto key = block_source(input.key);
    const auto value = block_source(input.value);
    const std::int64_t a = 1 + static_cast<std::int64_t>(random() % 9), b = a + 5;
    const std::vector<std::vector<Range>> choices = {{},
                                                     {{0, a}},
                                                     {{a, b}},
                                                     {{b, problem.key_length}, {0, a}},
                                                     {{a, b}, {b, problem.key_length}}};
    std::vector<RowKeys> rows;
    for (const RowIndex& row : random_rows(problem, random))
      rows.push_back({row, choices[random() % choices.size()]});
    for (const int threads : {1, 3}) {
      const auto references = reference_rows(problem, *query, *key, *value,
                                             std::span<const RowKeys>(rows), 700, nullptr, threads);
      for (std::size_t r = 0; r < rows.size(); ++r) {
        const ReferenceRow expected = restricted_by_definition(problem, input, rows[r]);
        bool equal = close(references[r].lse, expected.lse) &&
                     close(references[r].max_abs_value, expected.max_abs_value) &&
                     close(references[r].max_score_magnitude, expected.max_score_magnitude);
        for (std::size_t i = 0; i < expected.output.size(); ++i)
          equal = equal && close(references[r].output[i], expected.output[i]);
        BOOST_TEST(equal, fmt::format("seed {}, threads {}, row {}", seed, threads, r));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(threads_agree_on_whole_rows_with_nan_and_infinity) {
  std::mt19937_64 random(11);
  for (int trial = 0; trial < 20; ++trial) {
    Problem problem = random_problem(random);
    problem.dtype = DType::f32;
    TestInput input = random_input(problem, Layout::bshd, 3.0, random);
    const double poison[] = {not_a_number, infinity, -infinity};
    TestTensor& tensor = *std::array{&input.query, &input.key, &input.value}[random() % 3];
    set_element(tensor, 0, 0, 0, 0, poison[random() % 3]);
    const auto query = block_source(input.query);
    const auto key = block_source(input.key);
    const auto value = block_source(input.value);
    const auto rows = random_rows(problem, random);
    const auto one = reference_rows(problem, *query, *key, *value, rows);
    const auto four = reference_rows(problem, *query, *key, *value, rows, 1000, nullptr, 4);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      bool equal = close(one[r].lse, four[r].lse);
      for (std::size_t i = 0; i < one[r].output.size(); ++i)
        equal = equal && close(one[r].output[i], four[r].output[i]);
      BOOST_TEST(equal, fmt::format("trial {}, row {}", trial, r));
    }
  }
}

BOOST_AUTO_TEST_CASE(hidden_keys_do_not_touch_and_seen_ones_do) {
  std::mt19937_64 random(2);
  Problem problem;
  problem.query_length = problem.key_length = 6;
  problem.head_dim = 2;
  problem.mask = Mask::causal;
  problem.scale = 1;
  const TestInput clean = random_input(problem, Layout::bshd, 1.0, random);
  const std::vector<RowIndex> rows = {{0, 2, 0}, {0, 3, 0}, {0, 5, 0}};
  TestInput input = clean;
  set_element(input.value, 0, 3, 0, 1, infinity);
  auto references = reference_of(problem, input, rows, 1 << 20);
  BOOST_TEST(std::isfinite(references[0].output[1]));
  BOOST_TEST(references[1].output[1] == infinity);
  BOOST_TEST(std::isfinite(references[1].output[0]));
  BOOST_TEST(references[1].max_abs_value <= 1.0);
  input = clean;
  set_element(input.key, 0, 3, 0, 0, not_a_number);
  references = reference_of(problem, input, rows, 1 << 20);
  BOOST_TEST(std::isfinite(references[0].output[0]));
  BOOST_TEST(std::isnan(references[1].output[0]));
  BOOST_TEST(std::isnan(references[2].output[1]));
}

BOOST_AUTO_TEST_CASE(a_row_without_keys_is_zero) {
  std::mt19937_64 random(2);
  Problem problem;
  problem.query_length = 5;
  problem.key_length = 3;
  problem.head_dim = 2;
  problem.mask = Mask::causal;
  problem.scale = 1;
  const TestInput input = random_input(problem, Layout::bshd, 1.0, random);
  const auto references = reference_of(problem, input, {{0, 1, 0}, {0, 2, 0}}, 1 << 20);
  BOOST_TEST(references[0].output[0] == 0.0);
  BOOST_TEST(references[0].lse == -infinity);
  BOOST_TEST(std::isfinite(references[1].lse));
  BOOST_TEST(ok(problem, references[0], {0.0, 0.0}));
  BOOST_TEST(!ok(problem, references[0], {0.0, 1e-3}));
}

BOOST_AUTO_TEST_CASE(check_row_demands_agreement_of_non_finite_values) {
  Problem problem;
  problem.query_length = problem.key_length = 100;
  problem.head_dim = 2;
  const ReferenceRow finite = row_of({1.0, -1.0});
  const double allowed = allowed_error(problem, finite);
  BOOST_TEST(allowed > 0);
  BOOST_TEST(allowed < 1e-4);
  BOOST_TEST(ok(problem, finite, {1.0 + 0.9 * allowed, -1.0}));
  BOOST_TEST(!ok(problem, finite, {1.0 + 1.1 * allowed, -1.0}));
  BOOST_TEST(!ok(problem, finite, {not_a_number, -1.0}));
  BOOST_TEST(!ok(problem, finite, {1.0, infinity}));
  BOOST_TEST(!ok(problem, finite, {1.0}));
  const ReferenceRow poisoned = row_of({not_a_number, -1.0});
  BOOST_TEST(ok(problem, poisoned, {not_a_number, -1.0}));
  BOOST_TEST(ok(problem, poisoned, {-infinity, -1.0}));
  BOOST_TEST(!ok(problem, poisoned, {0.0, -1.0}));
  BOOST_TEST(!ok(problem, poisoned, {not_a_number, not_a_number}));
}

BOOST_AUTO_TEST_CASE(allowed_error_follows_the_types_and_the_scores) {
  Problem problem;
  problem.query_length = problem.key_length = 100;
  problem.head_dim = 2;
  const ReferenceRow row = row_of({1.0, -1.0});
  const double fp32 = allowed_error(problem, row);
  problem.output_dtype = DType::f16;
  BOOST_TEST(allowed_error(problem, row) >= fp32 + 0x1p-12);
  problem.dtype = DType::bf16;
  BOOST_TEST(allowed_error(problem, row) >= 0x1p-8);
  ReferenceRow steep = row;
  steep.max_score_magnitude = 1e30;
  BOOST_TEST(allowed_error(problem, steep) <= 4.1);
  steep.max_score_magnitude = 1e39;
  BOOST_TEST(allowed_error(problem, steep) == infinity);
  ReferenceRow large = row;
  large.max_abs_value = 0x1p122 / 100;
  BOOST_TEST(std::isfinite(allowed_error(problem, large)));
  large.max_abs_value = 0x1p123 / 100;
  BOOST_TEST(allowed_error(problem, large) == infinity);
}

BOOST_AUTO_TEST_CASE(a_value_beyond_the_output_type_may_be_infinite) {
  Problem problem;
  problem.query_length = problem.key_length = 4;
  problem.head_dim = 1;
  problem.output_dtype = DType::f16;
  ReferenceRow row = row_of({70000.0});
  row.max_abs_value = 80000;
  BOOST_TEST(ok(problem, row, {infinity}));
  row.output = {1000.0};
  BOOST_TEST(!ok(problem, row, {infinity}));
}
