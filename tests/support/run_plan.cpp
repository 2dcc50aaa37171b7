#include "support/run_plan.hpp"

#include <iterator>

#include "stream_cqsa/files.hpp"

namespace stream_cqsa::testing {

PlanRequest roomy_request(const Problem& problem, Layout layout, const Backend& backend,
                          AccumulatorPlacement placement) {
  PlanRequest request;
  request.problem = problem;
  request.device = backend.traits(problem);
  request.device.merges = placement == AccumulatorPlacement::device;
  request.query.layout = request.key.layout = request.value.layout = layout;
  request.output_layout = layout;
  request.lse = true;
  request.device_budget = std::int64_t{1} << 30;
  request.host_budget = std::int64_t{1} << 30;
  request.scratch = true;
  return request;
}

void random_division(PlanRequest& request, std::initializer_list<std::int64_t> chunks,
                     std::mt19937_64& random) {
  if (random() % 3 == 0) {
    request.scheme = Scheme::tiles;
    request.grid = random_grid(random);
  } else {
    request.chunks = *(chunks.begin() + random() % chunks.size());
  }
}

Grid random_grid(std::mt19937_64& random) {
  constexpr std::int64_t counts[] = {1, 2, 3, 5, 8, 13, 24};
  const auto count = [&] { return counts[random() % std::size(counts)]; };
  return {count(), count()};
}

Outcome run_with(const Plan& plan, const Inputs& inputs, Backend& backend,
                 const RunOptions& options, Telemetry& telemetry) {
  const Problem& problem = plan.problem();
  TensorDesc desc = inputs.query.desc();
  desc.name = "o";
  desc.dtype = problem.output_dtype;
  Outcome outcome;
  outcome.output.resize(static_cast<std::size_t>(desc.bytes()));
  const TensorDesc lse = lse_desc(problem.batch, problem.query_heads, problem.query_length);
  if (plan.request.lse) outcome.lse.resize(static_cast<std::size_t>(lse.bytes()));
  const auto output_sink = make_memory_sink(desc, outcome.output);
  const auto lse_sink = plan.request.lse ? make_memory_sink(lse, outcome.lse) : nullptr;
  outcome.result = run(plan, inputs, {*output_sink, lse_sink.get()}, backend, options, telemetry);
  return outcome;
}

Outcome run_plan(const Plan& plan, const TestInput& input, Backend& backend, bool resident,
                 const std::filesystem::path& scratch) {
  const auto open = [&](const TestTensor& tensor) {
    return resident ? make_memory_source(tensor.desc, tensor.data) : block_source(tensor);
  };
  const auto query = open(input.query), key = open(input.key), value = open(input.value);
  RunOptions options;
  options.scratch = scratch;
  Telemetry telemetry;
  return run_with(plan, {*query, *key, *value}, backend, options, telemetry);
}

Plan with_accumulators_in_a_file(Plan plan) {
  plan.placement = AccumulatorPlacement::file;
  plan.host.state_buffers = 2;
  plan.host.accumulators = 4;
  plan.host.output_buffers = 1;
  return plan;
}

}  // namespace stream_cqsa::testing
