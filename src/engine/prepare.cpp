#include "engine/prepare.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "stream_cqsa/bytes.hpp"
#include "stream_cqsa/error.hpp"

namespace stream_cqsa {
namespace {

// Of what is free: others may take more, and an allocation is rounded up. Less each time.
std::int64_t usable(const OutOfDeviceMemory& error, const Plan& plan) {
  return std::min(error.free_bytes(), plan.device.bytes()) / 10 * 9;
}

std::optional<Plan> if_possible(const PlanWithin& within, std::int64_t budget) {
  try {
    return within(budget);
  } catch (const InputError&) {
    return std::nullopt;
  }
}

// None where a rank has less host memory than a run alone would need.
std::string smallest_text(const PlanRequest& request) {
  try {
    const std::int64_t bytes = smallest_device_budget(request);
    return fmt::format("; the smallest budget that works for this problem is {} ({} bytes)",
                       format_bytes(bytes), bytes);
  } catch (const InputError&) {
    return "";
  }
}

}  // namespace

void prepare(Backend& backend, Plan& plan, const PlanWithin& within,
             const std::function<void(const std::string&)>& warn, Telemetry& telemetry) {
  const PlanRequest request = plan.request;
  const std::int64_t planned = plan.device.bytes();
  const AccumulatorPlacement placement = plan.placement;
  for (bool prepared = false; !prepared;) {
    try {
      backend.prepare(plan, telemetry);
      prepared = true;
    } catch (const OutOfDeviceMemory& error) {
      std::optional<Plan> smaller = if_possible(within, usable(error, plan));
      if (!smaller)
        throw OutOfDeviceMemory(error.what() + smallest_text(request), error.free_bytes());
      plan = std::move(*smaller);
    }
  }
  if (!warn || plan.device.bytes() == planned) return;
  warn(fmt::format("the plan's {} of device memory are no longer free: computing within {}{}",
                   format_bytes(planned), format_bytes(plan.device.bytes()),
                   plan.placement == placement ? "" : ", with accumulators on the host"));
}

}  // namespace stream_cqsa
