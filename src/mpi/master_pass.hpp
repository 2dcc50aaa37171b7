// What the master does by one plan.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "core/merge_shares.hpp"
#include "mpi/held_groups.hpp"
#include "mpi/later_plan.hpp"
#include "mpi/master.hpp"
#include "stream_cqsa/tuning.hpp"

namespace stream_cqsa {

/// What one plan's part of a run leaves.
struct Pass {
  MasterResult result;
  std::optional<PlannedAgain> again;  ///< for what it has left
  double began = 0;                   ///< when the first worker's work began, now_seconds()
};

/// What does not change from one plan to the next.
struct MasterRun {
  const Outputs& outputs;
  const RunOptions& options;
  Telemetry& telemetry;
  Communicator& communicator;
  const Inputs* served;
};

/// Has the workers compute `plan`, this rank's own, until that is done, or the rest is left to
/// another plan: then `others` wait for it. `failures` are those of workers that take no part from
/// the start. `ask`, or none, is called whenever the rest could be left. Calls `ready`, and throws,
/// as run_master().
Pass run_pass(const Plan& plan, const MergeShares& shares, const MasterRun& run,
              const CheckpointOptions& checkpoint, const Failures& failures, const AskForPlan& ask,
              const std::function<void()>& ready, OthersWaiting& others);

}  // namespace stream_cqsa
