// The rank that hands out subproblems, merges what comes back, and writes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "mpi/communicator.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// What is told of a worker whose rank is lost.
inline constexpr const char* lost_text = "lost";

/// What the master did beside merging.
struct MasterResult {
  RunResult run;
  std::vector<std::string> failures;      ///< by worker: why it gave up, `lost_text`, or empty
  std::vector<std::int64_t> subproblems;  ///< by worker: computed
  std::int64_t repeated = 0;              ///< subproblems that were handed out more than once
  double dispatch_seconds = 0;            ///< busy with messages and assignments
};

/// Has the workers, ranks 1 and up, compute `plan` (see master_plan()). Sinks are written in full
/// and not committed. Worker i is rank i + 1. A worker that fails, or is lost where MPI can go on,
/// is told of on standard error, and its subproblems go to the others. `ready` is called when this
/// rank is, before any message: until then workers need not be there, and what is thrown concerns
/// this rank alone. Only the calling thread sends and receives. Throws Error when merging or
/// writing fails or no worker is left; the workers are stopped before that.
MasterResult run_master(const Plan& plan, const Outputs& outputs, const RunOptions& options,
                        Telemetry& telemetry, Communicator& communicator,
                        const std::function<void()>& ready);

}  // namespace stream_cqsa
