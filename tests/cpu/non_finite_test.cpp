// NaN and infinity in the input reach exactly the rows they touch.
#define BOOST_TEST_MODULE cpu_non_finite
#include <fmt/format.h>

#include <array>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <random>

#include "one_launch.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

Problem causal_problem(DType dtype) {
  Problem problem;
  problem.query_heads = 2;
  problem.query_length = problem.key_length = 400;
  problem.head_dim = 12;
  problem.dtype = dtype;
  problem.mask = Mask::causal;
  problem.scale = default_scale(12);
  return problem;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_hidden_key_never_touches_a_row) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const double poison : {not_a_number, infinity, -infinity}) {
      for (const std::int64_t token : {0, 1, 127, 128, 200, 399}) {
        std::mt19937_64 random(17);
        const Problem problem = causal_problem(dtype);
        TestInput input = random_input(problem, Layout::bshd, 2.0, random);
        set_element(input.value, 0, token, 0, 5, poison);
        const Computed computed = compute(problem, input, {.chunks = 2});
        std::int64_t wrong = 0;
        for (std::int64_t row = 0; row < 800; ++row) {
          for (std::int64_t i = 0; i < 12; ++i) {
            const bool touched = row / 2 >= token && i == 5;
            const double value = computed.output[static_cast<std::size_t>(row * 12 + i)];
            wrong += std::isfinite(value) == touched;
          }
        }
        BOOST_TEST(wrong == 0, fmt::format("{} in V at token {}, seed 17", poison, token));
        BOOST_TEST(worst_ratio(problem, input, computed.output) <= 1.0);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(nan_in_keys_and_queries) {
  for (const std::int64_t token : {0, 127, 300}) {
    std::mt19937_64 random(4);
    const Problem problem = causal_problem(DType::f32);
    const TestInput clean = random_input(problem, Layout::bshd, 2.0, random);
    TestInput poisoned_key = clean;
    set_element(poisoned_key.key, 0, token, 0, 3, not_a_number);
    const Computed by_key = compute(problem, poisoned_key, {.chunks = 3});
    TestInput poisoned_query = clean;
    set_element(poisoned_query.query, 0, token, 1, 3, not_a_number);
    const Computed by_query = compute(problem, poisoned_query, {.chunks = 3});
    for (std::int64_t row = 0; row < 800; ++row) {
      const auto at = static_cast<std::size_t>(row * 12);
      BOOST_TEST(std::isnan(by_key.output[at]) == (row / 2 >= token));
      BOOST_TEST(std::isnan(by_query.output[at]) == (row == token * 2 + 1));
    }
    BOOST_TEST(worst_ratio(problem, poisoned_key, by_key.output) <= 1.0);
    BOOST_TEST(worst_ratio(problem, poisoned_query, by_query.output) <= 1.0);
  }
}

BOOST_AUTO_TEST_CASE(scores_of_infinity) {
  // One feature: the scores are q * k. Token 5's key is infinite, so positive queries score
  // +infinity there (NaN by definition) and negative ones -infinity (weight 0).
  Problem problem = causal_problem(DType::f32);
  problem.query_heads = 1;
  problem.head_dim = 1;
  problem.scale = 1;
  std::mt19937_64 random(6);
  TestInput input = random_input(problem, Layout::bshd, 2.0, random);
  set_element(input.key, 0, 5, 0, 0, infinity);
  const Computed computed = compute(problem, input, {.chunks = 2});
  for (std::int64_t row = 0; row < 400; ++row) {
    const bool touched = row >= 5 && input.query.at(0, row, 0, 0) > 0;
    BOOST_TEST(std::isnan(computed.output[static_cast<std::size_t>(row)]) == touched);
  }
  BOOST_TEST(worst_ratio(problem, input, computed.output) <= 1.0);
}

BOOST_AUTO_TEST_CASE(a_row_whose_scores_are_all_minus_infinity_is_nan) {
  Problem problem = causal_problem(DType::f32);
  problem.query_heads = 1;
  problem.head_dim = 1;
  problem.scale = 1;
  std::mt19937_64 random(9);
  TestInput input = random_input(problem, Layout::bshd, 2.0, random);
  for (std::int64_t token = 0; token < 400; ++token) {
    set_element(input.key, 0, token, 0, 0, 1.0);
  }
  set_element(input.query, 0, 250, 0, 0, -infinity);
  const Computed computed = compute(problem, input, {.chunks = 2});
  for (std::int64_t row = 0; row < 400; ++row) {
    BOOST_TEST(std::isnan(computed.output[static_cast<std::size_t>(row)]) == (row == 250));
  }
  BOOST_TEST(computed.lse[250] == -infinity);
  BOOST_TEST(worst_ratio(problem, input, computed.output) <= 1.0);
}

BOOST_AUTO_TEST_CASE(random_poison_agrees_with_the_definition) {
  for (std::uint64_t seed = 1; seed <= 25; ++seed) {
    std::mt19937_64 random(seed);
    Problem problem = causal_problem(seed % 2 ? DType::f32 : DType::bf16);
    if (seed % 3 == 0) problem.mask = Mask::none;
    TestInput input = random_input(problem, Layout::bshd, 2.0, random);
    const std::array tensors = {&input.query, &input.key, &input.value};
    for (int i = 0; i < 4; ++i) {
      TestTensor& tensor = *tensors[random() % 3];
      // Late tokens, so that with the mask most rows stay finite.
      const auto token = static_cast<std::int64_t>(200 + random() % 200);
      const auto head = static_cast<std::int64_t>(random() % tensor.desc.heads);
      const auto dim = static_cast<std::int64_t>(random() % 12);
      set_element(tensor, 0, token, head, dim,
                  std::array{not_a_number, infinity, -infinity}[random() % 3]);
    }
    const Computed computed =
        compute(problem, input, {.chunks = 1 + static_cast<std::int64_t>(random() % 4)});
    BOOST_TEST(worst_ratio(problem, input, computed.output) <= 1.0, fmt::format("seed {}", seed));
  }
}
