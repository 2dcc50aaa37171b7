// What was found of a plan's subproblems, and what that says of the whole run.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/calibration.hpp"
#include "app/problem.hpp"
#include "app/verification.hpp"
#include "core/plan_sizes.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// A subproblem that was computed and checked.
struct TriedSubproblem {
  std::int64_t id = 0;
  std::int64_t chunks = 0, pairs = 0;
  std::uint64_t scores = 0;  ///< as of a RehearsedSubproblem, see engine/rehearsal.hpp
  double kernel_seconds = 0, seconds = 0;
  Verification verification;
};

/// One line for people.
std::string describe(const Plan& plan, const TriedSubproblem& tried);

nlohmann::json to_json(const Plan& plan, const TriedSubproblem& tried);

/// What to_json() was given. Throws nlohmann::json::exception where it is something else.
TriedSubproblem read_tried(const nlohmann::json& json);

/// The run's plan, and whether it takes a scratch directory that was not given.
struct RehearsedPlan {
  Plan plan;
  bool lacks_scratch = false;
};

/// What a whole run would take beside the arenas.
struct Needs {
  Traffic traffic;
  std::int64_t accumulators_on_device = 0, accumulators_in_memory = 0, accumulators_in_file = 0;
  std::int64_t output = 0, lse = 0;
};

/// What a rehearsal found.
struct Findings {
  RehearsedPlan planned;
  std::vector<TriedSubproblem> tried;
  double rate = 0;                  ///< flop per second of all that was tried; 0: not measured
  Expected by_costs;                ///< the whole run
  std::optional<Expected> at_rate;  ///< the same with kernels at that rate
  Needs needs;
  Verification rows;  ///< of all that was tried

  bool good() const { return rows.ok() && rows.compared() > 0; }
};

Findings findings_of(const RehearsedPlan& planned, std::vector<TriedSubproblem> tried,
                     const OpenProblem& open);

/// Lines for people: rate, predictions, needs and verdict.
std::string describe(const Findings& found, bool synthetic);

nlohmann::json to_json(const Findings& found);

}  // namespace stream_cqsa
