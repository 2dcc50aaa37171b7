// Runs of a plan from and to memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <initializer_list>
#include <random>
#include <vector>

#include "stream_cqsa/engine.hpp"
#include "support/attention.hpp"

namespace stream_cqsa::testing {

/// A request with room for everything, lse and a scratch directory; tensors in one layout. Its
/// accumulators are in memory, or on the device.
PlanRequest roomy_request(const Problem& problem, Layout layout, const Backend& backend,
                          AccumulatorPlacement placement = AccumulatorPlacement::memory);

/// Divides into one of these numbers of chunks or, one time in three, into tiles.
void random_division(PlanRequest& request, std::initializer_list<std::int64_t> chunks,
                     std::mt19937_64& random);

/// Of one row, of one column, or of any grid.
Grid random_grid(std::mt19937_64& random);

struct Outcome {
  std::vector<std::byte> output, lse;
  RunResult result;
};

/// Runs the plan on the inputs, into memory. The lse is empty where the plan has none.
Outcome run_with(const Plan& plan, const Inputs& inputs, Backend& backend,
                 const RunOptions& options, Telemetry& telemetry);

/// The same on the input, whose tensors lie in memory (`resident`) or are read in blocks.
Outcome run_plan(const Plan& plan, const TestInput& input, Backend& backend, bool resident,
                 const std::filesystem::path& scratch = std::filesystem::temp_directory_path());

/// The same plan, whose accumulators are in memory, with as few state buffers as there may be and
/// accumulators in a file.
Plan with_accumulators_in_a_file(Plan plan);

}  // namespace stream_cqsa::testing
