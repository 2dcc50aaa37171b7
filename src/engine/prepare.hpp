// A device that has less memory than a plan was made for.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// The plan for less device memory, in bytes. Throws InputError where that is too little.
using PlanWithin = std::function<Plan(std::int64_t device_budget)>;

/// Readies the backend for the plan. Where others have taken memory of the device since the plan
/// was made, `plan` becomes one for what is left, and `warn`, if there is one, is told so. Throws
/// OutOfDeviceMemory, naming the smallest budget, when that is too little.
void prepare(Backend& backend, Plan& plan, const PlanWithin& within,
             const std::function<void(const std::string&)>& warn, Telemetry& telemetry);

}  // namespace stream_cqsa
