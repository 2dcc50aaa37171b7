#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "app/calibration.hpp"
#include "app/commands.hpp"
#include "app/problem.hpp"
#include "app/progress.hpp"
#include "app/rehearsal.hpp"
#include "app/report.hpp"
#include "app/text.hpp"
#include "app/text_file.hpp"
#include "core/counted.hpp"
#include "core/plan_sizes.hpp"
#include "engine/rehearsal.hpp"
#include "stream_cqsa/bytes.hpp"
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
      "no outputs, no accumulators and no checkpoint: options that name these only shape the "
      "plan.\n",
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

// The run's plan, and whether it takes a scratch directory that was not given.
struct RehearsedPlan {
  Plan plan;
  bool lacks_scratch = false;
};

RehearsedPlan plan_of(const OpenProblem& open, const RehearseArguments& options,
                      const Capacity& capacity) {
  const bool lse = !options.output.lse.empty();
  ResourceOptions resources = options.resources;
  try {
    return {plan_for(open, resources, lse, capacity), false};
  } catch (const InputError& error) {
    resources.assume_scratch = true;
    try {
      return {plan_for(open, resources, lse, capacity), true};
    } catch (const InputError&) {
      throw error;  // which names what the run would take without a scratch directory, too
    }
  }
}

struct Tried {
  RehearsedSubproblem computed;
  std::int64_t chunks = 0, pairs = 0;
  Verification verification;
};

double flop_of(const Plan& plan, std::uint64_t scores) {
  return 4.0 * static_cast<double>(plan.problem().head_dim) * static_cast<double>(scores);
}

// Floating-point operations per second of all that was tried; 0 where no time was measured.
double rate_of(const Plan& plan, const std::vector<Tried>& tried) {
  double flop = 0, seconds = 0;
  for (const Tried& each : tried) {
    flop += flop_of(plan, each.computed.scores);
    seconds += each.computed.kernel_seconds;
  }
  return seconds > 0 ? flop / seconds : 0;
}

std::string line_of(const Plan& plan, const Tried& tried) {
  const double flop = flop_of(plan, tried.computed.scores);
  return fmt::format("{:<18}{}, {}, {:.4g} TFLOP in {}: {}; {}\n",
                     fmt::format("subproblem {}", tried.computed.id),
                     counted(tried.chunks, "chunk"), counted(tried.pairs, "pair"), flop * 1e-12,
                     format_duration(tried.computed.kernel_seconds),
                     format_flops(flop / std::max(tried.computed.kernel_seconds, 1e-9)),
                     describe(tried.verification));
}

// Computes and checks one after the other; a line for each as soon as it is known.
std::vector<Tried> try_subproblems(const RehearseArguments& options, OpenProblem& open,
                                   Rehearsal& rehearsal, Backend& backend,
                                   const std::vector<std::int64_t>& ids) {
  const Plan& plan = rehearsal.plan();
  std::uint64_t total = 0;
  for (const std::int64_t id : ids) total += scores_of(plan, id);
  std::atomic<std::int64_t> ended = 0;
  std::optional<Progress> progress;
  if (!options.quiet) {
    progress.emplace([&](double) -> Progressed {
      const auto done = static_cast<double>(backend.scores_computed());
      return {std::min(1.0, done / static_cast<double>(total)), 0,
              fmt::format("{} of {}", ended.load(),
                          counted(static_cast<std::int64_t>(ids.size()), "subproblem"))};
    });
  }
  std::vector<Tried> tried;
  for (const std::int64_t id : ids) {
    const QuorumWork work = plan.work(id);
    const auto tokens =
        sample_tokens(work, options.rows, options.seed + static_cast<std::uint64_t>(id));
    Tried each{rehearsal.compute(id, tokens), std::ssize(work.chunks), std::ssize(work.pairs), {}};
    each.verification = verify_subproblem(open, plan, id, each.computed.tokens);
    print_out(line_of(plan, each));
    tried.push_back(std::move(each));
    ++ended;
  }
  return tried;
}

// What a whole run would take beside the arenas.
struct Needs {
  Traffic traffic;
  std::int64_t accumulators_on_device = 0, accumulators_in_memory = 0, accumulators_in_file = 0;
  std::int64_t output = 0, lse = 0;
};

Needs needs_of(const Plan& plan, const OpenProblem& open) {
  Needs needs;
  needs.traffic = estimate_traffic(plan);
  if (plan.placement == AccumulatorPlacement::device)
    needs.accumulators_on_device = plan.device.state_slots * plan.device.state_slot_bytes;
  needs.accumulators_in_memory = plan.host.accumulators * plan.host.accumulator_bytes;
  needs.accumulators_in_file = plan.scratch_bytes;
  needs.output = output_desc(open).bytes();
  const Problem& p = plan.problem();
  if (plan.request.lse) needs.lse = lse_desc(p.batch, p.query_heads, p.query_length).bytes();
  return needs;
}

std::string accumulators_text(const Needs& needs, bool lacks_scratch) {
  if (needs.accumulators_on_device > 0)
    return fmt::format("{} on the device", format_bytes(needs.accumulators_on_device));
  std::string text = fmt::format("{} in memory", format_bytes(needs.accumulators_in_memory));
  if (needs.accumulators_in_file == 0) return text;
  text += fmt::format(", and a file of up to {}", format_bytes(needs.accumulators_in_file));
  return text + (lacks_scratch ? ": the run needs --scratch DIR, or more --host-memory" : "");
}

std::string needs_text(const Needs& needs, bool synthetic, bool lacks_scratch) {
  const auto bytes = [](double count) {
    return format_bytes(static_cast<std::int64_t>(std::min(count, 0x1p62)));
  };
  return fmt::format("{:<18}{} {}, accumulators: {}\n{:<18}{} of output{}\n", "the whole run",
                     bytes(needs.traffic.read), synthetic ? "generated" : "read",
                     accumulators_text(needs, lacks_scratch), "", format_bytes(needs.output),
                     needs.lse > 0 ? ", " + format_bytes(needs.lse) + " of lse" : "");
}

json needs_json(const Needs& needs, bool lacks_scratch) {
  return {{"read_bytes", needs.traffic.read},
          {"accumulator_bytes",
           {{"device", needs.accumulators_on_device},
            {"memory", needs.accumulators_in_memory},
            {"file", needs.accumulators_in_file}}},
          {"lacks_scratch", lacks_scratch},
          {"output_bytes", needs.output},
          {"lse_bytes", needs.lse}};
}

json to_json(const Plan& plan, const Tried& tried) {
  const SubproblemKey key = plan.key(tried.computed.id);
  const double flop = flop_of(plan, tried.computed.scores);
  const double seconds = tried.computed.kernel_seconds;
  return {{"id", tried.computed.id},
          {"batch", key.batch},
          {"group", key.group},
          {"quorum", key.quorum},
          {"chunks", tried.chunks},
          {"pairs", tried.pairs},
          {"scores", tried.computed.scores},
          {"flop", flop},
          {"kernel_seconds", seconds},
          {"seconds", tried.computed.seconds},
          {"flop_per_second", seconds > 0 ? json(flop / seconds) : json()},
          {"rows", to_json(tried.verification)}};
}

Verification all_rows(const std::vector<Tried>& tried) {
  Verification all;
  for (const Tried& each : tried) {
    all.rows.insert(all.rows.end(), each.verification.rows.begin(), each.verification.rows.end());
  }
  return all;
}

// What a rehearsal found.
struct Findings {
  RehearsedPlan planned;
  std::vector<Tried> tried;
  double rate = 0;                  // flop per second, see rate_of()
  Expected by_costs;                // the whole run
  std::optional<Expected> at_rate;  // the same with kernels at that rate
  Needs needs;
  Verification rows;

  bool good() const { return rows.ok() && rows.compared() > 0; }
};

Findings findings_of(const RehearsedPlan& planned, std::vector<Tried> tried,
                     const OpenProblem& open) {
  const double rate = rate_of(planned.plan, tried);
  Findings found{planned, std::move(tried),
                 rate,    expect(planned.plan, {}, open.inputs),
                 {},      needs_of(planned.plan, open),
                 {}};
  if (rate > 0) found.at_rate = expect(planned.plan, {}, open.inputs, rate);
  found.rows = all_rows(found.tried);
  return found;
}

std::string verdict(const Findings& found) {
  if (!found.good()) return describe(found.rows) + "\n";
  return fmt::format("verified: {} of {}\n", counted(found.rows.compared(), "row"),
                     counted(std::ssize(found.tried), "subproblem"));
}

std::string describe(const Findings& found, bool synthetic) {
  std::string text =
      fmt::format("{:<18}{} over {} of {}\n", "rate", format_flops(found.rate), found.tried.size(),
                  counted(found.planned.plan.subproblem_count(), "subproblem"));
  text += fmt::format("{:<18}{}\n", "predicted", describe(found.by_costs));
  if (found.at_rate) text += fmt::format("{:<18}{}\n", "at that rate", describe(*found.at_rate));
  return text + needs_text(found.needs, synthetic, found.planned.lacks_scratch) + verdict(found);
}

json to_json(const Findings& found) {
  const Plan& plan = found.planned.plan;
  json subproblems = json::array();
  for (const Tried& each : found.tried) subproblems.push_back(to_json(plan, each));
  std::ostringstream plan_text;
  write_json(plan, false, plan_text);
  return {{"ok", found.good()},
          {"subproblems", subproblems},
          {"flop_per_second", found.rate > 0 ? json(found.rate) : json()},
          {"predicted", to_json(found.by_costs)},
          {"predicted_at_that_rate", found.at_rate ? to_json(*found.at_rate) : json()},
          {"whole_run", needs_json(found.needs, found.planned.lacks_scratch)},
          {"plan", json::parse(plan_text.str())}};
}

int execute(const RehearseArguments& options, const Arguments& command) {
  OpenProblem open =
      open_problem(options.input, options.attention, all_host_budgets(options.resources));
  check_output_paths(options.input, options.resources, {options.report}, options.output.overwrite);
  const auto backend = make_backend(options.resources, open.problem);
  const Capacity capacity = capacity_of(options.resources, open.problem, *backend);
  const RehearsedPlan planned = plan_of(open, options, capacity);
  const Plan& plan = planned.plan;
  const auto ids = options.only ? subproblems_option(plan, *options.only)
                                : spread_subproblems(plan, options.subproblems);
  if (ids.empty()) throw InputError("the mask leaves nothing to compute, and so to rehearse");
  TextFile report(options.report);
  print_out(describe(plan));

  Telemetry telemetry;
  Rehearsal rehearsal(plan, {*open.query, *open.key, *open.value}, *backend,
                      run_options(options.resources, plan.request.device), telemetry);
  const Findings found =
      findings_of(planned, try_subproblems(options, open, rehearsal, *backend, ids), open);
  print_out(describe(found, !options.input.shape.empty()));
  if (report.stream()) {
    json all = to_json(found);
    all["versions"] = versions_json();
    all["command"] = command;
    all["arithmetic"] = capacity.numerics;
    all["memory"] = {{"device", backend->allocated_bytes()},
                     {"device_in_use", backend->memory_in_use()},
                     {"host", rehearsal.host_bytes()}};
    all["stages"] = stages_json(telemetry.totals());
    *report.stream() << all.dump(1) << "\n";
  }
  report.commit();
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
