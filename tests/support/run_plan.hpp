// Runs of a plan from and to memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <vector>

#include "stream_cqsa/engine.hpp"
#include "support/attention.hpp"

namespace stream_cqsa::testing {

/// A request with room for everything, lse and a scratch directory; tensors in one layout.
PlanRequest roomy_request(const Problem& problem, Layout layout, const Backend& backend);

struct Outcome {
  std::vector<std::byte> output, lse;
  RunResult result;
};

/// Runs the plan on the input, whose tensors lie in memory (`resident`) or are read in blocks.
Outcome run_plan(const Plan& plan, const TestInput& input, Backend& backend, bool resident,
                 const std::filesystem::path& scratch = std::filesystem::temp_directory_path());

/// The same plan with as few state buffers as there may be and accumulators in a file.
Plan with_accumulators_in_a_file(Plan plan);

}  // namespace stream_cqsa::testing
