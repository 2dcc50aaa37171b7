#include "stream_cqsa/engine.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "engine/assembler.hpp"
#include "engine/buffer.hpp"
#include "engine/checkpoint.hpp"
#include "engine/monitor.hpp"
#include "engine/passes.hpp"
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

/// The subproblems of a plan in order: those, and of them the query chunks, that are not done
/// before and that a continued run still lacks.
class Remaining {
 public:
  /// `hands_over(group)` is asked where nothing of a head group, nor of those after it by
  /// group_number(), has been given yet, but all of those before: whether another plan takes them.
  /// After a yes nothing more is given.
  Remaining(const Plan& plan, const Assembler& assembler,
            std::function<bool(std::int64_t)> hands_over)
      : plan_(plan), assembler_(assembler), hands_over_(std::move(hands_over)) {}

  std::optional<Assignment> next() {
    while (next_ < plan_.subproblem_count()) {
      Assignment assignment{next_++, {}};
      const auto [batch, group, quorum] = plan_.key(assignment.id);
      const std::int64_t number = group_number(plan_, batch, group);
      if (number < plan_.groups_done) continue;
      const bool between =
          quorum == 0 && (plan_.order == ScheduleOrder::groups_outer || group == 0);
      if (between && number > plan_.groups_done && hands_over_(number)) return std::nullopt;
      if (!assembler_.is_resumed()) return assignment;
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
  const std::function<bool(std::int64_t)> hands_over_;
  std::int64_t next_ = 0;
};

/// A run by one plan after another, each of which begins where the one before ends.
class Passes {
 public:
  Passes(const Inputs& inputs, const Outputs& outputs, Backend& backend, const RunOptions& options,
         Telemetry& telemetry)
      : inputs_(inputs),
        outputs_(outputs),
        backend_(backend),
        options_(options),
        telemetry_(telemetry) {
    if (options.tuning) tuner_.emplace(*options.tuning);
  }

  /// All of the plan, or, with the plan for the rest as the result, what comes before that.
  std::optional<PlannedAgain> run(const Plan& planned);

  /// Of all passes.
  RunResult& result() { return result_; }

 private:
  RunSoFar so_far(const Plan& plan, const Assembler& assembler) const;
  void add(const Assembler& assembler, std::int64_t host_bytes);
  bool is_durable() const { return !options_.checkpoint.directory.empty(); }

  const Inputs& inputs_;
  const Outputs& outputs_;
  Backend& backend_;
  RunOptions options_;
  Telemetry& telemetry_;
  std::optional<Tuner> tuner_;
  RunResult result_;
  double begin_ = 0;  ///< of the first pass
};

std::optional<PlannedAgain> Passes::run(const Plan& planned) {
  const double preparing = now_seconds();
  const bool first = begin_ == 0;
  options_.checkpoint.same_run = !first;
  Plan plan = planned;
  prepare(
      backend_, plan, [&](std::int64_t bytes) { return within_device(planned, bytes); },
      options_.warn, telemetry_);
  const HostBuffer memory(plan.host.bytes());
  const auto pinned =
      backend_.pin({memory.data(), static_cast<std::size_t>(plan.host.accumulator_offset())});
  const double begin = now_seconds();
  if (first) begin_ = begin;

  Abort abort;
  abort.on_failure([&] { backend_.cancel(); });
  Assembler assembler(plan, outputs_, memory.data(), options_, telemetry_, abort);
  if (first) tell_resumed(options_.checkpoint, assembler.resumed());
  Pipeline pipeline(plan, inputs_, memory.data() + plan.host.cache_offset(), backend_, assembler,
                    telemetry_, abort);
  std::optional<PlannedAgain> again;
  const RunSoFar before = so_far(plan, assembler);
  const auto hands_over = [&](std::int64_t group) {
    const StopRequest* stop = options_.checkpoint.stop;
    if (!tuner_ || (stop && stop->stop_now())) return false;
    RunSoFar run = so_far(plan, assembler).since(before);
    run.lacking = assembler.lacking_from(group);
    again = tuner_->ask(plan, run, group, begin - preparing, [&](const Plan& next) {
      return can_go_on_by(plan, next, is_durable(), options_.tuning->has_room);
    });
    if (again) assembler.leave_from(group);
    return again.has_value();
  };
  {
    const Quiesce quiesce{backend_};
    Crew crew(abort);
    assembler.start(crew);
    pipeline.start(
        crew,
        [remaining = Remaining(plan, assembler, hands_over)]() mutable { return remaining.next(); },
        options_.read_threads, [&] { assembler.end_of_partials(); });
    crew.join();
  }
  abort.rethrow_if_failed();
  add(assembler, memory.bytes());
  return again;
}

RunSoFar Passes::so_far(const Plan& plan, const Assembler& assembler) const {
  RunSoFar run = assembler.so_far();
  run.subproblems = telemetry_.subproblems_done();
  run.read_threads = std::max(options_.read_threads, 1);
  run.in_place = is_durable();
  run.in_parts = computes_in_parts(plan);
  return run;
}

void Passes::add(const Assembler& assembler, std::int64_t host_bytes) {
  RunResult pass = result_of(assembler, host_bytes);
  pass.output += backend_.output_non_finite();
  pass.device_bytes = backend_.allocated_bytes();
  pass.device_in_use = backend_.memory_in_use();
  if (options_.checkpoint.same_run) pass.checkpoint.resumed = {};  // this run has left it
  add_pass(result_, pass);
  result_.seconds = now_seconds() - begin_;
  result_.scores_computed = backend_.scores_computed();
}

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
  Passes passes(inputs, outputs, backend, options, telemetry);
  std::vector<PlannedAgain>& later = passes.result().planned_again;
  for (auto again = passes.run(planned); again; again = passes.run(later.back().plan)) {
    if (options.warn) options.warn(describe(*again));
    later.push_back(std::move(*again));
  }
  return std::move(passes.result());
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
