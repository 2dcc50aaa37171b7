#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <numeric>
#include <optional>

#include "app/audit.hpp"
#include "app/checkpoint_directory.hpp"
#include "app/commands.hpp"
#include "app/durable_run.hpp"
#include "app/input_files.hpp"
#include "app/json_text.hpp"
#include "app/outputs.hpp"
#include "app/problem.hpp"
#include "app/progress.hpp"
#include "app/ranks.hpp"
#include "app/report.hpp"
#include "app/room.hpp"
#include "app/signals.hpp"
#include "app/text.hpp"
#include "app/text_file.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::int64_t verified_rows = 8;
constexpr std::uint64_t verified_seed = 1;

struct RunArguments : JobOptions {
  std::string report, trace;
  bool no_verify = false;
  bool quiet = false;
};

bool parse_run(const Arguments& arguments, RunArguments& run) {
  OptionGroup reporting("Reporting");
  namespace po = boost::program_options;
  reporting.add_options()("report", po::value(&run.report)->value_name("FILE"),
                          "write plan, times, memory and certificate as JSON")(
      "trace", po::value(&run.trace)->value_name("FILE"),
      "write a trace-event file, for Perfetto or chrome://tracing")(
      "no-verify", po::bool_switch(&run.no_verify), "do not check sampled rows at the end")(
      "quiet", po::bool_switch(&run.quiet), "no progress and no closing table");
  OptionGroup all = job_group(run);
  all.add(reporting);
  return parse(
      arguments,
      "usage: stream-cqsa run --input FILE --output FILE [OPTION...]\n"
      "Computes O = softmax(scale Q K^T) V exactly, within the given memory. With several\n"
      "ranks (mpirun -n R) rank 0 merges and writes (with --mergers M, ranks 1 to M too), and the\n"
      "others compute.\n",
      all);
}

// Inputs and outputs, watched.
struct Audit {
  AuditedInputs inputs;
  AuditedSink output;
  std::optional<AuditedSink> lse;

  Audit(OpenProblem& open, Sinks& sinks, const std::vector<RowIndex>& rows, Telemetry& telemetry)
      : inputs({*open.query, *open.key, *open.value}, telemetry),
        output(*sinks.output, rows, telemetry) {
    if (sinks.lse) lse.emplace(*sinks.lse, rows, telemetry);
  }
  /// What a merger reports that it has written.
  void add(const nlohmann::json& merger) {
    output.add(merger.at("output"));
    if (lse) lse->add(merger.at("lse"));
  }
};

// Who computes: this rank, or others for it.
struct Computing {
  std::unique_ptr<Backend> backend;  ///< this rank's, or none
  Ranks* ranks = nullptr;            ///< the others, or none
  Capacity capacity;

  Computing(const RunArguments& arguments, const OpenProblem& open, Ranks* others) : ranks(others) {
    if (ranks) {
      capacity = ranks->capacity(arguments.resources, open);
    } else {
      backend = make_backend(arguments.resources, open.problem);
      capacity = capacity_of(arguments.resources, open.problem, *backend);
    }
  }
};

RunOptions options_of(const RunArguments& arguments, const OpenProblem& open,
                      const Durable& durable, const CheckpointDirectory* directory,
                      std::int64_t workers) {
  const PlanRequest& request = durable.plan.request;
  RunOptions options = run_options(arguments.resources, request.device);
  options.last_words = [directory](const std::exception_ptr& reason) {
    ignore_signals();  // as the launcher ends the ranks
    return last_words(reason, directory);
  };
  options.checkpoint = durable.options;
  options.goes_direct = [&arguments, &request](std::int64_t bytes) {
    return goes_direct(arguments.input, bytes, request.host_budget);
  };
  if (!arguments.resources.plan.empty()) return options;  // a plan that was given is what is wanted
  options.tuning = Tuning{find_costs(request.device), open.inputs};
  options.tuning->has_room = [&arguments, &open, directory, workers](const Plan& plan) {
    try {
      check_room(plan, open, arguments, workers, directory);
      return true;
    } catch (const InputError&) {
      return false;
    } catch (const std::filesystem::filesystem_error&) {
      return false;  // room that cannot be looked up is none
    }
  };
  return options;
}

// The run itself, with its progress.
RanksResult run_audited(const Plan& plan, const RunOptions& options, bool quiet,
                        Computing& computing, const std::vector<RowIndex>& rows, Audit& audit,
                        Telemetry& telemetry) {
  std::unique_ptr<Progress> progress;
  if (!quiet) {
    const auto expected = expected_scores(plan);
    progress = std::make_unique<Progress>(
        telemetry, computing.backend.get(), plan,
        std::accumulate(expected.begin(), expected.end(), std::uint64_t{0}));
  }
  const Outputs outputs{audit.output, audit.lse ? &*audit.lse : nullptr};
  const Inputs inputs = audit.inputs.inputs();
  if (computing.ranks) {
    RanksResult result = computing.ranks->run(plan, inputs, outputs, rows, options, telemetry);
    for (const auto& merger : result.mergers) audit.add(merger);
    return result;
  }
  RanksResult alone;
  alone.master.run = run(plan, inputs, outputs, *computing.backend, options, telemetry);
  return alone;
}

Certificate certify(OpenProblem& open, const Audit& audit, const std::vector<RowIndex>& rows,
                    const RanksResult& result, const Plan& plan, Telemetry& telemetry) {
  Certificate certificate;
  certificate.merged_scores = result.master.run.merged_scores;
  certificate.kept_scores = expected_scores(plan);
  // Either this rank reads or the workers do.
  (certificate.query = audit.inputs.query.fingerprint()) += result.read.query;
  (certificate.key = audit.inputs.key.fingerprint()) += result.read.key;
  (certificate.value = audit.inputs.value.fingerprint()) += result.read.value;
  certificate.differing_inputs = result.read.differing;
  certificate.output = audit.output.fingerprint();
  certificate.output_vectors =
      open.problem.batch * open.problem.query_length * open.problem.query_heads;
  if (rows.empty()) return certificate;
  const StageTimer timer(telemetry, Stage::verify, 0, -1);
  certificate.verification = verify_rows(
      open, rows, [&](const RowIndex& row) { return audit.output.row(row); },
      audit.lse ? [&](const RowIndex& row) { return audit.lse->row(row); } : RowValues());
  return certificate;
}

void publish(Sinks& sinks, Telemetry& telemetry) {
  const StageTimer timer(telemetry, Stage::sync, 0, -1);
  if (sinks.lse) sinks.lse->commit();
  sinks.output->commit();
}

// What a run gives beside its outputs.
struct Computed {
  RanksResult result;  ///< of this rank alone where there are no others
  Certificate certificate;
};

// Computes, certifies and, if the certificate is good, publishes.
Computed compute(OpenProblem& open, Sinks& sinks, const RunArguments& arguments,
                 const Durable& durable, Computing& computing,
                 std::optional<CheckpointDirectory>& directory, Telemetry& telemetry) {
  const auto rows =
      sample_rows(open.problem, arguments.no_verify ? 0 : verified_rows, verified_seed);
  Audit audit(open, sinks, rows, telemetry);
  Computed computed;
  try {
    computed.result =
        run_audited(durable.plan,
                    options_of(arguments, open, durable, directory ? &*directory : nullptr,
                               computing.capacity.workers),
                    arguments.quiet, computing, rows, audit, telemetry);
    if (directory && stop_request().stop) throw Stopped(1.0);
    computed.certificate = certify(open, audit, rows, computed.result, durable.plan, telemetry);
    if (!computed.certificate.ok()) return computed;
    // The result before its description: a report that cannot be written must not cost the output.
    if (directory) directory->begin_publishing();
    publish(sinks, telemetry);
  } catch (const Error&) {
    rethrow(directory ? &*directory : nullptr);
  }
  if (directory) {
    ignore_signals();  // their answer, that the same command continues, is no longer true
    directory->clear();
  }
  return computed;
}

int execute(const RunArguments& arguments, const Arguments& command, Ranks* ranks) {
  auto directory = open_checkpoint(arguments);
  OpenProblem open =
      open_problem(arguments.input, arguments.attention, all_host_budgets(arguments.resources));
  const bool only_names = directory && is_publishing(*directory, arguments.output);
  if (!only_names) {
    check_output_paths(
        arguments.input, arguments.resources,
        {arguments.output.output, arguments.output.lse, arguments.report, arguments.trace},
        arguments.output.overwrite);
  }
  Computing computing(arguments, open, ranks);
  if (only_names) return end_publishing(*directory, open, arguments, computing.capacity);
  const bool lse = !arguments.output.lse.empty();
  Durable durable = directory
                        ? prepare_durable(*directory, open, arguments, computing.capacity)
                        : Durable{plan_for(open, arguments.resources, lse, computing.capacity), {}};
  durable.options.resumed = [&](const Resumed& resumed) {
    tell(resumed, durable.plan, arguments.resources.checkpoint, arguments.quiet);
  };
  if (!directory) check_room(durable.plan, open, arguments, computing.capacity.workers);
  Sinks sinks =
      create_sinks(open, arguments.output, directory.has_value(), arguments.resources.mergers == 0);
  TextFile report(arguments.report), trace(arguments.trace);
  auto telemetry = std::make_unique<Telemetry>(trace.stream());
  const Expected expected = expect(durable.plan, computing.capacity, open.inputs);
  const double begin = now_seconds();
  const auto [result, certificate] =
      compute(open, sinks, arguments, durable, computing, directory, *telemetry);

  const RunRecord record{durable.plan,
                         result.master.run,
                         ranks ? &result : nullptr,
                         computing.capacity.numerics,
                         *telemetry,
                         now_seconds() - begin,
                         certificate,
                         command,
                         arguments.resources.checkpoint,
                         expected,
                         open.inputs};
  if (!arguments.quiet) print_out(describe(record));
  if (report.stream()) *report.stream() << json_text(to_json(record), 1) << "\n";
  report.commit();
  telemetry.reset();  // ends the trace
  trace.commit();
  if (certificate.ok()) return 0;
  if (directory) discard(*directory, arguments.output);
  const std::string& differing = certificate.differing_inputs;
  throw Error(fmt::format("the result failed its certificate ({}); {} was not written",
                          differing.empty() ? describe(certificate.verification) : differing,
                          arguments.output.output));
}

}  // namespace

int run_command(const Arguments& arguments, const MpiEnvironment& mpi) {
  RunArguments run;
  std::string wrong;
  try {
    if (!parse_run(arguments, run)) return 0;
    if (run.output.output.empty()) throw InputError("no output; give --output FILE");
  } catch (const InputError& error) {
    if (mpi.size() == 1) throw;
    wrong = error.what();  // which the others, whose arguments may be good, must be told
  }
  Arguments command = arguments;
  command.insert(command.begin(), "run");
  if (mpi.size() == 1) {
    if (run.resources.mergers == 0) return execute(run, command, nullptr);
    throw InputError("--mergers needs several ranks: mpirun -n R stream-cqsa run ...");
  }
  if (mpi.rank() > 0 && !run.resources.checkpoint.empty()) ignore_signals();
  Communicator communicator;
  Ranks ranks(communicator, run.resources, run.input_through_master, wrong);
  return ranks.is_master() ? execute(run, command, &ranks) : ranks.work(run);
}

}  // namespace stream_cqsa
