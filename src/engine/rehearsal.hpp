// Some subproblems of a plan, computed as a run would, of which nothing but samples is kept.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/buffer.hpp"
#include "engine/sampled_partials.hpp"
#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/engine.hpp"
#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/telemetry.hpp"

namespace stream_cqsa {

/// A subproblem that was computed.
struct RehearsedSubproblem {
  std::int64_t id = 0;
  std::uint64_t scores = 0;   ///< live ones, over all heads of the group
  double kernel_seconds = 0;  ///< that its launches kept the device busy
  double seconds = 0;         ///< from the first read to the last partial
  std::vector<SampledToken> tokens;
};

/// Computes subproblems of a plan one by one, in rehearsal_plan()'s arenas: through the run's
/// pipeline, cache and backend, without accumulators, outputs or a checkpoint.
class Rehearsal {
 public:
  /// Prepares the backend, within less device memory where the plan's is no longer free: see
  /// run(). Everything given must outlive this. Throws InputError when the inputs are not the
  /// plan's, OutOfDeviceMemory when the device has too little memory left.
  Rehearsal(const Plan& plan, const Inputs& inputs, Backend& backend, const RunOptions& options,
            Telemetry& telemetry);

  /// Computes a subproblem with a live pair and keeps the states of these query tokens, which must
  /// be of its live query chunks. Throws Error when anything fails on the way, or a partial is
  /// missing, Stopped when RunOptions::checkpoint.stop asks for the end.
  RehearsedSubproblem compute(std::int64_t id, const std::vector<std::int64_t>& tokens);

  /// As computed: its arenas are those that are allocated.
  const Plan& plan() const { return plan_; }
  std::int64_t host_bytes() const { return memory_.bytes(); }

 private:
  Plan plan_;
  const Inputs inputs_;
  Backend& backend_;
  const int read_threads_;
  const StopRequest* stop_;  ///< or none
  Telemetry& telemetry_;
  HostBuffer memory_;
  std::shared_ptr<void> pinned_;
};

/// The live scores of a subproblem, over all query heads of its group.
std::uint64_t scores_of(const Plan& plan, std::int64_t id);

}  // namespace stream_cqsa
