// Rates of one device, for the command `bench`: its kernel, its copies, its merges.
#pragma once

#include <functional>
#include <memory>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/costs.hpp"

namespace stream_cqsa {

struct KernelRate {
  double flops = 0;    ///< per second; 4 * head_dim for every score that the mask keeps
  double seconds = 0;  ///< of the fastest launch
};

/// Launches of one problem as a single subproblem, inputs resident.
class KernelBench {
 public:
  /// Prepares `backend`, which must outlive this, for the whole problem and loads random inputs.
  /// The batch must be 1.
  KernelBench(Backend& backend, const Problem& problem);

  /// The fastest of at least two launches, one after another, and more until `seconds` have passed.
  KernelRate fastest(double seconds);

  /// Seconds of a launch among many in a row: the mean over the second half of `seconds`.
  double steady(double seconds);

  double flop() const { return flop_; }

 private:
  Backend& backend_;
  Telemetry telemetry_;
  WorkList work_;
  double flop_ = 0;
};

/// What the kernel for this dimension, type and mask costs, in about `seconds`. `backend` is a new
/// one for each call.
KernelCost measure_kernel(const std::function<std::unique_ptr<Backend>(const Problem&)>& backend,
                          const Problem& shape, double seconds);

struct DeviceCopies {
  double in = 0;     ///< bytes a second
  double out = 0;    ///< of softmax states
  double merge = 0;  ///< of partials, on the device; 0 where it does not merge
};

/// Copies between memory that the backend has pinned and slots of a device that is prepared here.
DeviceCopies measure_copies(Backend& backend);

}  // namespace stream_cqsa
