// A backend whose device others use too.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "stream_cqsa/error.hpp"
#include "support/delayed_backend.hpp"

namespace stream_cqsa::testing {

/// Has only so many bytes left on its device when it is prepared. Slots are large: beside them a
/// small problem's workspace would leave little to spare.
class CrowdedBackend : public DelayedBackend {
 public:
  CrowdedBackend(std::unique_ptr<Backend> inner, std::int64_t free_bytes)
      : DelayedBackend(std::move(inner), 1), free_bytes_(free_bytes) {}

  DeviceTraits traits(const Problem& problem) const override {
    DeviceTraits traits = DelayedBackend::traits(problem);
    traits.slot_alignment = std::int64_t{1} << 20;
    return traits;
  }
  void prepare(const Plan& plan, Telemetry& telemetry) override {
    if (plan.device.bytes() > free_bytes_) throw OutOfDeviceMemory("crowded", free_bytes_);
    DelayedBackend::prepare(plan, telemetry);
  }

 private:
  std::int64_t free_bytes_;
};

}  // namespace stream_cqsa::testing
