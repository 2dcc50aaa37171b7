#include "stream_cqsa/engine.hpp"

#include <fmt/format.h>

#include "engine/assembler.hpp"
#include "engine/buffer.hpp"
#include "engine/checkpoint.hpp"
#include "engine/monitor.hpp"
#include "engine/pipeline.hpp"
#include "engine/prepare.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

void check_tensor(const TensorDesc& desc, const Problem& problem, std::int64_t tokens,
                  std::int64_t heads, DType dtype, Layout layout) {
  if (desc.batch == problem.batch && desc.tokens == tokens && desc.heads == heads &&
      desc.dim == problem.head_dim && desc.dtype == dtype && desc.layout == layout) {
    return;
  }
  throw InputError(fmt::format(
      "{}: [{}, {}, {}, {}] {} {} is not what the plan was made for, [{}, {}, {}, {}] {} {}; "
      "plan again for this tensor",
      desc.name, desc.batch, desc.tokens, desc.heads, desc.dim, name_of(desc.dtype),
      name_of(desc.layout), problem.batch, tokens, heads, problem.head_dim, name_of(dtype),
      name_of(layout)));
}

void check_checkpoint(const Plan& plan, const CheckpointOptions& options) {
  if (options.directory.empty() || plan.placement != AccumulatorPlacement::device) return;
  throw InputError("the plan keeps accumulators on the device, where no checkpoint can be made");
}

// It has accumulators for a share of the query chunks alone: one rank would wait for more of them.
void check_mergers(const Plan& plan) {
  if (plan.request.mergers == 0) return;
  throw InputError(fmt::format(
      "the plan is one for several ranks, of which {} merge beside the master; run it on these, or "
      "plan again",
      plan.request.mergers));
}

/// The subproblems of a plan in order: those, and of them the query chunks, that a continued run
/// still lacks.
class Remaining {
 public:
  Remaining(const Plan& plan, const Assembler& assembler) : plan_(plan), assembler_(assembler) {}

  std::optional<Assignment> next() {
    while (next_ < plan_.subproblem_count()) {
      Assignment assignment{next_++, {}};
      if (!assembler_.is_resumed()) return assignment;
      const auto [batch, group, quorum] = plan_.key(assignment.id);
      bool any = false;
      for (const Chunk& chunk : plan_.work(assignment.id).chunks) {
        const bool lacks = assembler_.lacks(batch, group, chunk.index, quorum);
        assignment.wanted.push_back(lacks);
        any = any || lacks;
      }
      if (any) return assignment;
    }
    return std::nullopt;
  }

 private:
  const Plan& plan_;
  const Assembler& assembler_;
  std::int64_t next_ = 0;
};

}  // namespace

void check_outputs(const Plan& plan, const Outputs& outputs) {
  const Problem& problem = plan.problem();
  const PlanRequest& request = plan.request;
  check_tensor(outputs.output.desc(), problem, problem.query_length, problem.query_heads,
               problem.output_dtype, request.output_layout);
  if (request.lse != (outputs.lse != nullptr)) {
    throw InputError("the plan and the outputs disagree on whether lse is written");
  }
  if (plan.placement == AccumulatorPlacement::file && !request.scratch) {
    throw InputError("the plan keeps accumulators in a file: give a scratch directory");
  }
}

void check_inputs(const Plan& plan, const Inputs& inputs) {
  const Problem& problem = plan.problem();
  const PlanRequest& request = plan.request;
  check_tensor(inputs.query.desc(), problem, problem.query_length, problem.query_heads,
               problem.dtype, request.query.layout);
  check_tensor(inputs.key.desc(), problem, problem.key_length, problem.kv_heads, problem.dtype,
               request.key.layout);
  check_tensor(inputs.value.desc(), problem, problem.key_length, problem.kv_heads, problem.dtype,
               request.value.layout);
}

RunResult run(const Plan& planned, const Inputs& inputs, const Outputs& outputs, Backend& backend,
              const RunOptions& options, Telemetry& telemetry) {
  check_inputs(planned, inputs);
  check_outputs(planned, outputs);
  check_checkpoint(planned, options.checkpoint);
  check_mergers(planned);
  Plan plan = planned;
  prepare(
      backend, plan, [&](std::int64_t bytes) { return within_device(planned, bytes); },
      options.warn, telemetry);
  const HostBuffer memory(plan.host.bytes());
  const auto pinned =
      backend.pin({memory.data(), static_cast<std::size_t>(plan.host.accumulator_offset())});
  const double begin = now_seconds();

  Abort abort;
  abort.on_failure([&] { backend.cancel(); });
  Assembler assembler(plan, outputs, memory.data(), options, telemetry, abort);
  tell_resumed(options.checkpoint, assembler.resumed());
  Pipeline pipeline(plan, inputs, memory.data() + plan.host.cache_offset(), backend, assembler,
                    telemetry, abort);
  {
    const Quiesce quiesce{backend};
    Crew crew(abort);
    assembler.start(crew);
    pipeline.start(
        crew, [remaining = Remaining(plan, assembler)]() mutable { return remaining.next(); },
        options.read_threads, [&] { assembler.end_of_partials(); });
    crew.join();
  }
  abort.rethrow_if_failed();

  RunResult result;
  result.seconds = now_seconds() - begin;
  result.merged_scores = assembler.merged_scores();
  result.output = assembler.non_finite();
  result.output += backend.output_non_finite();
  result.scores_computed = backend.scores_computed();
  result.device_bytes = backend.allocated_bytes();
  result.device_in_use = backend.memory_in_use();
  result.host_bytes = memory.bytes();
  result.scratch_bytes = assembler.scratch_bytes();
  result.checkpoint = assembler.checkpoint_totals();
  return result;
}

std::vector<std::uint64_t> expected_scores(const Plan& plan) {
  const Problem& problem = plan.problem();
  const auto heads = static_cast<std::uint64_t>(problem.batch * problem.query_heads);
  std::vector<std::uint64_t> scores;
  for (std::int64_t chunk = 0; chunk < plan.division.chunk_count(); ++chunk) {
    const Range queries = plan.division.chunk(chunk).queries;
    scores.push_back(
        heads * static_cast<std::uint64_t>(problem.live_scores(queries, {0, problem.key_length})));
  }
  return scores;
}

}  // namespace stream_cqsa
