// Merge and end of softmax states against fp64 and against the scalar formulas.
#define BOOST_TEST_MODULE softmax_state
#include "stream_cqsa/softmax_state.hpp"

#include <fmt/format.h>
#include <hwy/targets.h>

#include <algorithm>
#include <array>
#include <boost/test/unit_test.hpp>
#include <cstring>
#include <limits>
#include <numbers>
#include <random>
#include <vector>

using namespace stream_cqsa;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

struct States {
  std::vector<float> acc, m, l;
  std::int64_t rows, dim;

  States(std::int64_t rows_, std::int64_t dim_)
      : acc(static_cast<std::size_t>(rows_ * dim_)),
        m(static_cast<std::size_t>(rows_), -infinity),
        l(static_cast<std::size_t>(rows_)),
        rows(rows_),
        dim(dim_) {}
  SoftmaxStates view() { return {acc.data(), m.data(), l.data(), rows, dim}; }
};

States random_states(std::mt19937_64& random, std::int64_t rows, std::int64_t dim, float spread) {
  States states(rows, dim);
  std::uniform_real_distribution<float> score(-spread, spread);
  std::normal_distribution<float> value;
  std::uniform_real_distribution<float> sum(1.0f, 1000.0f);
  for (auto& m : states.m) m = score(random);
  for (auto& l : states.l) l = sum(random);
  for (auto& a : states.acc) a = value(random);
  return states;
}

void empty_row(States& states, std::int64_t row) {
  states.m[static_cast<std::size_t>(row)] = -infinity;
  states.l[static_cast<std::size_t>(row)] = 0;
  std::fill_n(states.acc.begin() + row * states.dim, states.dim, 0.0f);
}

States merged(States into, States& from) {
  merge(into.view(), from.view());
  return into;
}

// The formulas of the header, one number at a time.
States scalar_merged(States into, const States& from) {
  for (std::size_t row = 0; row < into.m.size(); ++row) {
    const MergeWeights w = merge_weights(into.m[row], from.m[row]);
    into.m[row] = w.max;
    into.l[row] = std::fmaf(w.first, into.l[row], w.second * from.l[row]);
    for (std::size_t i = 0; i < static_cast<std::size_t>(into.dim); ++i) {
      const std::size_t at = row * static_cast<std::size_t>(into.dim) + i;
      into.acc[at] = std::fmaf(w.first, into.acc[at], w.second * from.acc[at]);
    }
  }
  return into;
}

bool same(const States& a, const States& b) {
  const auto equal = [](const auto& x, const auto& y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(),
                      [](float p, float q) { return same(p, q); });
  };
  return equal(a.m, b.m) && equal(a.l, b.l) && equal(a.acc, b.acc);
}

// Runs `check` for every instruction set of this machine that the code was built for.
template <class Check>
void for_each_target(Check check) {
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().DeInit();
    BOOST_TEST_CONTEXT(hwy::TargetName(target)) { check(); }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

double ulps_off(float x) {
  const double exact = std::exp2(static_cast<double>(x));
  int exponent = 0;
  std::frexp(exact, &exponent);
  return std::abs(static_cast<double>(merge_exp2(x)) - exact) / std::ldexp(1.0, exponent - 24);
}

}  // namespace

BOOST_AUTO_TEST_CASE(exp2_is_within_its_ulps) {
  double worst = 0;
  const auto check = [&](float x) { worst = std::max(worst, ulps_off(x)); };
  // A stride that is coprime to powers of two through all floats of [-126, 0], and a dense stretch
  // where the largest error was measured.
  const auto last = std::bit_cast<std::uint32_t>(-126.0f);
  for (std::uint32_t bits = 0x80000000u; bits <= last; bits += 1009) {
    check(std::bit_cast<float>(bits));
  }
  const auto dense = std::bit_cast<std::uint32_t>(-0x1.d5d9a4p-2f);
  for (std::uint32_t bits = dense - 100000; bits < dense + 100000; ++bits) {
    check(std::bit_cast<float>(bits));
  }
  for (int n = -126; n <= 0; ++n) {
    check(static_cast<float>(n));
    check(std::max(-126.0f, static_cast<float>(n) - 0.5f));
  }
  BOOST_TEST(worst <= 0.83);
}

BOOST_AUTO_TEST_CASE(exp2_of_special_values) {
  BOOST_TEST(merge_exp2(0.0f) == 1.0f);
  BOOST_TEST(merge_exp2(-0.0f) == 1.0f);
  for (int n = 0; n <= 126; ++n) {
    BOOST_TEST(merge_exp2(static_cast<float>(-n)) == std::ldexp(1.0f, -n));
  }
  BOOST_TEST(merge_exp2(std::nextafter(-126.0f, -infinity)) == 0.0f);
  BOOST_TEST(merge_exp2(-1e30f) == 0.0f);
  BOOST_TEST(merge_exp2(-infinity) == 0.0f);
  BOOST_TEST(std::isnan(merge_exp2(not_a_number)));
  BOOST_TEST(std::isnan(merge_exp2(infinity)));
  BOOST_TEST(std::isnan(merge_exp2(std::numeric_limits<float>::denorm_min())));
}

BOOST_AUTO_TEST_CASE(weights_of_empty_and_poisoned_rows) {
  const MergeWeights empty = merge_weights(-infinity, -infinity);
  BOOST_TEST(empty.max == -infinity);
  BOOST_TEST(empty.first == 0.0f);
  BOOST_TEST(empty.second == 0.0f);
  const MergeWeights one = merge_weights(-infinity, 3.0f);
  BOOST_TEST(one.max == 3.0f);
  BOOST_TEST(one.first == 0.0f);
  BOOST_TEST(one.second == 1.0f);
  BOOST_TEST(std::isnan(merge_weights(not_a_number, 3.0f).first));
  BOOST_TEST(std::isnan(merge_weights(3.0f, not_a_number).second));
  BOOST_TEST(std::isnan(merge_weights(infinity, 3.0f).first));
}

BOOST_AUTO_TEST_CASE(vector_merge_gives_the_bits_of_the_formulas) {
  constexpr std::uint64_t seed = 20240;
  for_each_target([&] {
    std::mt19937_64 random(seed);
    const std::array<float, 8> special = {0.0f,         -0.0f, infinity, -infinity,
                                          not_a_number, 1e38f, -1e-40f,  126.0f};
    for (int round = 0; round < 120; ++round) {
      const auto rows = static_cast<std::int64_t>(random() % 600 + 1);
      const auto dim = static_cast<std::int64_t>(random() % 40 + 1);
      const float spread = std::array{1.0f, 60.0f, 1e4f}[random() % 3];
      States into = random_states(random, rows, dim, spread);
      States from = random_states(random, rows, dim, spread);
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto at = static_cast<std::size_t>(row);
        const auto draw = random() % 16;
        if (draw == 0 || draw == 2) empty_row(into, row);
        if (draw == 1 || draw == 2) empty_row(from, row);
        if (draw == 3) into.m[at] = special[random() % special.size()];
        if (draw == 4) from.m[at] = special[random() % special.size()];
        if (draw == 5) from.acc[at] = special[random() % special.size()];
        if (draw == 6) from.m[at] = into.m[at];
        if (draw == 7) from.m[at] = into.m[at] - 126.0f;
      }
      const bool equal = same(merged(into, from), scalar_merged(into, from));
      BOOST_TEST(equal, fmt::format("seed {}, round {}, {} rows, dim {}", seed, round, rows, dim));
    }
  });
}

BOOST_AUTO_TEST_CASE(merge_agrees_with_fp64_on_extreme_scores) {
  constexpr std::uint64_t seed = 7;
  std::mt19937_64 random(seed);
  for (const float spread : {0.0f, 1.0f, 30.0f, 1e4f}) {
    States a = random_states(random, 500, 17, spread);
    States b = random_states(random, 500, 17, spread);
    const States sum = merged(a, b);
    for (std::size_t row = 0; row < 500; ++row) {
      const double m = std::max(a.m[row], b.m[row]);
      const double w1 = std::exp2(a.m[row] - m);
      const double w2 = std::exp2(b.m[row] - m);
      const double l = w1 * a.l[row] + w2 * b.l[row];
      BOOST_TEST(sum.m[row] == m);
      // Weights below 2^-126 are flushed; the difference of two m is rounded when they are large.
      const double tolerance = 4 * 0x1p-24 + 0x1p-24 * spread * 0.7;
      BOOST_TEST(std::abs(sum.l[row] - l) <= tolerance * l);
      for (std::size_t i = row * 17; i < (row + 1) * 17; ++i) {
        const double x = w1 * a.acc[i];
        const double y = w2 * b.acc[i];
        const double error = std::abs(sum.acc[i] - (x + y));
        BOOST_TEST(error <= tolerance * (std::abs(x) + std::abs(y)) + 1e-37,
                   fmt::format("seed {}, spread {}, row {}", seed, spread, row));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(merge_is_associative_and_commutative_within_rounding) {
  constexpr std::uint64_t seed = 99;
  std::mt19937_64 random(seed);
  for (const float spread : {1.0f, 40.0f, 1e4f}) {
    States a = random_states(random, 300, 8, spread);
    States b = random_states(random, 300, 8, spread);
    States c = random_states(random, 300, 8, spread);
    for (std::int64_t row = 0; row < 300; row += 7) empty_row(b, row);
    States bc = merged(b, c);
    const States left = merged(merged(a, b), c);
    const States right = merged(a, bc);
    const States swapped = merged(b, a);
    BOOST_TEST((swapped.m == merged(a, b).m));
    BOOST_TEST((left.m == right.m));
    const float tolerance = 8 * 0x1p-24f + 2 * 0x1p-24f * spread;
    for (std::size_t row = 0; row < 300; ++row) {
      BOOST_TEST(std::abs(left.l[row] - right.l[row]) <= tolerance * left.l[row]);
      for (std::size_t i = row * 8; i < (row + 1) * 8; ++i) {
        const float scale = std::abs(a.acc[i]) + std::abs(b.acc[i]) + std::abs(c.acc[i]);
        BOOST_TEST(std::abs(left.acc[i] - right.acc[i]) <= tolerance * scale,
                   fmt::format("seed {}, spread {}, row {}", seed, spread, row));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(merging_an_empty_state_changes_nothing) {
  std::mt19937_64 random(1);
  States a = random_states(random, 50, 5, 100.0f);
  States empty(50, 5);
  BOOST_TEST(same(merged(a, empty), a));
  BOOST_TEST(same(merged(empty, a), a));
  BOOST_TEST(same(merged(empty, empty), empty));
  const States nothing = merged(States(0, 5), empty);
  BOOST_TEST(nothing.m.empty());
}

namespace {

// Values that meet every rounding case of the small types: ties, subnormals, overflow.
std::vector<float> hostile_values(std::mt19937_64& random, std::size_t count) {
  std::vector<float> values = {
      0.0f,         -0.0f,           1.0f,        65504.0f,       65519.99f,
      65520.0f,     -65536.0f,       infinity,    -infinity,      not_a_number,
      0x1p-24f,     0x1p-25f,        0x1.8p-24f,  0x1p-14f,       0x1.ffcp-15f,
      0x1.ffep-15f, 0x1.fffffep-15f, 3.4e38f,     0x1.ffp127f,    0x1p-149f,
      1e-40f,       1.00390625f,     1.01171875f, 1.00048828125f, 1.00146484375f};
  while (values.size() < count) {
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random())));
  }
  return values;
}

double expected(DType type, float acc, float l) {
  if (type == DType::f64) return static_cast<double>(acc) / static_cast<double>(l);
  const float quotient = acc / l;
  if (type == DType::f16) return f16_to_f32(f32_to_f16(quotient));
  if (type == DType::bf16) return bf16_to_f32(f32_to_bf16(quotient));
  return quotient;
}

double element(DType type, const std::byte* output, std::size_t index) {
  const auto read = [&]<class T>(T value) {
    std::memcpy(&value, output + index * sizeof value, sizeof value);
    return value;
  };
  switch (type) {
    case DType::f16:
      return f16_to_f32(read(std::uint16_t{}));
    case DType::bf16:
      return bf16_to_f32(read(std::uint16_t{}));
    case DType::f32:
      return read(float{});
    case DType::f64:
      return read(double{});
  }
  return 0;
}

void check_outputs(DType type, const States& states, std::size_t keyless_rows,
                   const std::vector<std::byte>& output, const NonFinite& reported) {
  NonFinite counted;
  for (std::size_t i = 0; i < states.acc.size(); ++i) {
    const std::size_t row = i / static_cast<std::size_t>(states.dim);
    const double want = row < keyless_rows ? 0.0 : expected(type, states.acc[i], states.l[row]);
    const double got = element(type, output.data(), i);
    const bool equal =
        std::isnan(want) ? std::isnan(got) : std::signbit(want) == std::signbit(got) && want == got;
    BOOST_TEST(equal, fmt::format("{}: {} / {} gave {}", name_of(type), states.acc[i],
                                  states.l[row], got));
    counted.nan += std::isnan(want);
    counted.infinite += std::isinf(want);
  }
  BOOST_TEST((counted == reported));
}

}  // namespace

BOOST_AUTO_TEST_CASE(finalise_rounds_to_nearest_even_in_every_type) {
  constexpr std::int64_t heads = 3;
  for_each_target([&] {
    std::mt19937_64 random(5);
    for (const DType type : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
      for (const std::int64_t dim : {1, 7, 16, 33, 64}) {
        const std::int64_t rows = heads * 21;
        States states(rows, dim);
        states.acc = hostile_values(random, static_cast<std::size_t>(rows * dim));
        states.acc.resize(static_cast<std::size_t>(rows * dim));
        for (auto& l : states.l)
          l = random() % 2 ? 1.0f : 1.0f + static_cast<float>(random() % 1000);
        states.l[30] = 0;
        std::vector<std::byte> output(states.acc.size() * static_cast<std::size_t>(size_of(type)));
        const NonFinite count = finalise(states.view(), heads, 2, type, output.data(), nullptr);
        check_outputs(type, states, 2 * heads, output, count);
      }
    }
  });
}

BOOST_AUTO_TEST_CASE(finalise_writes_lse_and_marks_keyless_rows) {
  constexpr std::int64_t heads = 2;
  constexpr std::int64_t tokens = 5;
  States states(heads * tokens, 4);
  for (std::size_t row = 0; row < 10; ++row) {
    states.m[row] = 1000.0f * static_cast<float>(row);
    states.l[row] = 1.0f + static_cast<float>(row);
  }
  states.m[9] = -infinity;  // keys, but all of their scores are -infinity
  states.l[9] = 0.0f;
  std::vector<float> output(40, 5.0f);
  std::vector<float> lse(10, 5.0f);
  const NonFinite count = finalise(states.view(), heads, 1, DType::f32,
                                   reinterpret_cast<std::byte*>(output.data()), lse.data());
  for (std::size_t row = 0; row < 10; ++row) {
    const float got = lse[row];
    if (row < 2 || row == 9) {
      BOOST_TEST(got == -infinity);
    } else {
      const double exact = std::numbers::ln2 * (states.m[row] + std::log2(states.l[row]));
      BOOST_TEST(std::abs(got - exact) <= 0x1p-23 * std::abs(exact));
    }
    const bool is_nan = std::isnan(output[row * 4]);
    BOOST_TEST(is_nan == (row == 9));
  }
  BOOST_TEST(count.nan == 4);
  BOOST_TEST(count.infinite == 0);
}
