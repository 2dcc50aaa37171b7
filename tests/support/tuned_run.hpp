// Runs whose rest is planned again. What stages take is told to the telemetry: nothing depends on
// how fast anything is.
#pragma once

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <memory>
#include <random>
#include <span>
#include <utility>

#include "stream_cqsa/engine.hpp"
#include "support/attention.hpp"
#include "support/delayed_backend.hpp"
#include "support/run_plan.hpp"
#include "support/test_backend.hpp"

namespace stream_cqsa::testing {

// Of every operation of a stage that is said to be slow.
inline constexpr double slow_seconds = 1e4;

inline void tell_slow(Telemetry& telemetry, Stage stage) {
  telemetry.record(stage, {0, slow_seconds}, 1, -1);
}

class SlowSource : public TensorSource {
 public:
  SlowSource(const TestTensor& tensor, Telemetry* slow)
      : TensorSource(tensor.desc), inner_(block_source(tensor)), slow_(slow) {}
  void read(const Block& block, std::span<std::byte> into) override {
    inner_->read(block, into);
    if (slow_) tell_slow(*slow_, Stage::read);
  }

 private:
  std::unique_ptr<TensorSource> inner_;
  Telemetry* slow_;  ///< or null
};

// Is slow at merging: on the device, or of what it copies out. Whatever a plan had must be freed
// before it is prepared for the next one.
class SlowBackend : public FailingBackend {
 public:
  SlowBackend(Lane lane, int submissions)
      : FailingBackend(make_test_backend(2), lane, submissions) {}

  void prepare(const Plan& plan, Telemetry& telemetry) override {
    BOOST_TEST(pinned_ == 0);
    FailingBackend::prepare(plan, telemetry);
    telemetry_ = &telemetry;
  }
  std::shared_ptr<void> pin(std::span<std::byte>) override {
    ++pinned_;
    return {this, [this](void*) { --pinned_; }};
  }
  Ticket merge(const MergeWork& work, std::span<const Ticket> after) override {
    if (slow_device) tell_slow(*telemetry_, Stage::merge);
    return FailingBackend::merge(work, after);
  }
  Ticket copy_out(const CopyOut& copy, std::span<const Ticket> after) override {
    if (slow_host) tell_slow(*telemetry_, Stage::merge);
    return FailingBackend::copy_out(copy, after);
  }

  Ticket launch(WorkList work, std::span<const Ticket> after) override {
    if (slow_reads) tell_slow(*telemetry_, Stage::read);
    return FailingBackend::launch(std::move(work), after);
  }

  bool slow_device = false, slow_host = false, slow_reads = false;

 private:
  Telemetry* telemetry_ = nullptr;
  std::atomic<int> pinned_{0};
};

inline constexpr int never_fails = 1 << 30;

// By costs of which each is far too good, so that every rate is found to be another.
inline Tuning wrong_tuning(const Plan& plan) {
  Costs costs = builtin_costs(plan.request.device);
  for (double Costs::*rate : {&Costs::copy_in, &Costs::copy_out, &Costs::device_merge,
                              &Costs::merge, &Costs::read, &Costs::write, &Costs::rewrite})
    costs.*rate *= 1e6;
  for (KernelCost& kernel : costs.kernels) {
    kernel.flop_per_second *= 1e6;
    kernel.burst_flop_per_second *= 1e6;
    kernel.launch_seconds /= 1e6;
  }
  return {costs, InputKind::files, 0};
}

/// A problem of several head groups, each of one key/value head, and a plan for it.
struct TunedCase {
  TestInput input;
  Plan plan;
};

inline TunedCase make_case(const Problem& problem, AccumulatorPlacement placement,
                           ScheduleOrder order, std::mt19937_64& random) {
  PlanRequest request = roomy_request(problem, Layout::bshd, *make_test_backend(2), placement);
  request.device.merges = true;
  request.host_accumulators = placement != AccumulatorPlacement::device;
  request.device.tile = 1;
  request.chunks = 13;
  request.heads_per_group = 1;
  request.order = order;
  Plan plan = make_plan(request);
  BOOST_REQUIRE((plan.placement == placement));
  BOOST_REQUIRE((plan.order == order));
  return {random_input(problem, Layout::bshd, 2.0, random), plan};
}

inline Problem random_groups(std::mt19937_64& random) {
  Problem problem = random_problem(random, 150, 16, test_dim_step());
  problem.batch = 1 + static_cast<std::int64_t>(random() % 3);
  problem.kv_heads = 3 + static_cast<std::int64_t>(random() % 3);
  problem.query_heads = problem.kv_heads * (1 + static_cast<std::int64_t>(random() % 2));
  problem.query_length += 100;
  problem.key_length += 100;
  problem.queries_before = problem.queries_after = 0;
  return problem;
}

inline TunedCase random_tuned_case(std::mt19937_64& random, AccumulatorPlacement placement,
                                   ScheduleOrder order) {
  return make_case(random_groups(random), placement, order, random);
}

// Token rows of six head groups, of which the host keeps about half: each group reads the others
// again, and a quorum's fit it beside the accumulators of all groups. Of the `keyless` ones the
// first half of the queries see no key; of `unmasked_queries` all see all.
inline TunedCase half_cached_case(std::mt19937_64& random, AccumulatorPlacement placement,
                                  bool keyless = false, std::int64_t unmasked_queries = 0) {
  Problem problem = random_groups(random);
  problem.batch = 1 + static_cast<std::int64_t>(random() % 2);
  problem.dtype = DType::f32;
  problem.query_heads = problem.kv_heads = 6;
  if (unmasked_queries > 0) {
    problem.query_length = unmasked_queries;
    problem.mask = Mask::none;
  }
  problem.key_length = keyless ? 3 * problem.query_length / 4 : 3 * problem.query_length;
  if (keyless) problem.mask = Mask::causal;
  problem.head_dim = keyless ? 32 : 8;
  problem.scale = default_scale(problem.head_dim);
  TunedCase own = make_case(problem, placement, ScheduleOrder::groups_outer, random);
  const double bytes = 4.0 * static_cast<double>((problem.query_length + 2 * problem.key_length) *
                                                 problem.query_heads * problem.head_dim);
  PlanRequest request = own.plan.request;
  request.scratch = false;
  request.host_budget = static_cast<std::int64_t>((keyless ? 0.87 : 0.6) * bytes);
  own.plan = make_plan(request);
  BOOST_REQUIRE((own.plan.placement == placement));
  return own;
}

}  // namespace stream_cqsa::testing
