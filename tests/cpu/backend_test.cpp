// The CPU backend against the fp64 reference.
#define BOOST_TEST_MODULE cpu_backend
#include <fmt/format.h>

#include <array>
#include <boost/test/unit_test.hpp>
#include <cstring>
#include <limits>
#include <random>

#include "one_launch.hpp"
#include "stream_cqsa/error.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

template <class T, std::size_t N>
T pick(std::mt19937_64& random, const std::array<T, N>& from) {
  return from[random() % N];
}

Problem random_problem(std::mt19937_64& random, std::int64_t longest) {
  Problem problem;
  problem.batch = pick(random, std::array<std::int64_t, 4>{1, 1, 1, 2});
  problem.kv_heads = pick(random, std::array<std::int64_t, 4>{1, 1, 2, 3});
  problem.query_heads =
      problem.kv_heads * pick(random, std::array<std::int64_t, 6>{1, 1, 1, 2, 3, 8});
  problem.query_length = 1 + static_cast<std::int64_t>(random() % longest);
  const bool cross = random() % 3 == 0;
  problem.key_length =
      cross ? 1 + static_cast<std::int64_t>(random() % longest) : problem.query_length;
  problem.head_dim =
      pick(random, std::array<std::int64_t, 12>{1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 96, 128});
  problem.dtype = pick(random, std::array{DType::f16, DType::bf16, DType::f32});
  problem.mask = random() % 2 ? Mask::causal : Mask::none;
  problem.scale = pick(random, std::array{1.0, 0.25, 4.0}) * default_scale(problem.head_dim);
  return problem;
}

Cut random_cut(std::mt19937_64& random, const Problem& problem) {
  Cut cut;
  cut.tile = pick(random, std::array<std::int64_t, 4>{1, 16, 128, 128});
  cut.chunks = 1 + static_cast<std::int64_t>(random() % 9);
  cut.heads_per_group = 1 + static_cast<std::int64_t>(random() % problem.kv_heads);
  cut.threads = 1 + static_cast<int>(random() % 3);
  return cut;
}

std::string describe(std::uint64_t seed, const Problem& p, const Cut& cut) {
  return fmt::format(
      "seed {}: batch {}, heads {}/{}, lengths {}/{}, dim {}, {}, {}, scale {}; {} chunks, tile "
      "{}, "
      "{} heads a group, {} threads",
      seed, p.batch, p.query_heads, p.kv_heads, p.query_length, p.key_length, p.head_dim,
      name_of(p.dtype), p.mask == Mask::causal ? "causal" : "full", p.scale, cut.chunks, cut.tile,
      cut.heads_per_group, cut.threads);
}

// The backend computes in fp32 whatever the input's type: no allowance for 16-bit weights.
Problem fp32_allowance(Problem problem) {
  problem.dtype = DType::f32;
  return problem;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

Problem simple_problem(std::int64_t length, std::int64_t dim, Mask mask) {
  Problem problem;
  problem.query_length = problem.key_length = length;
  problem.head_dim = dim;
  problem.mask = mask;
  problem.scale = default_scale(dim);
  return problem;
}

}  // namespace

BOOST_AUTO_TEST_CASE(random_problems_agree_with_the_reference) {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    std::mt19937_64 random(seed);
    const Problem problem = random_problem(random, seed % 10 == 0 ? 900 : 300);
    const Cut cut = random_cut(random, problem);
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    const TestInput input = random_input(problem, layout, 2.0, random);
    const Computed computed = compute(problem, input, cut);
    const double ratio = worst_ratio(fp32_allowance(problem), input, computed.output);
    BOOST_TEST(ratio <= 1.0, describe(seed, problem, cut));
  }
}

BOOST_AUTO_TEST_CASE(every_kind_of_dimension) {
  for (const std::int64_t dim : {1, 5, 17, 40, 63, 100, 127, 129, 200, 255, 256}) {
    std::mt19937_64 random(static_cast<std::uint64_t>(dim));
    Problem problem = simple_problem(150, dim, Mask::causal);
    problem.dtype = pick(random, std::array{DType::f16, DType::bf16, DType::f32});
    const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
    const Computed computed = compute(problem, input, {});
    BOOST_TEST(worst_ratio(fp32_allowance(problem), input, computed.output) <= 1.0,
               fmt::format("dim {}", dim));
  }
}

BOOST_AUTO_TEST_CASE(many_query_heads_share_a_key_head) {
  for (const std::int64_t ratio : {71, 128, 300}) {
    std::mt19937_64 random(static_cast<std::uint64_t>(ratio));
    Problem problem = simple_problem(140, 8, Mask::causal);
    problem.query_heads = ratio;
    const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
    const Computed computed = compute(problem, input, {.chunks = 2});
    BOOST_TEST(worst_ratio(problem, input, computed.output) <= 1.0, fmt::format("ratio {}", ratio));
  }
}

BOOST_AUTO_TEST_CASE(extreme_scores) {
  for (const double magnitude : {0.0, 1e-20, 30.0, 60.0}) {
    std::mt19937_64 random(3);
    const Problem problem = simple_problem(600, 16, Mask::none);
    const TestInput input = random_input(problem, Layout::bshd, magnitude, random);
    const Computed computed = compute(problem, input, {.chunks = 3});
    BOOST_TEST(worst_ratio(problem, input, computed.output) <= 1.0,
               fmt::format("seed 3, magnitude {}", magnitude));
  }
}

BOOST_AUTO_TEST_CASE(lse_agrees_with_the_definition) {
  std::mt19937_64 random(8);
  Problem problem = simple_problem(200, 24, Mask::causal);
  problem.query_length = 260;  // the first 60 rows see no key
  const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
  const Computed computed = compute(problem, input, {.chunks = 2});
  const Expected expected = brute_force(problem, input);
  for (std::size_t row = 0; row < expected.lse.size(); ++row) {
    if (row < 60) {
      BOOST_TEST(computed.lse[row] == -std::numeric_limits<double>::infinity());
    } else {
      BOOST_TEST(std::abs(computed.lse[row] - expected.lse[row]) <= 1e-5);
    }
  }
}

BOOST_AUTO_TEST_CASE(bits_do_not_depend_on_the_number_of_threads) {
  for (std::uint64_t seed = 100; seed < 112; ++seed) {
    std::mt19937_64 random(seed);
    const Problem problem = random_problem(random, 700);
    Cut cut = random_cut(random, problem);
    const TestInput input = random_input(problem, Layout::bshd, 3.0, random);
    cut.threads = 1;
    const Computed one = compute(problem, input, cut);
    for (const int threads : {2, 3}) {
      cut.threads = threads;
      const Computed more = compute(problem, input, cut);
      BOOST_TEST(same_bits(one.states, more.states), describe(seed, problem, cut));
      BOOST_TEST(one.scores == more.scores);
    }
  }
}

BOOST_AUTO_TEST_CASE(scores_computed_do_not_depend_on_the_division) {
  for (const Mask mask : {Mask::none, Mask::causal}) {
    for (const std::int64_t ratio : {1, 2, 4, 6}) {
      std::mt19937_64 random(1);
      Problem problem = simple_problem(1500, 4, mask);
      problem.query_heads = ratio;
      problem.query_length = mask == Mask::causal ? 1400 : 1500;
      const TestInput input = random_input(problem, Layout::bshd, 1.0, random);
      const std::int64_t whole = compute(problem, input, {}).scores;
      if (mask == Mask::none) BOOST_TEST(whole == 1500 * 1500 * ratio);
      for (const std::int64_t chunks : {2, 3, 7, 11}) {
        const std::int64_t scores = compute(problem, input, {.chunks = chunks}).scores;
        BOOST_TEST(scores == whole, fmt::format("{} chunks, ratio {}", chunks, ratio));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(what_the_plan_says_is_allocated) {
  const Problem problem = simple_problem(300, 8, Mask::none);
  const auto backend = make_cpu_backend({.threads = 2});
  Plan plan = resident_plan(problem, {}, backend->traits(problem));
  Telemetry telemetry;
  BOOST_TEST(backend->allocated_bytes() == 0);
  backend->prepare(plan, telemetry);
  BOOST_TEST(backend->allocated_bytes() == plan.device.bytes());
  // More threads than the plan has workspace for leave some idle; not even one is an error.
  const auto wider = make_cpu_backend({.threads = 3});
  wider->prepare(plan, telemetry);
  BOOST_TEST(wider->allocated_bytes() == plan.device.bytes());
  const auto none = make_cpu_backend({.threads = 1});
  plan.device.workspace_bytes = none->traits(problem).workspace_bytes - 1;
  BOOST_CHECK_THROW(none->prepare(plan, telemetry), Error);
  plan.device.query_slot_bytes = std::int64_t{1} << 50;
  const auto same = make_cpu_backend({.threads = 2});
  BOOST_CHECK_THROW(same->prepare(plan, telemetry), Error);
}
