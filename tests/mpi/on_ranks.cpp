#include "on_ranks.hpp"

#include <array>
#include <boost/test/unit_test.hpp>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "core/merge_shares.hpp"
#include "support/delayed_backend.hpp"
#include "support/durable_run.hpp"

namespace stream_cqsa::testing {

Case random_case(std::mt19937_64& random, AccumulatorPlacement placement, int mergers) {
  const Problem problem = random_problem(random, 150, 24, 1);
  const Layout layout = random() % 2 ? Layout::bshd : Layout::bhsd;
  const auto backend = make_cpu_backend({1});
  const bool by_groups = placement == AccumulatorPlacement::device;
  PlanRequest request = roomy_request(problem, layout, *backend,
                                      by_groups ? placement : AccumulatorPlacement::memory);
  random_division(request, {1, 2, 3, 7, 12, 13, 31}, random);
  request.mergers = mergers;
  // For one worker any number of head groups may be merged on the device.
  request.workers = by_groups ? 1 : world().size() - 1 - mergers;
  if (random() % 2) request.heads_per_group = 1;
  Plan plan = make_plan(request);
  if (placement == AccumulatorPlacement::file) plan = with_accumulators_in_a_file(plan);
  BOOST_REQUIRE((plan.placement == placement));
  return {problem, layout, plan, random_input(problem, layout, 2.0, random)};
}

AccumulatorPlacement placement_of(std::uint64_t trial) {
  return std::array{AccumulatorPlacement::memory, AccumulatorPlacement::device,
                    AccumulatorPlacement::file}[trial % 3];
}

namespace {

/// The part of a rank that merges: the rows that it merges are in the outcome.
Outcome merge_on_rank(const Case& own, const RunOptions& options, Telemetry& telemetry,
                      MasterResult& master, MergerResult& merger, const BeforeWrite& before_write,
                      const OpenSource& through_master) {
  const Plan& plan = own.plan;
  Outcome outcome;
  TensorDesc desc = own.input.query.desc;
  desc.name = "o";
  desc.dtype = own.problem.output_dtype;
  outcome.output.resize(static_cast<std::size_t>(desc.bytes()));
  const TensorDesc lse =
      lse_desc(own.problem.batch, own.problem.query_heads, own.problem.query_length);
  outcome.lse.resize(static_cast<std::size_t>(lse.bytes()));
  WatchedSink output_sink(make_memory_sink(desc, outcome.output), before_write);
  const auto lse_sink = make_memory_sink(lse, outcome.lse);
  const Outputs outputs{output_sink, lse_sink.get()};
  const std::int64_t budget = plan.request.host_budget;
  if (world().rank() == 0) {
    const int workers = world().size() - 1 - options.mergers;
    const MergeShares shares(plan, options.mergers);
    const auto run = [&](const Inputs* served) {
      master = run_master(
          merger_plan(plan, workers, shares.chunks(0), budget, served != nullptr), outputs, options,
          telemetry, world(), [] {}, served);
    };
    if (through_master) {
      const auto query = through_master(own.input.query), key = through_master(own.input.key),
                 value = through_master(own.input.value);
      const Inputs inputs{*query, *key, *value};
      run(&inputs);
    } else {
      run(nullptr);
    }
    outcome.result = master.run;
  } else {
    merger = run_merger(
        plan, budget, [&] { return outputs; }, options, telemetry, world());
    outcome.result = merger.run;
  }
  BOOST_TEST(outcome.result.host_bytes <= budget);
  return outcome;
}

}  // namespace

Outcome run_on_ranks(const Case& own, const MakeBackend& make_backend, MasterResult& master,
                     WorkerResult& worker, int mergers, MergerResult* merger,
                     const BeforeWrite& before_write, const OpenSource& through_master,
                     const CheckpointOptions& checkpoint) {
  // Rank 0 has ended the run before this one, and would take a message of this one for one of it.
  world().broadcast("");
  const Plan& plan = own.plan;
  Telemetry telemetry;
  RunOptions options;
  options.scratch = std::filesystem::temp_directory_path();
  options.mergers = mergers;
  options.checkpoint = checkpoint;
  MergerResult unseen;
  if (world().rank() <= mergers) {
    return merge_on_rank(own, options, telemetry, master, merger ? *merger : unseen, before_write,
                         through_master);
  }
  const auto backend = make_backend();
  const WorkerBudgets budgets{plan.request.device_budget, plan.request.host_budget};
  if (through_master) {
    RemoteInputs remote(own.input.query.desc, own.input.key.desc, own.input.value.desc, world());
    worker =
        run_worker(plan, budgets, remote.inputs(), *backend, options, telemetry, world(), &remote);
    return {};
  }
  const auto query = block_source(own.input.query), key = block_source(own.input.key),
             value = block_source(own.input.value);
  worker = run_worker(plan, budgets, {*query, *key, *value}, *backend, options, telemetry, world());
  return {};
}

Outcome together(const Outcome& part, int mergers) {
  const auto text = [](const auto& values) {
    return std::string(reinterpret_cast<const char*>(values.data()),
                       values.size() * sizeof values[0]);
  };
  const auto outputs = world().gather(text(part.output)), lses = world().gather(text(part.lse)),
             scores = world().gather(text(part.result.merged_scores)),
             nans = world().gather(std::to_string(part.result.output.nan));
  Outcome all = part;
  if (world().rank() > 0) return all;
  const auto add = [](std::vector<std::byte>& to, const std::string& from) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] |= static_cast<std::byte>(from.at(i));
  };
  for (int rank = 1; rank <= mergers; ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    add(all.output, outputs[at]);
    add(all.lse, lses[at]);
    std::vector<std::uint64_t> own(scores[at].size() / sizeof(std::uint64_t));
    std::memcpy(own.data(), scores[at].data(), scores[at].size());
    for (std::size_t i = 0; i < own.size(); ++i) all.result.merged_scores.at(i) += own[i];
    all.result.output.nan += std::stoll(nans[at]);
  }
  return all;
}

void check_same_bytes(const Case& own, const Outcome& outcome) {
  const auto backend = make_cpu_backend({1});
  Plan plan = own.plan;
  if (plan.request.mergers > 0) {
    // The same division for one rank, which needs all accumulators.
    PlanRequest request = roomy_request(own.problem, own.layout, *backend);
    request.scheme = plan.request.scheme;
    request.chunks = plan.request.chunks;
    request.grid = plan.request.grid;
    request.heads_per_group = plan.request.heads_per_group;
    plan = make_plan(request);
    BOOST_TEST(plan.groups.size() == own.plan.groups.size());
  }
  const Outcome alone = run_plan(plan, own.input, *backend, true);
  BOOST_TEST(outcome.output == alone.output);
  BOOST_TEST(outcome.lse == alone.lse);
  BOOST_TEST(outcome.result.merged_scores == expected_scores(own.plan));
  BOOST_TEST(outcome.result.output.nan == alone.result.output.nan);
}

std::unique_ptr<Backend> delayed_backend(std::uint64_t trial) {
  return std::make_unique<DelayedBackend>(make_cpu_backend({1}),
                                          100 * trial + static_cast<std::uint64_t>(world().rank()));
}

MakeBackend failing_on(int failing, std::uint64_t trial, std::mt19937_64& random) {
  const auto lane = static_cast<Lane>(trial % lane_count);
  const int after = static_cast<int>(random() % 6);
  return [=]() -> std::unique_ptr<Backend> {
    if (world().rank() != failing) return delayed_backend(trial);
    return std::make_unique<FailingBackend>(make_cpu_backend({1}), lane, after);
  };
}

}  // namespace stream_cqsa::testing
