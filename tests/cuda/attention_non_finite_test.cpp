// NaN and infinity in the input reach exactly the rows they touch.
#define BOOST_TEST_MODULE cuda_attention_non_finite
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <limits>
#include <random>

#include "attention_case.hpp"
#include "attention_launch.hpp"
#include "support/needs_device.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();
constexpr std::array types = {DType::f16, DType::bf16, DType::f32};
constexpr std::array poisons = {not_a_number, infinity, -infinity};
constexpr std::int64_t tokens = 420;
constexpr std::int64_t heads = 4;
constexpr std::int64_t kv_heads = 2;

// Self-attention in three chunks, their boundaries off the tiles'.
AttentionCase causal_case(DType type, std::int64_t dim, std::mt19937_64& random) {
  AttentionCase attention;
  attention.type = type;
  attention.heads = heads;
  attention.kv_heads = kv_heads;
  attention.dim = dim;
  attention.scale_log2 = 0.2f;
  attention.queries = attention.keys = {{0, 150}, {150, 291}, {291, tokens}};
  use_live_pairs(attention, true, 1.0, random);
  fill_random(attention, 1.0f, random);
  return attention;
}

// Rows that are not the same bytes in both although `touched` says no.
template <class Touched>
std::int64_t changed_rows(const AttentionCase& attention, const CaseStates& clean,
                          const CaseStates& poisoned, Touched touched) {
  std::int64_t changed = 0;
  for (std::int64_t row = 0; row < attention.rows(); ++row) {
    changed += !touched(row / heads, row % heads) && !same_row(clean, poisoned, row, attention.dim);
  }
  return changed;
}

// The kernel that computes the poisoned case in `kernel`'s place: for slots in pools, where V is
// not finite, the portable one. A key chunk of these cases has a pair that the mask cuts.
const CaseKernel& in_place_of(const CaseKernel& kernel, const std::vector<CaseKernel>& all,
                              const AttentionCase& poisoned) {
  const auto& v = poisoned.v.elements;
  const bool finite =
      std::all_of(v.begin(), v.end(), [](float element) { return std::isfinite(element); });
  return kernel.pools && !finite ? all.front() : kernel;
}

// Against the definition, by every kernel; rows that are not `touched` keep their bytes.
template <class Touched>
void check_poisoned(const AttentionCase& clean, const AttentionCase& poisoned, Touched touched,
                    const std::string& what) {
  const CaseReference reference = brute_force(poisoned);
  const std::vector<CaseKernel> all = kernels(clean.type, clean.dim);
  for (const CaseKernel& kernel : all) {
    const CaseStates states = launch(poisoned, kernel);
    const CaseStates untouched = launch(clean, in_place_of(kernel, all, poisoned));
    BOOST_TEST(changed_rows(clean, untouched, states, touched) == 0, kernel.name << ": " << what);
    BOOST_TEST(worst_ratio(poisoned, states, reference) <= 1.0, kernel.name << ": " << what);
  }
}

// Poisons one vector of K or V.
void check_poisoned_key(const AttentionCase& clean_case, CaseTensor AttentionCase::*tensor,
                        std::int64_t token, float poison) {
  AttentionCase attention = clean_case;
  constexpr std::int64_t kv_head = 1;
  (attention.*tensor).vector(token, kv_head)[5] = poison;
  const auto sees = [&](std::int64_t query, std::int64_t head) {
    return query >= token && head / (heads / kv_heads) == kv_head;
  };
  check_poisoned(clean_case, attention, sees,
                 fmt::format("{}, dim {}, {} at token {}", name_of(attention.type), attention.dim,
                             poison, token));
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_hidden_value_never_touches_a_row) {
  for (const DType type : types) {
    for (const std::int64_t dim : {40, 64, 128, 256}) {
      std::mt19937_64 random(21);
      const AttentionCase clean = causal_case(type, dim, random);
      for (const float poison : poisons) {
        for (const std::int64_t token : {0, 63, 149, 150, 200, 419}) {
          check_poisoned_key(clean, &AttentionCase::v, token, poison);
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(a_hidden_key_never_touches_a_row) {
  for (const DType type : types) {
    for (const std::int64_t dim : {40, 128, 256}) {
      std::mt19937_64 random(22);
      const AttentionCase clean = causal_case(type, dim, random);
      for (const float poison : poisons) {
        for (const std::int64_t token : {0, 64, 290, 291, 419}) {
          check_poisoned_key(clean, &AttentionCase::k, token, poison);
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(a_query_touches_its_own_row_alone) {
  for (const DType type : types) {
    for (const std::int64_t dim : {40, 128, 256}) {
      std::mt19937_64 random(23);
      const AttentionCase clean = causal_case(type, dim, random);
      for (const float poison : poisons) {
        for (const std::int64_t token : {0, 65, 300}) {
          AttentionCase attention = clean;
          attention.q.vector(token, 2)[7] = poison;
          const auto is_row = [&](std::int64_t query, std::int64_t head) {
            return query == token && head == 2;
          };
          check_poisoned(clean, attention, is_row,
                         fmt::format("{}, dim {}, {} in Q", name_of(type), dim, poison));
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(scales_do_not_hide_what_is_not_finite) {
  for (const DType type : types) {
    for (const float scale : {0.0f, -0.2f}) {
      for (const float poison : poisons) {
        std::mt19937_64 random(24);
        AttentionCase attention = causal_case(type, 64, random);
        attention.scale_log2 = scale;
        attention.q.vector(100, 0)[1] = poison;
        attention.k.vector(160, 1)[1] = poison;
        attention.v.vector(300, 0)[1] = poison;
        const CaseReference reference = brute_force(attention);
        for (const CaseKernel& kernel : kernels(type, 64)) {
          BOOST_TEST(
              worst_ratio(attention, launch(attention, kernel), reference) <= 1.0,
              fmt::format("{}: {}, scale {}, {}", kernel.name, name_of(type), scale, poison));
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(scores_of_minus_infinity_weigh_nothing) {
  for (const DType type : types) {
    std::mt19937_64 random(25);
    AttentionCase attention = causal_case(type, 64, random);
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (std::int64_t head = 0; head < heads; ++head) {
        attention.q.vector(token, head)[0] = 1.0f;
      }
    }
    // All of the keys that the first rows see, then every other one.
    for (std::int64_t token = 0; token < tokens; token += token < 80 ? 1 : 2) {
      attention.k.vector(token, 0)[0] = -infinity;
    }
    const CaseReference reference = brute_force(attention);
    for (const CaseKernel& kernel : kernels(type, 64)) {
      const CaseStates states = launch(attention, kernel);
      BOOST_TEST(worst_ratio(attention, states, reference) <= 1.0,
                 kernel.name << ": " << name_of(type));
      BOOST_TEST(states.m[10 * heads] == -infinity);
      BOOST_TEST(states.l[10 * heads] == 0.0f);
      BOOST_TEST(std::isfinite(states.l[100 * heads]));
    }
  }
}

BOOST_AUTO_TEST_CASE(random_poison_agrees_with_the_definition) {
  for (int seed = 1; seed <= trials(40); ++seed) {
    std::mt19937_64 random(static_cast<std::uint64_t>(seed));
    const std::int64_t dim = std::array{40, 64, 128, 256}[random() % 4];
    AttentionCase attention =
        causal_case(types[static_cast<std::size_t>(seed) % types.size()], dim, random);
    const std::array tensors = {&attention.q, &attention.k, &attention.v};
    for (int i = 0; i < 4; ++i) {
      CaseTensor& tensor = *tensors[random() % tensors.size()];
      // Late tokens, so that most rows stay finite.
      const auto token = static_cast<std::int64_t>(200 + random() % 220);
      const auto head = static_cast<std::int64_t>(random()) & (tensor.heads - 1);
      tensor.vector(token, head)[random() % static_cast<std::uint64_t>(dim)] =
          poisons[random() % poisons.size()];
    }
    const CaseReference reference = brute_force(attention);
    for (const CaseKernel& kernel : kernels(attention.type, dim)) {
      BOOST_TEST(worst_ratio(attention, launch(attention, kernel), reference) <= 1.0,
                 fmt::format("{}, seed {}", kernel.name, seed));
    }
  }
}
