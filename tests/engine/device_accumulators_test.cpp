// Accumulators on the device: the same bits as in host memory, and nothing but rows copied out.
#define BOOST_TEST_MODULE engine_device_accumulators
#include "engine/device_accumulators.hpp"

#include <boost/test/unit_test.hpp>
#include <cmath>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>

#include "support/delayed_backend.hpp"
#include "support/run_plan.hpp"
#include "support/test_backend.hpp"
#include "support/trials.hpp"

using namespace stream_cqsa;
using namespace stream_cqsa::testing;

namespace {

Problem random_problem(std::mt19937_64& random) {
  constexpr DType types[] = {DType::f16, DType::bf16, DType::f32, DType::f64};
  Problem problem = testing::random_problem(random, 200, 40, test_dim_step());
  problem.output_dtype = types[random() % 4];
  return problem;
}

// The request's plans with accumulators in host memory and on the device.
struct Plans {
  explicit Plans(PlanRequest request) {
    for (const bool merges : {false, true}) {
      request.device.merges = merges;
      (merges ? device : memory).emplace(make_plan(request));
    }
  }
  std::optional<Plan> memory, device;
};

void check_same(const Outcome& device, const Outcome& memory) {
  BOOST_TEST(device.output == memory.output);
  BOOST_TEST(device.lse == memory.lse);
  BOOST_TEST(device.result.merged_scores == memory.result.merged_scores);
  BOOST_TEST((device.result.output == memory.result.output));
}

// Counts what is asked of the device, and whether state slots are used as they may be.
class CountingBackend : public DelayedBackend {
 public:
  explicit CountingBackend(std::unique_ptr<Backend> inner) : DelayedBackend(std::move(inner), 3) {}

  void prepare(const Plan& plan, Telemetry& telemetry) override {
    slots_ = plan.device.state_slots;
    DelayedBackend::prepare(plan, telemetry);
  }
  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    for (const QueryWork& query : work.queries) {
      BOOST_TEST(query.state_slot < slots_);
      BOOST_TEST(live_.insert(query.state_slot).second);
    }
    partials += static_cast<std::int64_t>(work.queries.size());
    return DelayedBackend::launch(std::move(work), after);
  }
  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    ++merges;
    BOOST_TEST(live_.contains(work.into_slot));
    BOOST_TEST(live_.erase(work.from_slot) == 1u);
    return DelayedBackend::merge(work, after);
  }
  Ticket finalise(const FinaliseWork& work, std::span<const Ticket> after) override {
    ++finished;
    BOOST_TEST(live_.erase(work.state_slot) == 1u);
    return DelayedBackend::finalise(work, after);
  }
  Ticket copy_out(const CopyOut&, std::span<const Ticket>) override {
    throw std::logic_error("a partial leaves the device");
  }
  Ticket copy_out_rows(const CopyOutRows& copy, std::span<const Ticket> after) override {
    rows += copy.rows;
    return DelayedBackend::copy_out_rows(copy, after);
  }

  std::int64_t partials = 0, merges = 0, finished = 0, rows = 0;

 private:
  std::int64_t slots_ = 0;
  std::set<std::int32_t> live_;  ///< state slots that hold something
};

// Takes no rows.
class NoReceiver : public PartialReceiver {
 public:
  bool try_buffer(Buffer&) override { return false; }
  Buffer wait_buffer() override { return {}; }
  void deliver(const Partial&) override {}
  bool try_output_buffer(Buffer&) override { return false; }
  Buffer wait_output_buffer() override { return {}; }
  void deliver_finished(const FinishedRows&) override {}
};

}  // namespace

BOOST_AUTO_TEST_CASE(the_bits_are_those_of_accumulators_in_memory) {
  std::mt19937_64 random(41);
  for (int trial = 0; trial < trials(90); ++trial) {
    const Problem problem = random_problem(random);
    const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
    const auto backend = make_test_backend(1 + trial % 3);
    PlanRequest request = roomy_request(problem, layout, *backend);
    request.device.tile = random() % 2 ? 1 : 16;
    random_division(request, {1, 7, 31}, random);
    request.lse = random() % 2;
    if (random() % 2) request.heads_per_group = 1;
    const Plans plans(request);
    BOOST_TEST_CONTEXT("trial " << trial << ", c " << request.chunks.value_or(0) << ", Nq "
                                << problem.query_length << ", Nk " << problem.key_length << ", D "
                                << problem.head_dim << ", causal " << (problem.mask == Mask::causal)
                                << ", lse " << request.lse) {
      BOOST_TEST((plans.device->placement == AccumulatorPlacement::device));
      const TestInput input = random_input(problem, layout, 2.0, random);
      const Outcome memory = run_plan(*plans.memory, input, *backend, trial % 4 == 0);
      const auto fresh = make_test_backend(1 + trial % 3);
      const Outcome device = run_plan(*plans.device, input, *fresh, trial % 4 == 0);
      check_same(device, memory);
      BOOST_TEST(device.result.merged_scores == expected_scores(*plans.device));
      BOOST_TEST(device.result.device_bytes == plans.device->device.bytes());
      BOOST_TEST(device.result.host_bytes == plans.device->host.bytes());
    }
  }
}

// One output buffer of one token's rows: every copy out waits for a write.
BOOST_AUTO_TEST_CASE(any_timing_and_the_fewest_buffers_give_the_same_bits) {
  std::mt19937_64 random(42);
  for (const std::int64_t c : {1, 7, 31, 0}) {  // 0: tiles
    for (const Mask mask : {Mask::none, Mask::causal}) {
      Problem problem;
      problem.batch = 2;
      problem.kv_heads = 2;
      problem.query_heads = 4;
      problem.query_length = 90;
      problem.key_length = 60;
      problem.head_dim = 8;
      problem.mask = mask;
      problem.scale = default_scale(problem.head_dim);
      const TestInput input = random_input(problem, Layout::bshd, 2.0, random);
      PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(2));
      request.device.tile = 1;
      if (c > 0) request.chunks = c;
      if (c == 0) {
        request.scheme = Scheme::tiles;
        request.grid = Grid{5, 4};
      }
      request.heads_per_group = 1;
      Plans plans(request);
      const auto backend = make_test_backend(2);
      const Outcome memory = run_plan(*plans.memory, input, *backend, false);
      plans.device->piece_tokens = c == 1 ? 7 : 1;
      plans.device->host.output_buffers = 1;
      plans.device->device.output_slots = 1;
      for (std::uint64_t seed = 0; seed < 3; ++seed) {
        DelayedBackend delayed(make_test_backend(2), seed);
        BOOST_TEST_CONTEXT("c " << c << ", causal " << (mask == Mask::causal) << ", seed " << seed)
        check_same(run_plan(*plans.device, input, delayed, false), memory);
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(only_finished_rows_leave_the_device) {
  std::mt19937_64 random(43);
  for (int trial = 0; trial < 24; ++trial) {
    const Problem problem = random_problem(random);
    PlanRequest request =
        roomy_request(problem, Layout::bshd, *make_test_backend(2), AccumulatorPlacement::device);
    request.device.tile = 1;
    random_division(request, {1, 7, 13, 31}, random);
    const Plan plan = make_plan(request);
    CountingBackend backend(make_test_backend(2));
    run_plan(plan, random_input(problem, Layout::bshd, 2.0, random), backend, false);
    // Every row with a partial, once.
    std::int64_t chunks = 0, rows = 0;
    for (std::int64_t i = 0; i < plan.division.chunk_count(); ++i) {
      const Range queries = plan.division.chunk(i).queries;
      if (plan.division.quorums_of_query(i).empty()) continue;
      chunks += problem.batch * static_cast<std::int64_t>(plan.groups.size());
      rows += problem.batch * problem.query_heads * queries.size();
    }
    BOOST_TEST(backend.finished == chunks);
    BOOST_TEST(backend.merges == backend.partials - chunks);
    BOOST_TEST(backend.rows == rows);
  }
}

BOOST_AUTO_TEST_CASE(nan_and_infinity_are_counted_as_on_the_host) {
  std::mt19937_64 random(44);
  std::int64_t nan = 0, infinite = 0;
  for (int trial = 0; trial < 24; ++trial) {
    Problem problem = random_problem(random);
    problem.dtype = DType::f32;
    TestInput input = random_input(problem, Layout::bshd, 1.0, random);
    const double poison[] = {NAN, INFINITY, -INFINITY};
    TestTensor& tensor = trial % 2 ? input.value : input.query;
    set_element(tensor, 0, 0, 0, 0, poison[random() % 3]);
    PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(2));
    random_division(request, {1, 7}, random);
    const Plans plans(request);
    const auto first = make_test_backend(2), second = make_test_backend(2);
    const Outcome memory = run_plan(*plans.memory, input, *first, false);
    BOOST_TEST_CONTEXT("trial " << trial)
    check_same(run_plan(*plans.device, input, *second, false), memory);
    nan += memory.result.output.nan;
    infinite += memory.result.output.infinite;
  }
  BOOST_TEST(nan > 0);
  BOOST_TEST(infinite > 0);
}

BOOST_AUTO_TEST_CASE(a_partial_out_of_turn_is_refused) {
  Problem problem;
  problem.query_length = problem.key_length = 70;
  problem.head_dim = 8;
  problem.scale = default_scale(4);
  const auto backend = make_test_backend(1);
  PlanRequest request =
      roomy_request(problem, Layout::bshd, *backend, AccumulatorPlacement::device);
  request.device.tile = 1;
  request.chunks = 7;
  const Plan plan = make_plan(request);
  Telemetry telemetry;
  backend->prepare(plan, telemetry);
  NoReceiver receiver;
  Abort abort;
  DeviceAccumulators accumulators(plan, *backend, receiver, telemetry, abort);
  const auto launched = [&](std::int64_t id) {
    Launched made{id, plan.key(id), plan.work(id), {Lane::compute, 0}, {}};
    for (std::size_t i = 0; i < made.work.chunks.size(); ++i) {
      made.state_slots.push_back(accumulators.take_slot());
    }
    return made;
  };
  accumulators.add(launched(0));
  accumulators.add(launched(1));
  BOOST_CHECK_THROW(accumulators.add(launched(5)), std::logic_error);
  backend->quiesce();
}
