// A rank that merges some of the query chunks, beside the master.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "mpi/communicator.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

struct MergerResult {
  std::string failure;         ///< why the run cannot go on, or empty
  RunResult run;               ///< of this rank's query chunks
  double stalled_seconds = 0;  ///< see Intake::stalled_seconds()
};

/// Merges what the workers of `plan`, and of those that the master plans after it, compute of this
/// rank's share of the query chunks (see MergeShares), within merger_plan() for the host budget
/// given, until the master says how to end. `open` gives the outputs, of which only the rows of
/// that share are written; they are durable when this returns, and not committed.
/// RunOptions::checkpoint has a directory of this rank's own, or none; requests for checkpoints,
/// and to stop, come from the master. Failures, those of `open` too, are told to the master, which
/// ends the run. Only the calling thread sends and receives. Ends all ranks when messages
/// themselves fail.
MergerResult run_merger(const Plan& plan, std::int64_t host_budget,
                        const std::function<Outputs()>& open, const RunOptions& options,
                        Telemetry& telemetry, Communicator& communicator);

}  // namespace stream_cqsa
