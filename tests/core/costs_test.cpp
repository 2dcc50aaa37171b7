// What work costs, and what a plan is predicted to take.
#define BOOST_TEST_MODULE costs
#include "stream_cqsa/costs.hpp"

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <random>
#include <string>

#include "core/plan_demands.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/softmax_state.hpp"

namespace sc = stream_cqsa;

namespace {

sc::DeviceTraits cuda_traits() {
  sc::DeviceTraits traits;
  traits.kind = "cuda";
  traits.name = "NVIDIA H200";
  traits.tile = 192;
  traits.slot_alignment = 256;
  traits.overlap_worth = 16;
  traits.overlap_flop = 2'000'000'000'000;
  traits.merges = true;
  return traits;
}

sc::PlanRequest request_of(std::int64_t length, std::int64_t heads, bool causal) {
  sc::PlanRequest request;
  request.problem = {1,
                     heads,
                     heads,
                     length,
                     length,
                     64,
                     sc::DType::f16,
                     sc::DType::f16,
                     causal ? sc::Mask::causal : sc::Mask::none,
                     sc::default_scale(64)};
  request.device = cuda_traits();
  request.device_budget = std::int64_t{4} << 30;
  request.host_budget = std::int64_t{64} << 30;
  return request;
}

// Every rate of the file, as a pointer to it.
std::vector<double sc::Costs::*> rates_of_costs() {
  return {&sc::Costs::copy_in, &sc::Costs::copy_out, &sc::Costs::device_merge,
          &sc::Costs::merge,   &sc::Costs::read,     &sc::Costs::generate,
          &sc::Costs::write,   &sc::Costs::receive,  &sc::Costs::rewrite};
}

bool close(double a, double b) { return std::abs(a - b) <= 1e-9 * std::max(a, b); }

}  // namespace

BOOST_AUTO_TEST_CASE(costs_printed_and_read_back_are_the_same) {
  sc::Costs costs = sc::builtin_costs(cuda_traits());
  costs.measured = true;
  BOOST_TEST((sc::costs_from_json(sc::to_json_text(costs), "f") == costs));
  BOOST_TEST(costs.device == "NVIDIA H200");
}

BOOST_AUTO_TEST_CASE(costs_that_were_kept_before_direct_reads_are_still_read) {
  std::string text = sc::to_json_text(sc::builtin_costs(cuda_traits()));
  const std::size_t at = text.find(" \"read_direct");
  text.erase(at, text.find('\n', at) + 1 - at);
  BOOST_TEST(sc::costs_from_json(text, "f").read_direct == 0);
}

BOOST_AUTO_TEST_CASE(what_are_no_costs_is_refused_by_name) {
  const std::string good = sc::to_json_text(sc::builtin_costs(cuda_traits()));
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    return text;
  };
  const auto refused = [](const std::string& text, const std::string& says) {
    BOOST_CHECK_EXCEPTION(
        sc::costs_from_json(text, "costs.json"), sc::InputError, [&](const sc::InputError& error) {
          const std::string what = error.what();
          BOOST_TEST_INFO(what);
          return what.find("costs.json") == 0 && what.find(says) != std::string::npos &&
                 what.find("bench --save") != std::string::npos;
        });
  };
  for (std::size_t length = 0; length < good.size() - 2; length += 7)
    refused(good.substr(0, length), "");
  refused("[]", "version");
  refused(with("\"version\": 1", "\"version\": 2"), "version");
  refused(with("\"version\": 1", "\"version\": \"1\""), "");
  refused(with("\"merge_bytes_per_second\"", "\"merged\""), "merge_bytes_per_second");
  refused(with("\"copy_in_bytes_per_second\": 54000000000.0", "\"copy_in_bytes_per_second\": 0"),
          "copy_in_bytes_per_second");
  refused(with("\"copy_in_bytes_per_second\": 54000000000.0", "\"copy_in_bytes_per_second\": -1"),
          "copy_in_bytes_per_second");
  refused(
      with("\"copy_in_bytes_per_second\": 54000000000.0", "\"copy_in_bytes_per_second\": 1e999"),
      "");
  refused(
      with("\"copy_in_bytes_per_second\": 54000000000.0", "\"copy_in_bytes_per_second\": 1e-320"),
      "copy_in_bytes_per_second");
  refused(with("\"head_dim\": 64", "\"head_dim\": 1e300"), "head_dim");
  refused(with("\"head_dim\": 64", "\"head_dim\": -64"), "head_dim");
  refused(with("\"f16\"", "\"f17\""), "dtype");
}

BOOST_AUTO_TEST_CASE(the_nearest_kernel_is_taken) {
  const sc::Costs costs = sc::builtin_costs(cuda_traits());
  sc::Problem problem = request_of(1024, 8, true).problem;
  for (const auto& [dim, nearest] :
       {std::pair<std::int64_t, std::int64_t>{8, 64}, {64, 64}, {95, 64}, {97, 128}, {256, 128}}) {
    problem.head_dim = dim;
    const sc::KernelCost& kernel = sc::kernel_cost(costs, problem);
    BOOST_TEST(kernel.head_dim == nearest);
    BOOST_TEST((kernel.dtype == sc::DType::f16));
    BOOST_TEST((kernel.mask == sc::Mask::causal));
  }
  problem.dtype = sc::DType::f64;  // is fp32 in memory
  BOOST_TEST((sc::kernel_cost(costs, problem).dtype == sc::DType::f32));
}

BOOST_AUTO_TEST_CASE(a_kernel_slows_down_from_its_first_rate_to_its_last) {
  const sc::KernelCost kernel{64, sc::DType::f16, sc::Mask::none, 500e12, 600e12, 1e-5};
  BOOST_TEST(close(sc::kernel_seconds(kernel, 0, 7), 7e-5));
  double before = 600e12;
  for (double flop = 1e10; flop < 1e18; flop *= 3) {
    const double rate = flop / sc::kernel_seconds(kernel, flop, 0);
    BOOST_TEST(rate <= before * (1 + 1e-12));
    BOOST_TEST(rate >= 500e12);
    before = rate;
  }
  BOOST_TEST(std::abs(sc::kernel_seconds(kernel, 600e9, 0) - 1e-3) < 1e-5);
  BOOST_TEST(std::abs(sc::kernel_seconds(kernel, 500e15, 0) - 1000) < 1);
}

BOOST_AUTO_TEST_CASE(one_subproblem_goes_through_one_stage_after_another) {
  sc::PlanRequest request = request_of(400'000, 4, false);
  request.chunks = 1;
  request.heads_per_group = 4;
  request.host_accumulators = true;
  request.device_budget = request.host_budget = std::int64_t{1} << 40;
  const sc::Plan plan = sc::make_plan(request);
  const sc::Costs costs = sc::builtin_costs(request.device);
  const double vectors = 400'000 * 4;
  const double state = vectors * static_cast<double>(sc::softmax_state_bytes(1, 64));
  const double flop = 4.0 * 64 * 4 * 16e10;
  const double input = 3 * vectors * 128, output = vectors * 128;
  const double expected = costs.start_seconds +
                          std::max(input / costs.read, input / costs.copy_in) +
                          sc::kernel_seconds(sc::kernel_cost(costs, request.problem), flop, 1) +
                          state / costs.copy_out + state / costs.merge + output / costs.write;
  const sc::Prediction prediction = sc::predict(plan, costs, sc::InputKind::files);
  BOOST_TEST(close(prediction.seconds, expected));
  BOOST_TEST((prediction.bottleneck() == sc::Stage::compute));
  BOOST_TEST(close(prediction.busy_of(sc::Stage::write), output / costs.write));
}

BOOST_AUTO_TEST_CASE(
    random_plans_take_as_long_as_their_slowest_stage_and_no_less_with_slower_ones) {
  std::mt19937 random(7);
  const auto below = [&](int bound) {
    return static_cast<int>(random() % static_cast<unsigned>(bound));
  };
  for (int round = 0; round < 300; ++round) {
    sc::PlanRequest request =
        request_of(1 + below(1 << (4 + below(16))), 1 + below(8), below(2) == 0);
    if (below(2) == 0) request.problem.key_length = 1 + below(100'000);
    if (below(2) == 0) request.chunks = 1 + below(200);
    request.host_accumulators = below(2) == 0;
    request.lse = below(2) == 0;
    if (below(3) == 0) request.query.layout = request.output_layout = sc::Layout::bhsd;
    sc::Costs costs = sc::builtin_costs(request.device);
    for (const auto rate : rates_of_costs()) costs.*rate *= std::exp2(below(16) - 12);
    const sc::Plan plan = sc::make_plan(request);
    const sc::Prediction prediction = sc::predict(plan, costs, sc::InputKind::files);
    BOOST_TEST_CONTEXT("round " << round) {
      double busiest = 0;
      for (const double busy : prediction.busy) {
        BOOST_TEST(busy >= 0);
        busiest = std::max(busiest, busy);
      }
      BOOST_TEST(prediction.seconds >= busiest);
      BOOST_TEST(prediction.busy_of(prediction.bottleneck()) == busiest);
      double all = costs.start_seconds;
      for (const double busy : prediction.busy) all += busy;
      BOOST_TEST(prediction.seconds <= all * (1 + 1e-9));
      sc::Costs slower = costs;
      slower.*rates_of_costs()[static_cast<std::size_t>(below(9))] /= 2;
      const double slow = sc::predict(plan, slower, sc::InputKind::files).seconds;
      BOOST_TEST(slow >= prediction.seconds * (1 - 1e-9));
      BOOST_TEST(sc::predict(plan, costs, sc::InputKind::files).seconds == prediction.seconds);
    }
  }
}

// With room for all keys each chunk is copied once, whatever the mask leaves of the tiles.
BOOST_AUTO_TEST_CASE(dead_tiles_take_no_share_of_what_is_copied) {
  for (const bool causal : {false, true}) {
    sc::PlanRequest request = request_of(1 << 16, 4, causal);
    request.scheme = sc::Scheme::tiles;
    request.device_budget = std::int64_t{64} << 30;
    const sc::Costs costs = sc::builtin_costs(request.device);
    for (const std::int64_t count : {1, 2, 16, 100}) {
      request.grid = sc::Grid{count, count};
      const sc::Prediction prediction =
          sc::predict(sc::make_plan(request), costs, sc::InputKind::files);
      const double copied = prediction.busy_of(sc::Stage::copy_in) * costs.copy_in;
      const double inputs = 3.0 * 65536 * 4 * 128;
      BOOST_TEST(std::abs(copied / inputs - 1) < 0.05, count << " x " << count << ": " << copied);
    }
  }
}

BOOST_AUTO_TEST_CASE(problems_with_next_to_nothing_to_do_take_a_finite_time) {
  const auto finite = [](const sc::PlanRequest& request) {
    const sc::Prediction prediction = sc::predict(
        sc::make_plan(request), sc::builtin_costs(request.device), sc::InputKind::files);
    BOOST_TEST(std::isfinite(prediction.seconds));
    BOOST_TEST(prediction.seconds > 0);
    for (const double busy : prediction.busy) BOOST_TEST((std::isfinite(busy) && busy >= 0));
  };
  sc::PlanRequest keyless = request_of(1000, 2, true);
  keyless.problem.query_length = 100;
  keyless.problem.queries_after = 1000;
  BOOST_TEST(keyless.problem.live_scores({0, 100}, {0, 1000}) == 0);
  finite(keyless);
  keyless.chunks = 7;
  finite(keyless);

  // Few of many quorums have anything, and none of those that stand for all need be among them.
  for (const std::int64_t keys : {1, 3, 400}) {
    sc::PlanRequest few = request_of(400'000, 1, true);
    few.problem.key_length = keys;
    few.chunks = 2000;
    finite(few);
  }

  sc::PlanRequest batches = request_of(1, 1, false);
  batches.problem.batch = std::int64_t{1} << 40;
  batches.problem.head_dim = 1;
  finite(batches);
}

BOOST_AUTO_TEST_CASE(kernels_of_a_cpu_are_as_fast_as_it_has_threads) {
  sc::DeviceTraits cpu;
  const sc::Costs two = sc::builtin_costs(cpu);
  for (const std::int64_t threads : {1, 2, 7, 64}) {
    cpu.threads = threads;
    const sc::Costs costs = sc::builtin_costs(cpu);
    BOOST_REQUIRE(costs.kernels.size() == two.kernels.size());
    const double share = static_cast<double>(threads) / 2;
    for (std::size_t i = 0; i < two.kernels.size(); ++i) {
      const double rate = costs.kernels[i].flop_per_second;
      BOOST_TEST(std::abs(rate / (share * two.kernels[i].flop_per_second) - 1) < 1e-12);
      BOOST_TEST(costs.kernels[i].burst_flop_per_second == rate);
    }
    BOOST_TEST(costs.merge == two.merge);
  }
}

// Of a machine on which computing takes nearly all of the time.
sc::Costs slow_kernels(double flop_per_second) {
  sc::Costs costs = sc::builtin_costs(cuda_traits());
  for (sc::KernelCost& kernel : costs.kernels) {
    kernel.flop_per_second = kernel.burst_flop_per_second = flop_per_second;
    kernel.launch_seconds = 0;
  }
  return costs;
}

BOOST_AUTO_TEST_CASE(unequal_workers_compute_at_the_sum_of_their_rates) {
  const sc::Costs fast = slow_kernels(3e12), slow = slow_kernels(1e12);
  int on_device = 0;
  for (const bool causal : {false, true}) {
    for (const bool on_host : {false, true}) {
      sc::PlanRequest request = request_of(1 << 18, 32, causal);
      request.workers = 2;
      request.host_accumulators = on_host;
      request.heads_per_group = 1;
      const sc::Plan plan = sc::make_plan(request);
      on_device += plan.placement == sc::AccumulatorPlacement::device;
      const double tokens = 1 << 18;
      const double scores = causal ? tokens * (tokens + 1) / 2 : tokens * tokens;
      const double ideal = 4 * 64 * 32 * scores / 4e12;
      for (const auto& workers : {std::vector{fast, slow}, std::vector{slow, fast}}) {
        const sc::Prediction prediction =
            sc::predict(plan, sc::SharedCosts{fast, workers}, sc::InputKind::files);
        BOOST_TEST(prediction.seconds >= ideal);
        BOOST_TEST(prediction.seconds <= 1.03 * ideal, prediction.seconds
                                                           << " s, at best " << ideal << " s"
                                                           << (causal ? ", causal" : "")
                                                           << (on_host ? ", on host" : ""));
        BOOST_TEST((prediction.bottleneck() == sc::Stage::compute));
      }
    }
  }
  BOOST_TEST(on_device == 2);
}

// Partials that are computed later by a slower worker do not keep those of the others waiting.
BOOST_AUTO_TEST_CASE(many_unequal_workers_with_little_memory_compute_at_the_sum_of_their_rates) {
  const sc::Costs fast = slow_kernels(3e11), slow = slow_kernels(1e11);
  for (const bool causal : {false, true}) {
    sc::PlanRequest request = request_of(500'000, 1, causal);
    request.workers = 16;
    request.device_budget = std::int64_t{8} << 20;
    request.host_budget = std::int64_t{1} << 30;
    const sc::Plan plan = sc::make_plan(request);
    BOOST_TEST((plan.placement == sc::AccumulatorPlacement::memory));
    std::vector<sc::Costs> workers(8, slow);
    workers.insert(workers.end(), 8, fast);
    const sc::Prediction prediction =
        sc::predict(plan, sc::SharedCosts{fast, workers}, sc::InputKind::files);
    const double scores = causal ? 5e5 * (5e5 + 1) / 2 : 25e10;
    const double ideal = 4 * 64 * scores / 32e11;
    BOOST_TEST(prediction.seconds >= ideal);
    BOOST_TEST(prediction.seconds <= 1.05 * ideal,
               prediction.seconds << " s, at best " << ideal << " s" << (causal ? ", causal" : ""));
  }
}

BOOST_AUTO_TEST_CASE(a_worker_that_is_next_to_no_help_is_none) {
  const sc::Costs usual = slow_kernels(3e12);
  sc::Costs hardly_computes = slow_kernels(3e6), hardly_copies = usual;
  hardly_copies.copy_in = 1e3;
  for (const bool on_host : {false, true}) {
    sc::PlanRequest request = request_of(1 << 17, 8, false);
    request.workers = 2;
    request.host_accumulators = on_host;
    const sc::Plan plan = sc::make_plan(request);
    const double alone =
        sc::predict(plan, sc::SharedCosts{usual, {usual}}, sc::InputKind::files).seconds;
    for (const sc::Costs& other : {hardly_computes, hardly_copies}) {
      const sc::SharedCosts costs{usual, {other, usual}};
      const sc::Prediction prediction = sc::predict(plan, costs, sc::InputKind::files);
      BOOST_TEST(prediction.seconds <= 1.01 * alone);
      BOOST_TEST(prediction.seconds >= 0.99 * alone);
    }
  }
}

BOOST_AUTO_TEST_CASE(workers_that_are_alike_need_not_be_listed) {
  for (const bool causal : {false, true}) {
    for (const bool on_host : {false, true}) {
      sc::PlanRequest request = request_of(1 << 20, 8, causal);
      request.workers = 4;
      request.host_accumulators = on_host;
      const sc::Costs costs = sc::builtin_costs(request.device);
      const sc::Plan plan = sc::make_plan(request);
      const sc::SharedCosts listed{costs, std::vector<sc::Costs>(4, costs)};
      const sc::Prediction one = sc::predict(plan, costs, sc::InputKind::files);
      const sc::Prediction other = sc::predict(plan, listed, sc::InputKind::files);
      BOOST_TEST(one.seconds == other.seconds);
      BOOST_TEST((one.busy == other.busy));
    }
  }
}

BOOST_AUTO_TEST_CASE(workers_share_the_computing_and_not_the_master) {
  sc::PlanRequest request = request_of(1 << 20, 8, false);
  const sc::Costs costs = sc::builtin_costs(request.device);
  double alone = 0, before = 0;
  for (const std::int64_t workers : {1, 2, 4, 8}) {
    request.workers = workers;
    const sc::Plan plan = sc::make_plan(request);
    const sc::Prediction prediction = sc::predict(plan, costs, sc::InputKind::files);
    if (workers == 1) {
      alone = before = prediction.seconds;
      continue;
    }
    BOOST_TEST(prediction.seconds < before);
    BOOST_TEST(prediction.seconds * static_cast<double>(workers) >= 0.99 * alone);
    BOOST_TEST(prediction.busy_of(sc::Stage::transfer) > 0);
    before = prediction.seconds;
  }
}

BOOST_AUTO_TEST_CASE(the_demands_of_all_subproblems_are_the_bytes_of_the_run) {
  const auto near = boost::test_tools::tolerance(1e-6);
  for (const bool causal : {false, true}) {
    for (const std::int64_t chunks : {1, 2, 3, 7, 31}) {
      sc::PlanRequest request = request_of(40'000, 4, causal);
      request.chunks = chunks;
      request.heads_per_group = 2;
      request.host_accumulators = true;
      const sc::Plan plan = sc::make_plan(request);
      const sc::Demands demands(plan);
      double copied = 0, read = 0, finished = 0;
      for (std::int64_t id = 0; id < plan.subproblem_count(); ++id) {
        const sc::Demand demand = demands.of(plan.key(id));
        copied += demand.copied_bytes;
        read += demand.read_bytes;
        finished += demand.finished_bytes;
      }
      const sc::Traffic traffic = sc::estimate_traffic(plan);
      BOOST_TEST_CONTEXT("c = " << chunks << (causal ? ", causal" : "")) {
        BOOST_TEST(copied == traffic.copied_in, near);
        BOOST_TEST(read == traffic.read, near);
        BOOST_TEST(finished == traffic.written, near);
      }
    }
  }
}
