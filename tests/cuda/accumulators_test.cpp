// On a CUDA device: accumulators there give the bits of accumulators in host memory.
#define BOOST_TEST_MODULE cuda_accumulators
#include <array>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <random>

#include "stream_cqsa/cuda_backend.hpp"
#include "support/delayed_backend.hpp"
#include "support/needs_device.hpp"
#include "support/run_plan.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

BOOST_GLOBAL_FIXTURE(NeedsDevice);

BOOST_AUTO_TEST_CASE(accumulators_on_the_device_give_the_same_bits) {
  std::mt19937_64 random(61);
  constexpr DType types[] = {DType::f16, DType::bf16, DType::f32, DType::f64};
  std::int64_t non_finite = 0;
  for (int trial = 0; trial < trials(60); ++trial) {
    Problem problem = random_problem(random, 1500, 128, 8);
    problem.output_dtype = types[random() % 4];
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    TestInput input = random_input(problem, layout, 2.0, random);
    if (trial % 3 == 0) set_element(input.value, 0, 0, 0, 0, trial % 2 ? NAN : INFINITY);
    std::array<Outcome, 2> outcomes;
    for (const bool merges : {false, true}) {
      DelayedBackend backend(make_cuda_backend({}), static_cast<std::uint64_t>(trial));
      PlanRequest request =
          roomy_request(problem, layout, backend,
                        merges ? AccumulatorPlacement::device : AccumulatorPlacement::memory);
      request.chunks = std::array<std::int64_t, 3>{1, 7, 13}[trial % 3];
      request.lse = trial % 2;
      request.heads_per_group = 1 + trial / 2 % 2;
      if (*request.heads_per_group > problem.kv_heads) request.heads_per_group = 1;
      const Plan plan = make_plan(request);
      BOOST_TEST((plan.placement == AccumulatorPlacement::device) == merges);
      outcomes[merges] = run_plan(plan, input, backend, trial % 4 == 0);
      BOOST_TEST(outcomes[merges].result.merged_scores == expected_scores(plan));
      BOOST_TEST(outcomes[merges].result.device_bytes == plan.device.bytes());
    }
    BOOST_TEST_CONTEXT("trial " << trial << ", Nq " << problem.query_length << ", Nk "
                                << problem.key_length << ", D " << problem.head_dim) {
      BOOST_TEST((outcomes[1].output == outcomes[0].output));
      BOOST_TEST((outcomes[1].lse == outcomes[0].lse));
      BOOST_TEST((outcomes[1].result.output == outcomes[0].result.output));
    }
    non_finite += outcomes[0].result.output.nan + outcomes[0].result.output.infinite;
  }
  BOOST_TEST(non_finite > 0);
}
