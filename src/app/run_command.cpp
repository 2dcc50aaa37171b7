#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <numeric>
#include <optional>

#include "app/audit.hpp"
#include "app/checkpoint_directory.hpp"
#include "app/commands.hpp"
#include "app/outputs.hpp"
#include "app/problem.hpp"
#include "app/progress.hpp"
#include "app/ranks.hpp"
#include "app/report.hpp"
#include "app/signals.hpp"
#include "app/text.hpp"
#include "app/text_file.hpp"
#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

constexpr std::int64_t verified_rows = 8;
constexpr std::uint64_t verified_seed = 1;
constexpr double default_interval = 60;      // seconds
constexpr double share_of_max_hours = 0.99;  // what is left is for the checkpoint

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

// Hours of computing must not end at a disk that was too small from the start.
void require_room(const std::filesystem::path& directory, std::int64_t bytes,
                  const std::string& what) {
  const auto free = static_cast<std::int64_t>(std::filesystem::space(directory).available);
  if (free >= bytes) return;
  throw InputError(fmt::format("{}: needs {} and {} are free there", what, format_bytes(bytes),
                               format_bytes(free)));
}

// Of a file, where it is there already.
std::int64_t allocated_bytes(const std::filesystem::path& path) {
  struct stat status {};
  constexpr std::int64_t block = 512;
  return ::stat(path.c_str(), &status) == 0 ? status.st_blocks * block : 0;
}

std::int64_t unfinished_bytes(const std::string& output) {
  return output.empty() ? 0 : allocated_bytes(output + ".partial");
}

// Every open piece in two versions: the durable one, and the next.
void check_room(const Plan& plan, const CheckpointDirectory& directory) {
  const HostArena& host = plan.host;
  const std::int64_t accumulators =
      (1 + plan.request.mergers) * host.accumulators * host.accumulator_bytes;
  std::int64_t states = 2 * std::max(plan.scratch_bytes, accumulators);
  for (const auto& part : directory.all_parts()) states -= allocated_bytes(part / "states");
  require_room(directory.path(), states, "--checkpoint " + directory.path().string());
}

void check_room(const Plan& plan, const OpenProblem& open, const RunArguments& arguments) {
  namespace fs = std::filesystem;
  const std::string& scratch = arguments.resources.scratch;
  if (!scratch.empty()) {
    const bool used = arguments.resources.checkpoint.empty();  // else the states are there
    require_room(scratch, used ? plan.scratch_bytes : 0, "--scratch " + scratch);
  }
  // O and lse most often lie on one disk: each directory must have room for both.
  const Problem& problem = open.problem;
  const std::int64_t lse_bytes =
      arguments.output.lse.empty()
          ? 0
          : lse_desc(problem.batch, problem.query_heads, problem.query_length).bytes();
  const std::int64_t unfinished =
      unfinished_bytes(arguments.output.output) + unfinished_bytes(arguments.output.lse);
  const fs::path parent = fs::path(arguments.output.output).parent_path();
  require_room(parent.empty() ? fs::path(".") : parent,
               output_desc(open).bytes() + lse_bytes - unfinished, arguments.output.output);
}

std::uint64_t total(const std::vector<std::uint64_t>& values) {
  return std::accumulate(values.begin(), values.end(), std::uint64_t{0});
}

// Inputs and outputs, watched.
struct Audit {
  AuditedSource query, key, value;
  AuditedSink output;
  std::optional<AuditedSink> lse;

  Audit(OpenProblem& open, Sinks& sinks, const std::vector<RowIndex>& rows, Telemetry& telemetry)
      : query(*open.query, telemetry),
        key(*open.key, telemetry),
        value(*open.value, telemetry),
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
      capacity = ranks->capacity(arguments.resources);
    } else {
      backend = make_backend(arguments.resources, open.problem);
      capacity = capacity_of(arguments.resources, open.problem, *backend);
    }
  }
};

// The run itself, with its progress.
RanksResult run_audited(const RunArguments& arguments, const Plan& plan, Computing& computing,
                        const std::vector<RowIndex>& rows, Audit& audit, Telemetry& telemetry,
                        const CheckpointOptions& checkpoint) {
  RunOptions options = run_options(arguments.resources, plan);
  options.checkpoint = checkpoint;
  std::unique_ptr<Progress> progress;
  if (!arguments.quiet) {
    progress = std::make_unique<Progress>(telemetry, computing.backend.get(), plan,
                                          total(expected_scores(plan)));
  }
  const Outputs outputs{audit.output, audit.lse ? &*audit.lse : nullptr};
  if (computing.ranks) {
    RanksResult result = computing.ranks->run(plan, outputs, rows, options, telemetry);
    for (const auto& merger : result.mergers) audit.add(merger);
    return result;
  }
  RanksResult alone;
  alone.master.run = run(plan, {audit.query, audit.key, audit.value}, outputs, *computing.backend,
                         options, telemetry);
  return alone;
}

Certificate certify(OpenProblem& open, const Audit& audit, const std::vector<RowIndex>& rows,
                    const RunResult& result, const Plan& plan, Telemetry& telemetry) {
  Certificate certificate;
  certificate.merged_scores = result.merged_scores;
  certificate.kept_scores = expected_scores(plan);
  certificate.query = audit.query.fingerprint();
  certificate.key = audit.key.fingerprint();
  certificate.value = audit.value.fingerprint();
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

// --- with a checkpoint ---

std::optional<CheckpointDirectory> open_checkpoint(const RunArguments& arguments) {
  const auto& [interval, max_hours] = arguments.checkpoint;
  if (interval && !(*interval > 0)) throw InputError("--checkpoint-interval must be positive");
  if (max_hours && !(*max_hours > 0)) throw InputError("--max-hours must be positive");
  const std::string& path = arguments.resources.checkpoint;
  if (path.empty()) {
    if (!interval && !max_hours) return std::nullopt;
    throw InputError("--checkpoint-interval and --max-hours need --checkpoint DIR");
  }
  if (max_hours) stop_request().deadline = now_seconds() + share_of_max_hours * 3600 * *max_hours;
  std::optional<CheckpointDirectory> directory(path);
  checkpoint_on_signals();
  return directory;
}

// A run was killed when its outputs were certified: they only lack their names.
int end_publishing(CheckpointDirectory& directory, const OutputOptions& options) {
  directory.require_same({{"--output", options.output}, {"--lse", options.lse}});
  for (const std::string& output : {options.lse, options.output}) {
    if (!output.empty()) PartialFile::publish(output);
  }
  directory.clear();
  fmt::print(stderr, "stream-cqsa: the run had ended; {} is complete, and no report was made\n",
             options.output);
  return 0;
}

void tell(const Resumed& resumed, const Plan& plan, const std::string& directory, bool quiet) {
  if (resumed.is_damaged()) {
    fmt::print(stderr,
               "stream-cqsa: the checkpoint in {} is damaged: {} journal records ({} bytes) "
               "dropped, {} pieces computed again from an older version or from nothing\n",
               directory, resumed.dropped_records, resumed.dropped_bytes, resumed.recomputed);
  }
  if (quiet) return;
  const auto all = static_cast<double>(total(expected_scores(plan)));
  fmt::print(stderr, "stream-cqsa: continuing from the checkpoint in {}: {:.1f}% of the scores\n",
             directory, all > 0 ? 100 * static_cast<double>(resumed.scores) / all : 100.0);
}

struct Durable {
  Plan plan;
  CheckpointOptions options;
};

// The plan, and the directory claimed for the run.
Durable prepare_durable(CheckpointDirectory& directory, OpenProblem& open,
                        const RunArguments& arguments, const Capacity& capacity) {
  auto identity = identity_of(open, arguments, capacity.device.kind);
  directory.require_same(identity);
  Durable durable{durable_plan(directory, open, arguments, capacity), {}};
  add_plan(durable.plan, identity);
  durable.options.directory = directory.path();
  durable.options.identity = directory.claim(identity, durable.plan);
  durable.options.interval = arguments.checkpoint.interval.value_or(default_interval);
  durable.options.stop = &stop_request();
  check_room(durable.plan, directory);
  return durable;
}

// What can be continued says so; other failures stay what they are.
[[noreturn]] void rethrow(const std::optional<CheckpointDirectory>& directory) {
  try {
    throw;
  } catch (const InputError&) {
    throw;
  } catch (const Stopped& stopped) {
    throw Resumable(
        fmt::format("stopped after a checkpoint in {}: {:.0f}% of the scores are merged; the same "
                    "command continues",
                    directory->path().string(), std::floor(100 * stopped.merged())));
  } catch (const Error& error) {
    if (!directory || !directory->has_progress()) throw;
    throw Resumable(fmt::format("{}; the same command continues from the checkpoint in {}",
                                error.what(), directory->path().string()));
  }
}

// A result that is wrong must not be continued.
void discard(CheckpointDirectory& directory, const OutputOptions& options) {
  for (const std::string& output : {options.lse, options.output}) {
    if (!output.empty()) std::filesystem::remove(output + ".partial");
  }
  directory.clear();
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
        run_audited(arguments, durable.plan, computing, rows, audit, telemetry, durable.options);
    if (directory && stop_request().stop) throw Stopped(1.0);
    computed.certificate =
        certify(open, audit, rows, computed.result.master.run, durable.plan, telemetry);
    if (!computed.certificate.ok()) return computed;
    // The result before its description: a report that cannot be written must not cost the output.
    if (directory) directory->begin_publishing();
    publish(sinks, telemetry);
  } catch (const Error&) {
    rethrow(directory);
  }
  if (directory) directory->clear();
  return computed;
}

int execute(const RunArguments& arguments, const Arguments& command, Ranks* ranks) {
  auto directory = open_checkpoint(arguments);
  OpenProblem open = open_problem(arguments.input, arguments.attention);
  if (directory && directory->is_publishing()) return end_publishing(*directory, arguments.output);
  check_output_paths(
      arguments.input, arguments.resources,
      {arguments.output.output, arguments.output.lse, arguments.report, arguments.trace},
      arguments.output.overwrite);
  Computing computing(arguments, open, ranks);
  const bool lse = !arguments.output.lse.empty();
  Durable durable = directory
                        ? prepare_durable(*directory, open, arguments, computing.capacity)
                        : Durable{plan_for(open, arguments.resources, lse, computing.capacity), {}};
  durable.options.resumed = [&](const Resumed& resumed) {
    tell(resumed, durable.plan, arguments.resources.checkpoint, arguments.quiet);
  };
  check_room(durable.plan, open, arguments);
  Sinks sinks = create_sinks(open, arguments.output, directory.has_value());
  TextFile report(arguments.report), trace(arguments.trace);
  auto telemetry = std::make_unique<Telemetry>(trace.stream());
  const double begin = now_seconds();
  const auto [result, certificate] =
      compute(open, sinks, arguments, durable, computing, directory, *telemetry);

  const RunRecord record{durable.plan,
                         result.master.run,
                         ranks ? &result : nullptr,
                         *telemetry,
                         now_seconds() - begin,
                         certificate,
                         command,
                         arguments.resources.checkpoint};
  if (!arguments.quiet) print_out(describe(record));
  if (report.stream()) *report.stream() << to_json(record).dump(1) << "\n";
  report.commit();
  telemetry.reset();  // ends the trace
  trace.commit();
  if (certificate.ok()) return 0;
  if (directory) discard(*directory, arguments.output);
  throw Error(fmt::format("the result failed its certificate ({}); {} was not written",
                          describe(certificate.verification), arguments.output.output));
}

}  // namespace

int run_command(const Arguments& arguments, const MpiEnvironment& mpi) {
  RunArguments run;
  if (!parse_run(arguments, run)) return 0;
  if (run.output.output.empty()) throw InputError("no output; give --output FILE");
  Arguments command = arguments;
  command.insert(command.begin(), "run");
  if (mpi.size() == 1) {
    if (run.resources.mergers == 0) return execute(run, command, nullptr);
    throw InputError("--mergers needs several ranks: mpirun -n R stream-cqsa run ...");
  }
  if (mpi.rank() > 0 && !run.resources.checkpoint.empty()) leave_signals_to_the_master();
  Communicator communicator;
  Ranks ranks(communicator, run.resources);
  return ranks.is_master() ? execute(run, command, &ranks) : ranks.work(run);
}

}  // namespace stream_cqsa
