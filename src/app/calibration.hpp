// The costs of this machine: measured, kept, and found again.
#pragma once

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "app/arguments.hpp"
#include "app/problem.hpp"
#include "stream_cqsa/costs.hpp"

namespace stream_cqsa {

/// Measures the device of `resources`, each of its kernels for `seconds`, this host, and files in
/// its scratch directory (else the working directory). A line each to `out`.
Costs measure_costs(const ResourceOptions& resources, double seconds, std::FILE* out);

/// Where the costs of a device are kept: in stream-cqsa/ of XDG_CACHE_HOME, else of ~/.cache, a
/// file for each model. Empty where neither is known.
std::filesystem::path costs_path(const std::string& device);

/// Keeps them there; the path. Throws Error when that cannot be written.
std::filesystem::path save_costs(const Costs& costs);

/// Those kept for this device; built-in values where there are none, or what is kept cannot be
/// read, which is said once on standard error.
Costs find_costs(const DeviceTraits& device);

/// What is known of the ranks that a plan for this device would run on: of others what they have
/// said, else that all are like this one.
PlannedRanks ranks_of(const DeviceTraits& device, const Capacity& capacity);

/// Its costs on those of them that have room for their parts, see costs_of().
SharedCosts costs_here(const Plan& plan, const Capacity& capacity);

/// What a plan is expected to take on the ranks of `capacity`, and by whose rates; with
/// `flop_per_second`, where the kernels of one alone run at that rate.
struct Expected {
  Prediction prediction;
  std::optional<DiskBound> disk;  ///< where files hold the run up
  bool measured = false;          ///< by rates of this machine; else built-in ones
};
Expected expect(Plan plan, const Capacity& capacity, InputKind inputs,
                std::optional<double> flop_per_second = std::nullopt);

/// "2.05 s, bound by compute (...)", and how fast a disk that binds would have to be, for people.
std::string describe(const Expected& expected);
nlohmann::json to_json(const Expected& expected);

}  // namespace stream_cqsa
