// The rank that hands out subproblems, merges what comes back, and writes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "mpi/communicator.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// What the master did beside merging.
struct MasterResult {
  RunResult run;
  std::vector<std::string> failures;      ///< by worker: why it gave up, or empty
  std::vector<std::int64_t> subproblems;  ///< by worker: computed
  std::int64_t repeated = 0;              ///< subproblems that were handed out more than once
  double dispatch_seconds = 0;            ///< busy with messages and assignments
};

/// Has the workers compute `plan`, which is this rank's own (see merger_plan()): the ranks behind
/// RunOptions::mergers mergers (see run_merger()), of which worker i is rank mergers + 1 + i. Sinks
/// are written as far as the plan has this rank merge, and not committed; when this returns the
/// mergers have written their parts. A worker that fails is told of on standard error, and its
/// subproblems go to the others.
/// `ready` is called when this rank is, before any message: until then workers need not be there,
/// and what is thrown concerns this rank alone. Only the calling thread sends and receives. Throws
/// Error when merging or writing fails, here or at a merger, or no worker is left; the others are
/// stopped before that.
MasterResult run_master(const Plan& plan, const Outputs& outputs, const RunOptions& options,
                        Telemetry& telemetry, Communicator& communicator,
                        const std::function<void()>& ready);

}  // namespace stream_cqsa
