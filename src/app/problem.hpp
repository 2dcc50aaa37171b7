// From options to open tensors, a problem, a plan and a backend.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "app/arguments.hpp"
#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/costs.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/files.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/plan_choice.hpp"
#include "stream_cqsa/tensor.hpp"

namespace stream_cqsa {

/// Q, K and V, open for reading, and what is to be computed of them. Of Q, the rows of --queries.
struct OpenProblem {
  std::unique_ptr<TensorSource> query, key, value;
  Problem problem;
  InputKind inputs = InputKind::synthetic;
};

/// The attention of tensors like these, Q whole whatever --queries says. Throws InputError with one
/// line where they do not agree.
Problem problem_of(const TensorDesc& query, const TensorDesc& key, const TensorDesc& value,
                   const AttentionOptions& attention);

/// Opens the inputs and checks that they agree. `host_budget` is what arenas will take of this
/// host's memory, see open_input_files(). Throws InputError with one line otherwise.
OpenProblem open_problem(const InputOptions& input, const AttentionOptions& attention,
                         std::int64_t host_budget = 0);

/// The synthetic tensors of --shape and its companions, numbered by `seed`.
OpenProblem open_synthetic(const InputOptions& input, std::uint64_t seed);

/// A layout by name. Throws InputError for an unknown one.
Layout layout_option(const std::string& name);

/// A dtype by name. Throws InputError that names `option`.
DType dtype_option(const std::string& option, const std::string& name);

/// Throws InputError where --threads is none that can be started.
void check_threads(const ResourceOptions& resources);

/// The backend of --backend and --threads. `auto` is CUDA where that can compute `problem`, else
/// the CPU; it says so on standard error where there is a CUDA driver. Throws InputError where the
/// backend that is named cannot.
std::unique_ptr<Backend> make_backend(const ResourceOptions& resources, const Problem& problem);

/// What a plan may use. With workers, inputs are read by them or for them: none is resident.
struct Capacity {
  DeviceTraits device;
  std::string numerics;               ///< of all that compute, see Backend::numerics()
  std::int64_t device_budget = 0;     ///< bytes
  std::int64_t host_budget = 0;       ///< bytes
  std::int64_t workers = 0;           ///< ranks that compute while this one merges; 0: it does both
  std::optional<PlannedRanks> ranks;  ///< where they have said what each of them has
};

/// The host budget of --host-memory, or this rank's share of half of the available memory.
std::int64_t host_budget_of(const ResourceOptions& resources);

/// The same of all of this run's ranks on this host, each of them no more than its memory.
std::int64_t all_host_budgets(const ResourceOptions& resources);

/// What this rank may use by itself.
Capacity capacity_of(const ResourceOptions& resources, const Problem& problem,
                     const Backend& backend);

/// What the options leave open of a plan within the given capacity, and what they do not, but for
/// --plan. Throws InputError where a resource cannot be used (--scratch is no directory).
PlanRequest request_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
                        const Capacity& capacity);

/// The plan that is predicted to be the fastest of those, see choose_plan(), or the one of --plan.
/// For several ranks a plan of --plan with accumulators on the device has them on the host instead
/// where these ranks have no room for them. Throws InputError as request_for(), and where nothing
/// fits, or the plan of --plan is of something else.
Plan plan_for(const OpenProblem& open, const ResourceOptions& resources, bool lse,
              const Capacity& capacity);

/// How plans are run on this machine with such a device: beside a GPU all cores read and merge.
RunOptions run_options(const ResourceOptions& resources, const DeviceTraits& device);

/// What Q looks like with O's dtype: the description of O.
TensorDesc output_desc(const OpenProblem& open);

/// Throws InputError when two of the outputs are one file, an output is an input or the plan,
/// exists and not `overwrite`, or has no directory to be in. Empty names are no outputs.
void check_output_paths(const InputOptions& input, const ResourceOptions& resources,
                        const std::vector<std::string>& outputs, bool overwrite);

}  // namespace stream_cqsa
