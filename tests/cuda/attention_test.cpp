// The device's attention kernels against the definition.
#define BOOST_TEST_MODULE cuda_attention
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <cstring>
#include <random>

#include "attention_case.hpp"
#include "attention_launch.hpp"
#include "cuda/check.hpp"
#include "cuda/handles.hpp"
#include "naive_attention.hpp"
#include "stream_cqsa/cuda_backend.hpp"
#include "support/needs_device.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_TEST_GLOBAL_FIXTURE(NeedsDevice);

namespace {

constexpr std::array types = {DType::f16, DType::bf16, DType::f32};
constexpr std::array<std::int64_t, 12> dims = {8, 24, 32, 40, 64, 72, 96, 104, 128, 200, 248, 256};
constexpr std::array<std::int64_t, 9> lengths = {1, 7, 63, 64, 65, 127, 129, 300, 1000};

float usual_scale(std::int64_t dim) {
  return static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(dim)));
}

// Chunks anywhere in the sequence, in any order.
std::vector<Range> random_chunks(std::int64_t most, std::mt19937_64& random) {
  std::vector<Range> chunks(1 + random() % static_cast<std::uint64_t>(most));
  for (Range& chunk : chunks) {
    const auto begin = static_cast<std::int64_t>(random() % 1200);
    chunk = {begin, begin + lengths[random() % lengths.size()]};
  }
  return chunks;
}

std::int64_t total(const std::vector<Range>& chunks) {
  return AttentionCase::first_position(chunks, static_cast<std::int64_t>(chunks.size()));
}

// Shapes that the host computes in a fraction of a second.
AttentionCase random_case(DType type, std::int64_t dim, std::mt19937_64& random) {
  constexpr std::int64_t most_products = 60'000'000;
  constexpr std::array<std::int64_t, 8> groups = {1, 1, 2, 3, 4, 5, 6, 8};
  AttentionCase attention;
  attention.type = type;
  attention.dim = dim;
  attention.scale_log2 = usual_scale(dim);
  do {
    attention.kv_heads = groups[random() % groups.size()];
    attention.heads = attention.kv_heads * groups[random() % groups.size()];
    attention.queries = random_chunks(3, random);
    attention.keys = random_chunks(4, random);
  } while (attention.heads > 8 ||
           total(attention.queries) * total(attention.keys) * attention.heads * dim >
               most_products);
  attention.causal_shift = static_cast<std::int64_t>(random() % 600) - 300;
  use_live_pairs(attention, random() % 3 != 0, 0.8, random);
  fill_random(attention, std::array{0.3f, 1.0f, 3.0f}[random() % 3], random);
  return attention;
}

std::string describe(const AttentionCase& attention) {
  return fmt::format("{}, dim {}, heads {}/{}, {} query tokens in {} chunks, {} keys in {}",
                     name_of(attention.type), attention.dim, attention.heads, attention.kv_heads,
                     total(attention.queries), attention.queries.size(), total(attention.keys),
                     attention.keys.size());
}

// Self-attention over [0, tokens) in `chunks` equal chunks.
AttentionCase self_attention(DType type, std::int64_t tokens, std::int64_t chunks, std::int64_t dim,
                             bool causal, std::mt19937_64& random) {
  AttentionCase attention;
  attention.type = type;
  attention.heads = 4;
  attention.kv_heads = 2;
  attention.dim = dim;
  attention.scale_log2 = usual_scale(dim);
  for (std::int64_t i = 0; i < chunks; ++i)
    attention.queries.push_back(split(tokens, 1, chunks, i));
  attention.keys = attention.queries;
  use_live_pairs(attention, causal, 1.0, random);
  fill_random(attention, 1.0f, random);
  return attention;
}

// Every kernel against the reference; the largest error of what is allowed.
double check(const AttentionCase& attention, const CaseReference& reference,
             const std::string& what) {
  double worst = 0;
  for (const CaseKernel& kernel : kernels(attention.type, attention.dim)) {
    const double error = worst_ratio(attention, launch(attention, kernel), reference);
    BOOST_TEST(error <= 1.0, fmt::format("{}: error is {} times what is allowed: {}, {}",
                                         kernel.name, error, describe(attention), what));
    worst = std::max(worst, error);
  }
  return worst;
}

template <class Change>
void check_hostile(const char* what, Change change) {
  for (const DType type : types) {
    for (const bool causal : {false, true}) {
      for (const std::int64_t dim : {40, 64, 128, 256}) {
        std::mt19937_64 random(3);
        AttentionCase attention = self_attention(type, 333, 3, dim, causal, random);
        change(attention);
        check(attention, brute_force(attention),
              fmt::format("{}, causal {}, seed 3", what, causal));
      }
    }
  }
}

// The error of acc / l, root of the mean square over that of the output.
double relative_error(const CaseStates& states, const CaseReference& reference, std::int64_t dim) {
  double errors = 0, outputs = 0;
  for (std::size_t i = 0; i < reference.output.size(); ++i) {
    const double l = double{states.l[i / static_cast<std::size_t>(dim)]};
    const double error = double{states.acc[i]} / l - reference.output[i];
    errors += error * error;
    outputs += reference.output[i] * reference.output[i];
  }
  return std::sqrt(errors / outputs);
}

// What launch_attention() takes for slots in pools.
CaseKernel pool_kernel(DType type, std::int64_t dim) { return kernels(type, dim).back(); }

void scale_elements(CaseTensor& tensor, DType type, float factor) {
  for (float& element : tensor.elements) element = rounded(type, element * factor);
}

}  // namespace

BOOST_AUTO_TEST_CASE(random_launches_agree_with_the_definition) {
  double worst = 0;
  for (const DType type : types) {
    for (const std::int64_t dim : dims) {
      for (int seed = 1; seed <= trials(4); ++seed) {
        std::mt19937_64 random(static_cast<std::uint64_t>(seed * 1000 + dim));
        const AttentionCase attention = random_case(type, dim, random);
        worst =
            std::max(worst, check(attention, brute_force(attention), fmt::format("seed {}", seed)));
      }
    }
  }
  BOOST_TEST_MESSAGE("largest error " << worst << " of what is allowed");
}

BOOST_AUTO_TEST_CASE(long_launches_agree_with_the_naive_kernel) {
  for (const DType type : types) {
    for (const bool causal : {false, true}) {
      for (const std::int64_t dim : {64, 128, 256}) {
        std::mt19937_64 random(5);
        const AttentionCase attention = self_attention(type, 8192, 5, dim, causal, random);
        check(attention, naive_attention(attention, causal),
              fmt::format("causal {}, seed 5", causal));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(the_naive_kernel_agrees_with_the_definition) {
  for (const bool causal : {false, true}) {
    std::mt19937_64 random(8);
    AttentionCase attention = self_attention(DType::f32, 200, 2, 64, causal, random);
    const CaseReference naive = naive_attention(attention, causal);
    const CaseReference exact = brute_force(attention);
    double worst = 0;
    for (std::size_t i = 0; i < exact.output.size(); ++i) {
      const double error = std::abs(naive.output[i] - exact.output[i]);
      if (!(error <= worst)) worst = error;
    }
    BOOST_TEST(worst <= 1e-12);
    BOOST_TEST((naive.keys == exact.keys));
  }
}

BOOST_AUTO_TEST_CASE(a_launch_repeats_its_bytes) {
  for (const DType type : types) {
    for (const std::int64_t dim : {64, 128, 256}) {
      std::mt19937_64 random(11);
      const AttentionCase attention = self_attention(type, 1500, 3, dim, true, random);
      for (const CaseKernel& kernel : kernels(type, dim)) {
        const CaseStates first = launch(attention, kernel);
        const CaseStates second = launch(attention, kernel);
        std::int64_t different = 0;
        for (std::int64_t row = 0; row < attention.rows(); ++row) {
          different += !same_row(first, second, row, dim);
        }
        BOOST_TEST(different == 0, kernel.name << ": " << describe(attention));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(scores_of_ten_thousand) {
  check_hostile("large scores", [](AttentionCase& attention) {
    scale_elements(attention.q, attention.type, 100.0f);
    scale_elements(attention.k, attention.type, 30.0f);
  });
}

// Every seventh key has the row's largest score, 2^30 and more before scaling, the others half of
// it: weights are 1 and 0, and every sum of products is exact.
BOOST_AUTO_TEST_CASE(scores_of_a_thousand_million) {
  for (const DType type : types) {
    for (const float sign : {1.0f, -1.0f}) {
      for (const std::int64_t dim : {64, 128, 256}) {
        std::mt19937_64 random(4);
        AttentionCase attention = self_attention(type, 333, 3, dim, true, random);
        attention.scale_log2 = 0.9f * sign;
        std::fill(attention.q.elements.begin(), attention.q.elements.end(), 4096.0f);
        for (std::int64_t key = 0; key < 333; ++key) {
          for (std::int64_t head = 0; head < attention.kv_heads; ++head) {
            std::fill_n(attention.k.vector(key, head), dim,
                        sign * (key % 7 == 0 ? 4096.0f : 2048.0f));
          }
        }
        const CaseReference exact = brute_force(attention);
        for (const CaseKernel& kernel : kernels(type, dim)) {
          const CaseStates states = launch(attention, kernel);
          double worst = 0;
          for (std::size_t i = 0; i < exact.output.size(); ++i) {
            const double l = double{states.l[i / static_cast<std::size_t>(dim)]};
            const double error = std::abs(double{states.acc[i]} / l - exact.output[i]);
            if (!(error <= worst)) worst = error;
          }
          BOOST_TEST(worst <= 1e-5, kernel.name << ": " << describe(attention));
          BOOST_TEST(worst_ratio(attention, states, exact) <= 1.0, kernel.name);
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(equal_scores) {
  check_hostile("equal scores", [](AttentionCase& attention) {
    scale_elements(attention.q, attention.type, 0.0f);
  });
}

BOOST_AUTO_TEST_CASE(an_attention_sink) {
  check_hostile("sink", [](AttentionCase& attention) {
    // Every query has a large first feature, and so has the first key alone.
    for (std::int64_t position = 0; position < 333; ++position) {
      for (std::int64_t head = 0; head < 4; ++head) {
        attention.q.vector(position, head)[0] = 64.0f;
      }
      for (std::int64_t head = 0; head < 2; ++head) {
        attention.k.vector(position, head)[0] = position == 0 ? 32.0f : 0.0f;
      }
    }
  });
}

BOOST_AUTO_TEST_CASE(zero_and_negative_scales) {
  check_hostile("scale 0", [](AttentionCase& attention) { attention.scale_log2 = 0; });
  check_hostile("scale -0.0", [](AttentionCase& attention) { attention.scale_log2 = -0.0f; });
  check_hostile("negative scale", [](AttentionCase& attention) { attention.scale_log2 *= -1; });
}

BOOST_AUTO_TEST_CASE(rows_without_a_key_are_empty) {
  for (const DType type : types) {
    for (const std::int64_t dim : {40, 128, 256}) {
      std::mt19937_64 random(13);
      AttentionCase attention = self_attention(type, 600, 3, dim, false, random);
      attention.causal_shift = -250;
      attention.uses.clear();
      use_live_pairs(attention, true, 1.0, random);
      BOOST_TEST(attention.uses.front().empty());
      check(attention, brute_force(attention), "seed 13");
      for (const CaseKernel& kernel : kernels(type, dim)) {
        const CaseStates states = launch(attention, kernel);
        BOOST_TEST(states.m[249 * 4] == -HUGE_VALF, kernel.name);
        BOOST_TEST(std::isfinite(states.m[250 * 4]), kernel.name);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(a_device_runs_the_kernel_that_is_made_for_it) {
  cudaDeviceProp device{};
  BOOST_TEST_REQUIRE(cudaGetDeviceProperties(&device, 0) == cudaSuccess);
#if defined(STREAM_CQSA_TEST_HOPPER)
  const bool hopper = device.major == 9 && device.minor == 0;
#else
  const bool hopper = false;
#endif
  const std::string_view expected = hopper ? "Hopper" : "portable";
  for (std::int64_t dim = 8; dim <= 256; dim += 8) {
    for (const DType type : {DType::f16, DType::bf16}) {
      BOOST_TEST(cuda::attention_kernel(type, dim) == expected, name_of(type) << ", dim " << dim);
    }
    BOOST_TEST(cuda::attention_kernel(DType::f32, dim) == std::string_view("portable"));
  }
  BOOST_TEST(cuda_kernel(0) == expected);
}

BOOST_AUTO_TEST_CASE(no_kernel_is_less_accurate_than_the_portable_one) {
  for (const DType type : {DType::f16, DType::bf16}) {
    for (const bool causal : {false, true}) {
      for (const std::int64_t dim : {32, 64, 96, 128, 256}) {
        std::mt19937_64 random(17);
        const AttentionCase attention = self_attention(type, 3000, 2, dim, causal, random);
        const CaseReference exact = naive_attention(attention, causal);
        const auto error_of = [&](const CaseKernel& kernel) {
          return relative_error(launch(attention, kernel), exact, dim);
        };
        const double portable = error_of(kernels(type, dim).front());
        const double pools = error_of(pool_kernel(type, dim));
        BOOST_TEST(pools <= 1.1 * portable, fmt::format("{} for {}: {}, causal {}", pools, portable,
                                                        describe(attention), causal));
      }
    }
  }
}

// Keys of the first tile have a score of 0, all others one so high that a tile's weights by the
// first one's maximum are just below what the Hopper kernel takes: sums grow as large as they may.
BOOST_AUTO_TEST_CASE(values_as_large_as_are_verified_do_not_overflow) {
  constexpr std::int64_t tokens = 1024;
  for (const std::int64_t dim : {32, 64, 96, 128, 256}) {
    const auto first_tile = cuda::attention_tile(DType::bf16, dim).keys;
    const double quarter = static_cast<double>(first_tile) / 4;
    const auto step = static_cast<float>(std::floor(8 * std::log2(512 / quarter)) / 8);
    std::mt19937_64 random(19);
    AttentionCase attention = self_attention(DType::bf16, tokens, 1, dim, false, random);
    attention.scale_log2 = 1;
    for (CaseTensor* tensor : {&attention.q, &attention.k}) {
      std::fill(tensor->elements.begin(), tensor->elements.end(), 0.0f);
    }
    std::fill(attention.v.elements.begin(), attention.v.elements.end(), 0x1p122f / tokens);
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (std::int64_t head = 0; head < attention.heads; ++head) {
        attention.q.vector(token, head)[0] = 1;
      }
      for (std::int64_t head = 0; head < attention.kv_heads; ++head) {
        attention.k.vector(token, head)[0] = token < first_tile ? 0 : step;
      }
    }
    check(attention, brute_force(attention), fmt::format("scores 0, then {}", step));
  }
}

// The launcher goes by what the pools say, the portable kernel by the chunks.
BOOST_AUTO_TEST_CASE(slots_that_tensor_copies_do_not_reach_are_the_portable_kernels) {
  for (const DType type : {DType::f16, DType::bf16}) {
    for (const std::int64_t dim : {64, 128, 256}) {
      std::mt19937_64 random(23);
      const AttentionCase attention = self_attention(type, 700, 3, dim, true, random);
      const CaseStates portable = launch(attention, kernels(type, dim).front());
      for (const auto pool : {&cuda::AttentionWork::query_pool, &cuda::AttentionWork::key_pool}) {
        CaseKernel far = pool_kernel(type, dim);
        far.launch = [=](cuda::AttentionWork work, cudaStream_t stream) {
          (work.*pool).tokens = cuda::most_pool_tokens + 1;
          cuda::launch_attention(type, work, stream);
        };
        const CaseStates states = launch(attention, far);
        for (std::int64_t row = 0; row < attention.rows(); ++row) {
          BOOST_TEST_REQUIRE(same_row(states, portable, row, dim), "row " << row);
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(a_cancelled_launch_begins_no_tile) {
  const cuda::DeviceMemory flag(sizeof(int));
  for (const DType type : types) {
    std::mt19937_64 random(29);
    const AttentionCase attention = self_attention(type, 700, 3, 64, true, random);
    for (const CaseKernel& kernel : kernels(type, attention.dim)) {
      const auto launch_with = [&](int number) {
        STREAM_CQSA_CUDA_CHECK(
            cudaMemcpy(flag.data(), &number, sizeof number, cudaMemcpyHostToDevice));
        CaseKernel asking = kernel;
        asking.launch = [&](cuda::AttentionWork work, cudaStream_t stream) {
          work.cancelled = reinterpret_cast<const int*>(flag.data());
          kernel.launch(work, stream);
        };
        return launch(attention, asking);
      };
      const CaseStates expected = launch(attention, kernel);
      const CaseStates wanted = launch_with(0);
      const CaseStates cancelled = launch_with(1);
      for (std::int64_t row = 0; row < attention.rows(); ++row) {
        BOOST_TEST_REQUIRE(same_row(wanted, expected, row, attention.dim),
                           kernel.name << ": row " << row);
      }
      const auto written = [](float value) { return !std::isnan(value); };
      BOOST_TEST(std::ranges::none_of(cancelled.acc, written), kernel.name);
      BOOST_TEST(std::ranges::none_of(cancelled.m, written), kernel.name);
      BOOST_TEST(std::ranges::none_of(cancelled.l, written), kernel.name);
    }
  }
}
