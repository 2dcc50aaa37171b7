#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "app/commands.hpp"
#include "app/durable_run.hpp"
#include "app/json_text.hpp"
#include "app/problem.hpp"
#include "app/progress.hpp"
#include "app/rehearsal.hpp"
#include "app/rehearsal_findings.hpp"
#include "app/report.hpp"
#include "app/signals.hpp"
#include "app/text.hpp"
#include "app/text_file.hpp"
#include "app/tried_record.hpp"
#include "core/counted.hpp"
#include "engine/rehearsal.hpp"
#include "engine/watch.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

using nlohmann::json;

constexpr std::int64_t most_subproblems = 10000;
constexpr std::int64_t most_tokens = 1024;

// With a run's inputs, resources and outputs, so that its command line shapes the same plan.
struct RehearseArguments : JobOptions {
  std::int64_t subproblems = 3;
  std::optional<std::string> only;
  std::int64_t rows = 8;
  std::uint64_t seed = 3;
  std::string report;
  bool quiet = false;
};

bool parse_rehearse(const Arguments& arguments, RehearseArguments& options) {
  namespace po = boost::program_options;
  OptionGroup group("Rehearsal");
  group.add_options()("subproblems",
                      po::value(&options.subproblems)->default_value(3)->value_name("K"),
                      "how many are computed: the first of the plan, the last and evenly between")(
      "only",
      po::value<std::string>()->value_name("ID,ID,...")->notifier([&options](const auto& ids) {
        options.only = ids;
      }),
      "these subproblems instead, by their numbers in plan --json --subproblems")(
      "rows", po::value(&options.rows)->default_value(8)->value_name("R"),
      "query tokens of each that are recomputed in fp64, with all heads of its group")(
      "seed", po::value(&options.seed)->default_value(3)->value_name("SEED"),
      "chooses the query tokens")("report", po::value(&options.report)->value_name("FILE"),
                                  "write what is printed, and the plan, as JSON")(
      "quiet", po::bool_switch(&options.quiet), "no progress");
  OptionGroup all = job_group(options);
  all.add(group);
  return parse(
      arguments,
      "usage: stream-cqsa rehearse --input FILE [OPTION...]\n"
      "Tries a run with the same options before it is paid for: makes its plan, computes some of\n"
      "its subproblems by the same pipeline, and compares sampled rows of them with fp64 over the\n"
      "keys that they compute. Says what rate that gives, and what the whole run would take. Has\n"
      "no outputs and no accumulators: options that name these only shape the plan. --checkpoint\n"
      "keeps what was tried, for the same command to continue, until all has been.\n",
      all);
}

void check_arguments(const RehearseArguments& options, const MpiEnvironment& mpi) {
  if (mpi.size() > 1) {
    throw InputError(
        fmt::format("rehearse computes on one rank and was started on {}; leave out mpirun -n {}",
                    mpi.size(), mpi.size()));
  }
  if (options.resources.mergers > 0)
    throw InputError("--mergers needs several ranks, and rehearse computes on one");
  if (options.subproblems < 1 || options.subproblems > most_subproblems) {
    throw InputError(
        fmt::format("--subproblems {}: use 1 to {}", options.subproblems, most_subproblems));
  }
  if (options.rows < 1 || options.rows > most_tokens)
    throw InputError(fmt::format("--rows {}: use 1 to {}", options.rows, most_tokens));
}

Plan make_plan_of(const OpenProblem& open, const JobOptions& options, const Capacity& capacity,
                  const std::optional<CheckpointDirectory>& directory) {
  if (directory) return durable_plan(*directory, open, options, capacity);
  return plan_for(open, options.resources, !options.output.lse.empty(), capacity);
}

RehearsedPlan plan_of(const OpenProblem& open, const JobOptions& options, const Capacity& capacity,
                      const std::optional<CheckpointDirectory>& directory) {
  try {
    return {make_plan_of(open, options, capacity, directory), false};
  } catch (const InputError& error) {
    JobOptions more = options;
    more.resources.assume_scratch = true;
    try {
      return {make_plan_of(open, more, capacity, directory), true};
    } catch (const InputError&) {
      throw error;  // which names what the run would take without a scratch directory, too
    }
  }
}

CheckpointDirectory::Identity identity_of(OpenProblem& open, const RehearseArguments& options,
                                          const std::string& numerics) {
  auto identity = identity_of("rehearse", open, options, numerics);
  identity["--rows"] = options.rows;
  identity["--seed"] = options.seed;
  return identity;
}

// The record of what has been tried of `plan`, in a directory that is claimed for that.
TriedRecord open_record(CheckpointDirectory& directory, CheckpointDirectory::Identity identity,
                        const Plan& plan) {
  add_plan(plan, identity);
  TriedRecord record(directory.path(), directory.claim(identity, plan));
  if (record.dropped_bytes() > 0) {
    fmt::print(stderr, "stream-cqsa: the checkpoint in {} is damaged: {} bytes of it dropped\n",
               directory.path().string(), record.dropped_bytes());
  }
  return record;
}

void stop_where_asked() {
  if (stop_request().stop_now()) throw Stopped(0);
}

// Computes subproblems of a plan and checks them.
class Trials {
 public:
  Trials(OpenProblem& open, Rehearsal& rehearsal, Backend& backend,
         const RehearseArguments& options, TriedRecord* record)
      : open_(open), rehearsal_(rehearsal), backend_(backend), options_(options), record_(record) {}

  /// One after the other, but for those that the record has; a line for each as soon as it is
  /// known. Throws Stopped.
  std::vector<TriedSubproblem> all(const std::vector<std::int64_t>& ids);

 private:
  TriedSubproblem one(std::int64_t id);
  const TriedSubproblem* recorded(std::int64_t id) const {
    return record_ ? record_->find(id) : nullptr;
  }

  OpenProblem& open_;
  Rehearsal& rehearsal_;
  Backend& backend_;
  const RehearseArguments& options_;
  TriedRecord* record_;  // or null
};

TriedSubproblem Trials::one(std::int64_t id) {
  const Plan& plan = rehearsal_.plan();
  const QuorumWork work = plan.work(id);
  const auto tokens =
      sample_tokens(work, options_.rows, options_.seed + static_cast<std::uint64_t>(id));
  const RehearsedSubproblem computed = rehearsal_.compute(id, tokens);
  const auto seen = [](std::int64_t) { stop_where_asked(); };
  TriedSubproblem tried{id,
                        std::ssize(work.chunks),
                        std::ssize(work.pairs),
                        computed.scores,
                        computed.kernel_seconds,
                        computed.seconds,
                        verify_subproblem(open_, plan, id, computed.tokens, seen)};
  if (record_) record_->add(plan, tried);
  return tried;
}

std::vector<TriedSubproblem> Trials::all(const std::vector<std::int64_t>& ids) {
  const Plan& plan = rehearsal_.plan();
  double total = 0, before = 0;
  for (const std::int64_t id : ids) {
    const auto scores = static_cast<double>(scores_of(plan, id));
    total += scores;
    if (recorded(id)) before += scores;
  }
  std::atomic<std::int64_t> ended = 0;
  std::optional<Progress> progress;
  if (!options_.quiet) {
    progress.emplace([&](double) -> Progressed {
      const auto done = before + static_cast<double>(backend_.scores_computed());
      return {std::min(1.0, done / total), before / total,
              fmt::format("{} of {}", ended.load(), counted(std::ssize(ids), "subproblem"))};
    });
  }
  const Watch watch(record_ ? &stop_request() : nullptr);
  std::vector<TriedSubproblem> tried;
  for (const std::int64_t id : ids) {
    const TriedSubproblem* earlier = recorded(id);
    if (!earlier) stop_where_asked();
    tried.push_back(earlier ? *earlier : one(id));
    print_out(describe(plan, tried.back()));
    ++ended;
  }
  return tried;
}

// What was tried, or Resumable where a checkpoint has some of it.
std::vector<TriedSubproblem> try_all(Trials trials, const std::vector<std::int64_t>& ids,
                                     const std::string& checkpoint, const TriedRecord* record) {
  if (!record) return trials.all(ids);
  const std::int64_t before = record->size();
  const auto count = [&] {
    return std::ranges::count_if(ids, [&](std::int64_t id) { return record->find(id) != nullptr; });
  };
  if (before > 0) {
    fmt::print(stderr, "stream-cqsa: continuing from the checkpoint in {}: {} of {}\n", checkpoint,
               count(), counted(std::ssize(ids), "subproblem"));
  }
  try {
    return trials.all(ids);
  } catch (const InputError&) {
    throw;
  } catch (const Stopped&) {
    throw Resumable(fmt::format(
        "stopped after {} of {}, {} of them now; the same command continues from the checkpoint "
        "in {}",
        count(), counted(std::ssize(ids), "subproblem"), record->size() - before, checkpoint));
  } catch (const Error& error) {
    if (record->size() == 0) throw;
    throw Resumable(fmt::format("{}; the same command continues from the checkpoint in {}",
                                error.what(), checkpoint));
  }
}

nlohmann::json report_of(const Findings& found, Backend& backend, const Rehearsal& rehearsal,
                         const Telemetry& telemetry) {
  nlohmann::json report = to_json(found);
  report["versions"] = versions_json();
  report["memory"] = {{"device", backend.allocated_bytes()},
                      {"device_in_use", backend.memory_in_use()},
                      {"host", rehearsal.host_bytes()}};
  report["stages"] = stages_json(telemetry.totals());
  return report;
}

int execute(const RehearseArguments& options, const Arguments& command) {
  auto directory = open_checkpoint(options);
  OpenProblem open =
      open_problem(options.input, options.attention, all_host_budgets(options.resources));
  check_output_paths(options.input, options.resources, {options.report}, options.output.overwrite);
  const auto backend = make_backend(options.resources, open.problem);
  const Capacity capacity = capacity_of(options.resources, open.problem, *backend);
  const auto identity = identity_of(open, options, capacity.numerics);
  if (directory) directory->require_same(identity);
  const RehearsedPlan planned = plan_of(open, options, capacity, directory);
  const Plan& plan = planned.plan;
  const auto ids = options.only ? subproblems_option(plan, *options.only)
                                : spread_subproblems(plan, options.subproblems);
  if (ids.empty()) throw InputError("the mask leaves nothing to compute, and so to rehearse");
  TextFile report(options.report);
  std::optional<TriedRecord> record;
  if (directory) record.emplace(open_record(*directory, identity, plan));
  print_out(describe(plan));

  Telemetry telemetry;
  RunOptions running = run_options(options.resources, plan.request.device);
  if (directory) running.checkpoint.stop = &stop_request();
  Rehearsal rehearsal(plan, {*open.query, *open.key, *open.value}, *backend, running, telemetry);
  TriedRecord* const kept = record ? &*record : nullptr;
  const Findings found = findings_of(
      planned,
      try_all({open, rehearsal, *backend, options, kept}, ids, options.resources.checkpoint, kept),
      open);
  print_out(describe(found, !options.input.shape.empty()));
  if (report.stream()) {
    nlohmann::json all = report_of(found, *backend, rehearsal, telemetry);
    all["command"] = command;
    all["arithmetic"] = capacity.numerics;
    *report.stream() << json_text(all, 1) << "\n";
  }
  report.commit();
  if (directory) {
    ignore_signals();  // their answer, that the same command continues, is no longer true
    directory->clear();
  }
  return found.good() ? 0 : 1;
}

}  // namespace

int rehearse_command(const Arguments& arguments, const MpiEnvironment& mpi) {
  RehearseArguments options;
  if (!parse_rehearse(arguments, options)) return 0;
  check_arguments(options, mpi);
  Arguments command = arguments;
  command.insert(command.begin(), "rehearse");
  return execute(options, command);
}

}  // namespace stream_cqsa
