// The kernels' policy parameter: a sliding window and a softcap against the definition.
#define BOOST_TEST_MODULE cuda_attention_policy
#include "attention_policy.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <random>

#include "support/needs_device.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

constexpr std::int64_t tokens = 700;
constexpr std::int64_t heads = 4;
constexpr std::int64_t kv_heads = 2;

// Self-attention in four chunks, their boundaries off the tiles'. Every pair is in the work lists,
// also those that no row sees, and partial.
AttentionCase window_case(DType type, std::int64_t dim, std::int64_t shift) {
  std::mt19937_64 random(31);
  AttentionCase attention;
  attention.type = type;
  attention.heads = heads;
  attention.kv_heads = kv_heads;
  attention.dim = dim;
  attention.scale_log2 = 2 / std::sqrt(static_cast<float>(dim));
  attention.causal_shift = shift;
  attention.queries = attention.keys = {{0, 150}, {150, 291}, {291, 300}, {300, tokens}};
  attention.uses.assign(4, {{0, true}, {1, true}, {2, true}, {3, true}});
  fill_random(attention, 1.0f, random);
  return attention;
}

// By the definition, in fp64.
class WindowRow {
 public:
  WindowRow(const AttentionCase& attention, std::int64_t token, std::int64_t head)
      : output(static_cast<std::size_t>(attention.dim)),
        case_(attention),
        head_(head / (heads / kv_heads)) {
    const std::int64_t end = token + case_.causal_shift + 1;
    const std::int64_t first = std::clamp<std::int64_t>(end - window, 0, tokens);
    const std::int64_t last = std::clamp<std::int64_t>(end, 0, tokens);
    for (std::int64_t key = first; key < last; ++key) add(score(token, head, key), key);
    for (double& element : output) element /= l_;
    lse = std::log2(l_);
  }

  std::vector<double> output;  ///< [dim], NaN where no key is seen
  double lse = 0;              ///< in base 2

 private:
  std::size_t dims() const { return static_cast<std::size_t>(case_.dim); }

  double score(std::int64_t token, std::int64_t head, std::int64_t key) const {
    const float* q = case_.q.vector(token, head);
    const float* k = case_.k.vector(key, head_);
    double sum = 0;
    for (std::size_t i = 0; i < dims(); ++i) sum += double{q[i]} * double{k[i]};
    return double{softcap} * std::tanh(sum * double{case_.scale_log2} / double{softcap});
  }

  // Capped scores need no maximum.
  void add(double score, std::int64_t key) {
    const double weight = std::exp2(score);
    const float* v = case_.v.vector(key, head_);
    l_ += weight;
    for (std::size_t i = 0; i < dims(); ++i) output[i] += weight * double{v[i]};
  }

  const AttentionCase& case_;
  const std::int64_t head_;  // of K and V
  double l_ = 0;
};

// The largest error of a row; infinity where one side alone is not finite.
double row_error(const WindowRow& want, const CaseStates& states, std::int64_t row) {
  const auto at = static_cast<std::size_t>(row);
  const double l = double{states.l[at]};
  if (want.lse == -std::numeric_limits<double>::infinity()) {
    return l == 0 && states.m[at] == -HUGE_VALF ? 0.0 : HUGE_VAL;
  }
  double worst = std::abs(double{states.m[at]} + std::log2(l) - want.lse);
  for (std::size_t i = 0; i < want.output.size(); ++i) {
    const double got = double{states.acc[at * want.output.size() + i]} / l;
    if (std::isnan(got) && std::isnan(want.output[i])) continue;
    const double error = got == want.output[i] ? 0.0 : std::abs(got - want.output[i]);
    if (!(error <= worst)) worst = error;
  }
  return std::isnan(worst) ? HUGE_VAL : worst;
}

void check(const AttentionCase& attention, const std::string& what) {
  std::vector<WindowRow> rows;
  for (std::int64_t row = 0; row < attention.rows(); ++row) {
    rows.emplace_back(attention, row / heads, row % heads);
  }
  // |V| is below 6; weights are rounded to the storage type, half an ulp each.
  const double tolerance = size_of(attention.type) == 2 ? 6 * unit_roundoff(attention.type) : 2e-5;
  for (const CaseKernel& kernel : window_kernels(attention.type, attention.dim)) {
    const CaseStates states = launch(attention, kernel);
    double worst = 0;
    for (std::int64_t row = 0; row < attention.rows(); ++row) {
      const double error = row_error(rows[static_cast<std::size_t>(row)], states, row);
      if (!(error <= worst)) worst = error;
    }
    BOOST_TEST(worst <= tolerance,
               fmt::format("{}, {}, dim {}, {}: error {}", kernel.name, name_of(attention.type),
                           attention.dim, what, worst));
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(windows_and_softcap_agree_with_the_definition) {
  for (const auto& [type, dim] : policy_cases) {
    for (const std::int64_t shift : {-200, 0, 90}) {
      check(window_case(type, dim, shift), fmt::format("shift {}", shift));
    }
  }
}

BOOST_AUTO_TEST_CASE(scales_of_any_sign) {
  for (const auto& [type, dim] : policy_cases) {
    for (const float scale : {0.0f, -0.3f}) {
      AttentionCase attention = window_case(type, dim, 0);
      attention.scale_log2 = scale;
      check(attention, fmt::format("scale {}", scale));
    }
  }
}

BOOST_AUTO_TEST_CASE(a_value_outside_of_the_window_touches_no_row) {
  for (const auto& [type, dim] : policy_cases) {
    for (const std::int64_t token : {0, 149, 295, 400}) {
      AttentionCase attention = window_case(type, dim, 0);
      attention.v.vector(token, 1)[5] = std::numeric_limits<float>::quiet_NaN();
      check(attention, fmt::format("NaN at token {}", token));
    }
  }
}
