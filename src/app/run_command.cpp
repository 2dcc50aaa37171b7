#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <numeric>
#include <optional>

#include "app/audit.hpp"
#include "app/commands.hpp"
#include "app/problem.hpp"
#include "app/progress.hpp"
#include "app/report.hpp"
#include "app/text.hpp"
#include "app/text_file.hpp"
#include "mpi/file.hpp"
#include "stream_cqsa/bytes.hpp"
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
  return parse(arguments,
               "usage: stream-cqsa run --input FILE --output FILE [OPTION...]\n"
               "Computes O = softmax(scale Q K^T) V exactly, within the given memory.\n",
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

void check_room(const Plan& plan, const OpenProblem& open, const RunArguments& arguments) {
  namespace fs = std::filesystem;
  const std::string& scratch = arguments.resources.scratch;
  if (!scratch.empty()) require_room(scratch, plan.scratch_bytes, "--scratch " + scratch);
  // O and lse most often lie on one disk: each directory must have room for both.
  const Problem& problem = open.problem;
  const std::int64_t lse_bytes =
      arguments.output.lse.empty()
          ? 0
          : lse_desc(problem.batch, problem.query_heads, problem.query_length).bytes();
  const fs::path parent = fs::path(arguments.output.output).parent_path();
  require_room(parent.empty() ? fs::path(".") : parent, output_desc(open).bytes() + lse_bytes,
               arguments.output.output);
}

struct Sinks {
  std::unique_ptr<TensorSink> output, lse;
};

Sinks create_sinks(const OpenProblem& open, const OutputOptions& options) {
  const Problem& problem = open.problem;
  Sinks sinks;
  sinks.output =
      create_tensor(options.output, "o", output_desc(open), options.overwrite, open_mpi_file);
  if (!options.lse.empty()) {
    sinks.lse = create_tensor(options.lse, "lse",
                              lse_desc(problem.batch, problem.query_heads, problem.query_length),
                              options.overwrite, open_mpi_file);
  }
  return sinks;
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
};

// The run itself, with its progress.
RunResult run_audited(const RunArguments& arguments, const Plan& plan, Backend& backend,
                      Audit& audit, Telemetry& telemetry, std::uint64_t kept_scores) {
  std::unique_ptr<Progress> progress;
  if (!arguments.quiet)
    progress = std::make_unique<Progress>(telemetry, backend, plan, kept_scores);
  return run(plan, {audit.query, audit.key, audit.value},
             {audit.output, audit.lse ? &*audit.lse : nullptr}, backend,
             run_options(arguments.resources, plan), telemetry);
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

int execute(const RunArguments& arguments, const Arguments& command) {
  OpenProblem open = open_problem(arguments.input, arguments.attention);
  check_output_paths(
      arguments.input, arguments.resources,
      {arguments.output.output, arguments.output.lse, arguments.report, arguments.trace},
      arguments.output.overwrite);
  const auto backend = make_backend(arguments.resources, open.problem);
  const Plan plan = plan_for(open, arguments.resources, !arguments.output.lse.empty(), *backend);
  check_room(plan, open, arguments);
  Sinks sinks = create_sinks(open, arguments.output);
  TextFile report(arguments.report), trace(arguments.trace);

  const auto rows =
      sample_rows(open.problem, arguments.no_verify ? 0 : verified_rows, verified_seed);
  auto telemetry = std::make_unique<Telemetry>(trace.stream());
  Audit audit(open, sinks, rows, *telemetry);
  const double begin = now_seconds();
  const RunResult result =
      run_audited(arguments, plan, *backend, audit, *telemetry, total(expected_scores(plan)));
  const Certificate certificate = certify(open, audit, rows, result, plan, *telemetry);
  // The result before its description: a report that cannot be written must not cost the output.
  if (certificate.ok()) publish(sinks, *telemetry);

  const RunRecord record{plan, result, *telemetry, now_seconds() - begin, certificate, command};
  if (!arguments.quiet) print_out(describe(record));
  if (report.stream()) *report.stream() << to_json(record).dump(1) << "\n";
  report.commit();
  telemetry.reset();  // ends the trace
  trace.commit();
  if (certificate.ok()) return 0;
  throw Error(fmt::format("the result failed its certificate ({}); {} was not written",
                          describe(certificate.verification), arguments.output.output));
}

}  // namespace

int run_command(const Arguments& arguments, const MpiEnvironment&) {
  RunArguments run;
  if (!parse_run(arguments, run)) return 0;
  if (run.output.output.empty()) throw InputError("no output; give --output FILE");
  Arguments command = arguments;
  command.insert(command.begin(), "run");
  return execute(run, command);
}

}  // namespace stream_cqsa
