#include "app/bench_stream.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "app/audit.hpp"
#include "app/machine.hpp"
#include "app/problem.hpp"
#include "app/text.hpp"
#include "app/verification.hpp"
#include "engine/buffer.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"
#include "stream_cqsa/files.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

constexpr std::int64_t verified_rows = 8;
constexpr std::uint64_t seed = 1;

std::span<std::byte> bytes_of(const HostBuffer& buffer) {
  return {buffer.data(), static_cast<std::size_t>(buffer.bytes())};
}

/// A source's tensor, read whole into memory by all cores.
class Loaded {
 public:
  explicit Loaded(TensorSource& source)
      : memory_(source.desc().elements() * size_of(storage_type(source.desc().dtype))) {
    const TensorDesc& desc = source.desc();
    const std::int64_t row = desc.heads * desc.dim * size_of(storage_type(desc.dtype));
    const int threads = this_machine().cores;
    std::vector<std::jthread> readers;
    for (int i = 0; i < threads; ++i) {
      readers.emplace_back([&, part = split(desc.tokens, 1, threads, i)] {
        for (std::int64_t batch = 0; batch < desc.batch; ++batch) {
          const Block block{batch, part, {0, desc.heads}};
          const std::int64_t first = (batch * desc.tokens + part.begin) * row;
          source.read(block,
                      bytes_of(memory_).subspan(static_cast<std::size_t>(first),
                                                static_cast<std::size_t>(part.size() * row)));
        }
      });
    }
  }
  std::span<std::byte> memory() const { return bytes_of(memory_); }

 private:
  HostBuffer memory_;
};

struct Round {
  RunResult result;
  double kernel_seconds = 0;
  double copy_in_seconds = 0;
  double copy_out_seconds = 0;
  double merge_seconds = 0;
};

Round run_round(const Plan& plan, const StreamOptions& options, const Inputs& inputs,
                TensorSink& sink) {
  ResourceOptions resources = options.resources;
  resources.backend = plan.request.device.kind;  // what `auto` has become
  const auto backend = make_backend(resources, plan.problem());
  Telemetry telemetry;
  Round round;
  round.result = run(plan, inputs, {sink, nullptr}, *backend,
                     run_options(options.resources, plan.request.device), telemetry);
  const auto totals = telemetry.totals();
  const auto busy = [&](Stage stage) {
    return totals[static_cast<std::size_t>(stage)].busy_seconds;
  };
  round.kernel_seconds = busy(Stage::compute);
  round.copy_in_seconds = busy(Stage::copy_in);
  round.copy_out_seconds = busy(Stage::copy_out);
  round.merge_seconds = busy(Stage::merge);
  return round;
}

json to_json(const Round& round, double flops) {
  return {{"seconds", round.result.seconds},
          {"kernel_seconds", round.kernel_seconds},
          {"copy_in_seconds", round.copy_in_seconds},
          {"copy_out_seconds", round.copy_out_seconds},
          {"merge_seconds", round.merge_seconds},
          {"flop_per_second", flops / round.result.seconds},
          {"kernel_flop_per_second", flops / round.kernel_seconds},
          {"scores_computed", round.result.scores_computed},
          {"device_bytes", round.result.device_bytes},
          {"host_bytes", round.result.host_bytes}};
}

Block block_of(const RowIndex& row) {
  return {row.batch, {row.token, row.token + 1}, {row.head, row.head + 1}};
}

std::vector<std::byte> row_bytes(const TensorDesc& desc, std::byte fill) {
  return std::vector<std::byte>(static_cast<std::size_t>(desc.dim * size_of(desc.dtype)), fill);
}

// Puts NaN, of any floating-point type, into rows: what is read there later was written since.
void forget(TensorSink& sink, const std::vector<RowIndex>& rows) {
  const std::vector<std::byte> nan = row_bytes(sink.desc(), std::byte{0xFF});
  for (const RowIndex& row : rows) sink.write(block_of(row), nan);
}

std::vector<double> read_row(TensorSink& sink, const RowIndex& row) {
  std::vector<std::byte> bytes = row_bytes(sink.desc(), std::byte{0});
  sink.read(block_of(row), bytes);
  return to_double(sink.desc().dtype, bytes);
}

// Not chosen by prediction, which is of runs from and to files.
Plan plan_of(const OpenProblem& open, const ResourceOptions& resources, const Backend& backend) {
  const Capacity capacity = capacity_of(resources, open.problem, backend);
  if (!resources.plan.empty()) return plan_for(open, resources, false, capacity);
  return make_plan(request_for(open, resources, false, capacity));
}

bool wait_for_line(bool lockstep) {
  std::string line;
  return !lockstep || static_cast<bool>(std::getline(std::cin, line));
}

}  // namespace

json bench_stream(const StreamOptions& options, std::FILE* out) {
  InputOptions input = options.input;
  input.layout = name_of(Layout::bshd);
  input.input = fmt::format("synthetic:{}", seed);
  OpenProblem open = open_problem(input, options.attention);
  const Loaded query(*open.query), key(*open.key), value(*open.value);
  const HostBuffer output(output_desc(open).bytes());
  const auto backend = make_backend(options.resources, open.problem);
  std::vector<std::shared_ptr<void>> pins;
  for (const auto memory : {query.memory(), key.memory(), value.memory()}) {
    pins.push_back(backend->pin(memory));
  }
  open.query = make_memory_source(open.query->desc(), query.memory());
  open.key = make_memory_source(open.key->desc(), key.memory());
  open.value = make_memory_source(open.value->desc(), value.memory());

  const Plan plan = plan_of(open, options.resources, *backend);
  double scores = 0;
  for (const std::uint64_t of_chunk : expected_scores(plan))
    scores += static_cast<double>(of_chunk);
  const double flops = 4 * scores * static_cast<double>(open.problem.head_dim);
  const auto sink = make_memory_sink(output_desc(open), bytes_of(output));
  const auto rows = sample_rows(open.problem, verified_rows, seed);

  json rounds = json::array();
  for (int number = 0; number <= options.rounds && wait_for_line(options.lockstep); ++number) {
    forget(*sink, rows);
    const Round round = run_round(plan, options, {*open.query, *open.key, *open.value}, *sink);
    json line = to_json(round, flops);
    line["warm_up"] = number == 0;
    if (options.lockstep) {
      fmt::print(out, "{}\n", line.dump());
    } else {
      fmt::print(out, "stream  {} {:.4f} s, kernel {:.4f} s, {}\n",
                 number == 0 ? "warm-up" : "round  ", round.result.seconds, round.kernel_seconds,
                 format_flops(flops / round.result.seconds));
    }
    std::fflush(out);
    rounds.push_back(line);
  }
  if (rounds.empty()) {
    throw InputError("--lockstep: standard input ended before its first line, the warm-up's");
  }
  const Verification verification =
      verify_rows(open, rows, [&](const RowIndex& row) { return read_row(*sink, row); });
  fmt::print(stderr, "stream  {}\n", describe(verification));
  if (!verification.ok()) throw Error("the result is wrong: " + describe(verification));
  json result = {
      {"device", plan.request.device.name},
      {"division", name_of(plan.division.scheme())},
      {"head_groups", plan.groups.size()},
      {"subproblems", plan.subproblem_count()},
      {"device_memory", {{"budget", plan.request.device_budget}, {"planned", plan.device.bytes()}}},
      {"host_memory", {{"budget", plan.request.host_budget}, {"planned", plan.host.bytes()}}},
      {"flops", flops},
      {"rounds", rounds},
      {"verification", to_json(verification)}};
  if (plan.division.scheme() == Scheme::tiles) {
    result["grid"] = {plan.division.grid().rows, plan.division.grid().columns};
  } else {
    result["c"] = plan.division.chunk_count();
  }
  return result;
}

}  // namespace stream_cqsa
