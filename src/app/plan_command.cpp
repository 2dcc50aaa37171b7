#include <fmt/format.h>

#include <iostream>

#include "app/calibration.hpp"
#include "app/commands.hpp"
#include "app/planning.hpp"
#include "app/problem.hpp"
#include "app/text.hpp"
#include "app/text_file.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// With a run's outputs, so that its command line plans as it is.
struct PlanArguments : JobOptions {
  bool json = false;
  bool subproblems = false;
  std::string svg;
  std::int64_t workers = 0;
};

bool parse_plan(const Arguments& arguments, PlanArguments& plan) {
  namespace po = boost::program_options;
  OptionGroup printing("Printing");
  printing.add_options()("json", po::bool_switch(&plan.json), "print the plan as JSON, for --plan")(
      "subproblems", po::bool_switch(&plan.subproblems),
      "with --json: every subproblem with its chunk pairs")(
      "svg", po::value(&plan.svg)->value_name("FILE"),
      "draw the chunk-pair matrix and the planned memory")(
      "workers", po::value(&plan.workers)->default_value(0)->value_name("W"),
      "plan for W ranks like this one that compute, beside those that merge (with the --threads "
      "that each will have), and predict the time of 1, 2, 4, ... and W of them; 0: one rank "
      "alone");
  OptionGroup all = job_group(plan);
  all.add(printing);
  return parse(arguments,
               "usage: stream-cqsa plan --input FILE [OPTION...]\n"
               "Prints how a run with the same options would be divided. Computes nothing.\n",
               all);
}

constexpr std::int64_t most_ranks = 100'000;

void check_arguments(const PlanArguments& options, const MpiEnvironment& mpi) {
  if (mpi.size() > 1) {
    throw InputError(fmt::format(
        "plan runs on one rank and was started on {}: leave out mpirun -n {}, and plan for several "
        "ranks by --workers W, those that compute",
        mpi.size(), mpi.size()));
  }
  if (options.subproblems && !options.json) throw InputError("--subproblems needs --json");
  for (const auto& [option, count] :
       {std::pair("--workers", std::int64_t{options.workers}),
        std::pair("--mergers", std::int64_t{options.resources.mergers})}) {
    if (count < 0 || count > most_ranks)
      throw InputError(fmt::format("{} {}: use 0 to {}", option, count, most_ranks));
  }
  if (options.resources.mergers > 0 && options.workers == 0)
    throw InputError("--mergers needs ranks that compute beside those that merge: --workers W");
}

}  // namespace

int plan_command(const Arguments& arguments, const MpiEnvironment& mpi) {
  PlanArguments options;
  if (!parse_plan(arguments, options)) return 0;
  check_arguments(options, mpi);
  const OpenProblem open =
      open_problem(options.input, options.attention, all_host_budgets(options.resources));
  check_output_paths(options.input, options.resources, {options.svg}, options.output.overwrite);
  const auto backend = make_backend(options.resources, open.problem);
  Capacity capacity = capacity_of(options.resources, open.problem, *backend);
  capacity.workers = options.workers;
  const bool lse = !options.output.lse.empty();
  PlanChoice choice = choose_for(open, options.resources, lse, capacity);
  if (options.workers > 0)
    choice.for_workers =
        choose_for_workers(open, options.resources, lse, capacity, choice.prediction);
  const Plan& plan = choice.plan;
  TextFile drawing(options.svg);
  if (drawing.stream()) write_svg(plan, *drawing.stream());
  drawing.commit();
  const SmallestBudgets smallest = smallest_for(open, options.resources, lse, capacity, plan);
  if (options.json) {
    write_json(choice, smallest, options.subproblems, std::cout);
    if (!std::cout.flush()) throw Error("standard output cannot be written");
  } else {
    const bool direct = open.inputs == InputKind::direct_files;
    print_out(
        describe(plan) + (direct ? fmt::format("{:<18}read past the page cache\n", "inputs") : "") +
        fmt::format("{:<18}{}\n", "predicted", describe(expect(plan, capacity, open.inputs))) +
        describe(choice, smallest));
  }
  return 0;
}

}  // namespace stream_cqsa
