// Synthetic tensors: their values, and that every way to read them gives the same ones.
#define BOOST_TEST_MODULE io_synthetic
#include "stream_cqsa/synthetic.hpp"

#include <boost/test/unit_test.hpp>
#include <cmath>

#include "io_testing.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

/// One element as its storage type has it in memory.
std::string encode(float value, DType dtype) {
  switch (dtype) {
    case DType::f16:
      return little_endian(f32_to_f16(value), 2);
    case DType::bf16:
      return little_endian(f32_to_bf16(value), 2);
    default:
      return little_endian(std::bit_cast<std::uint32_t>(value), 4);
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(approximately_standard_normal) {
  const std::uint64_t count = 1 << 20;
  for (const std::uint64_t seed : {0ull, 1ull, ~0ull}) {
    double sum = 0, squares = 0, fourth = 0, neighbours = 0, streams = 0;
    double previous = 0;
    for (std::uint64_t i = 0; i < count; ++i) {
      const double x = synthetic_element(seed, 0, i);
      BOOST_REQUIRE(std::abs(x) < 8);
      BOOST_REQUIRE(x * 1024 == std::nearbyint(x * 1024));
      sum += x;
      squares += x * x;
      fourth += x * x * x * x;
      neighbours += x * previous;
      streams += x * static_cast<double>(synthetic_element(seed, 1, i));
      previous = x;
    }
    const auto n = static_cast<double>(count);
    const double error = 6 / std::sqrt(n);  // six standard deviations of a mean of n
    BOOST_TEST(std::abs(sum / n) < error, "seed " << seed);
    BOOST_TEST(std::abs(squares / n - 1) < 2 * error, "seed " << seed);
    // Four uniforms give a kurtosis of 3 - 0.3.
    BOOST_TEST(std::abs(fourth / n - 2.7) < 10 * error, "seed " << seed);
    BOOST_TEST(std::abs(neighbours / n) < error, "seed " << seed);
    BOOST_TEST(std::abs(streams / n) < error, "seed " << seed);
  }
}

BOOST_AUTO_TEST_CASE(the_same_on_every_machine) {
  // Fixed once: changing them would change every recorded result.
  BOOST_TEST(synthetic_element(0, 0, 0) * 1024 == 1181);
  BOOST_TEST(synthetic_element(42, 2, std::uint64_t{1} << 40) * 1024 == -2142);
}

BOOST_AUTO_TEST_CASE(blocks_agree_with_elements) {
  const std::uint64_t seed = 7;
  std::mt19937_64 random(seed);
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    for (const Layout layout : {Layout::bshd, Layout::bhsd}) {
      const TensorDesc desc{"k", dtype, layout, 4, 2, 300, 6, 24};
      const auto source = make_synthetic_source(desc, seed, 1);
      for (int i = 0; i < 20; ++i) {
        Block block{static_cast<std::int64_t>(random() % 2), random_range(random, desc.tokens),
                    random_range(random, desc.heads)};
        block.heads = desc.readable_heads(block.heads);
        std::string expected;
        const auto add = [&](std::int64_t t, std::int64_t h) {
          for (std::int64_t d = 0; d < desc.dim; ++d) {
            const auto index = ((block.batch * desc.tokens + t) * desc.heads + h) * desc.dim + d;
            expected +=
                encode(synthetic_element(seed, 1, static_cast<std::uint64_t>(index)), dtype);
          }
        };
        if (layout == Layout::bshd) {
          for (auto t = block.tokens.begin; t < block.tokens.end; ++t) {
            for (auto h = block.heads.begin; h < block.heads.end; ++h) add(t, h);
          }
        } else {
          for (auto h = block.heads.begin; h < block.heads.end; ++h) {
            for (auto t = block.tokens.begin; t < block.tokens.end; ++t) add(t, h);
          }
        }
        BOOST_TEST((read_block(*source, block) == expected),
                   name_of(dtype) << " " << name_of(layout) << " block " << i);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(elements_beyond_2_31) {
  const TensorDesc desc{"v", DType::f32, Layout::bhsd, 4, 3, std::int64_t{1} << 33, 5, 64};
  const auto source = make_synthetic_source(desc, 3, 2);
  const std::int64_t token = desc.tokens - 1;
  const std::string last = read_block(*source, {2, {token, token + 1}, {4, 5}});
  const auto index = static_cast<std::uint64_t>(desc.elements() - 1);
  BOOST_TEST((last.substr(63 * 4) == encode(synthetic_element(3, 2, index), DType::f32)));
  // Not what truncated indices would give.
  BOOST_TEST(synthetic_element(3, 2, 5) != synthetic_element(3, 2, 5 + (std::uint64_t{1} << 32)));
}
