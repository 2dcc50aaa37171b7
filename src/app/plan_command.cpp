#include <fmt/format.h>

#include <iostream>

#include "app/calibration.hpp"
#include "app/commands.hpp"
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
};

bool parse_plan(const Arguments& arguments, PlanArguments& plan) {
  namespace po = boost::program_options;
  OptionGroup printing("Printing");
  printing.add_options()("json", po::bool_switch(&plan.json), "print the plan as JSON, for --plan")(
      "subproblems", po::bool_switch(&plan.subproblems),
      "with --json: every subproblem with its chunk pairs")(
      "svg", po::value(&plan.svg)->value_name("FILE"),
      "draw the chunk-pair matrix and the planned memory");
  OptionGroup all = job_group(plan);
  all.add(printing);
  return parse(arguments,
               "usage: stream-cqsa plan --input FILE [OPTION...]\n"
               "Prints how a run with the same options would be divided. Computes nothing.\n",
               all);
}

}  // namespace

int plan_command(const Arguments& arguments, const MpiEnvironment&) {
  PlanArguments options;
  if (!parse_plan(arguments, options)) return 0;
  if (options.subproblems && !options.json) throw InputError("--subproblems needs --json");
  const OpenProblem open =
      open_problem(options.input, options.attention, all_host_budgets(options.resources));
  check_output_paths(options.input, options.resources, {options.svg}, options.output.overwrite);
  const auto backend = make_backend(options.resources, open.problem);
  const Plan plan = plan_for(open, options.resources, !options.output.lse.empty(),
                             capacity_of(options.resources, open.problem, *backend));
  TextFile drawing(options.svg);
  if (drawing.stream()) write_svg(plan, *drawing.stream());
  drawing.commit();
  if (options.json) {
    write_json(plan, options.subproblems, std::cout);
    if (!std::cout.flush()) throw Error("standard output cannot be written");
  } else {
    const bool direct = open.inputs == InputKind::direct_files;
    print_out(describe(plan) +
              (direct ? fmt::format("{:<18}read past the page cache\n", "inputs") : "") +
              fmt::format("{:<18}{}\n", "predicted",
                          describe(expect(plan, plan.request.workers, open.inputs))));
  }
  return 0;
}

}  // namespace stream_cqsa
