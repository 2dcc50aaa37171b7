// The rank that hands out subproblems, merges what comes back, and writes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "mpi/communicator.hpp"
#include "mpi/input_server.hpp"
#include "mpi/roster.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

/// What the master did beside merging.
struct MasterResult {
  RunResult run;
  Failures failures;                      ///< `lost_text` of those whose rank was lost
  std::vector<std::int64_t> subproblems;  ///< by worker: computed
  std::int64_t repeated = 0;              ///< subproblems that were handed out more than once
  std::int64_t withdrawn = 0;             ///< of these, before a second worker had begun
  double dispatch_seconds = 0;            ///< of processor time, for messages and assignments
  double stalled_seconds = 0;             ///< see Intake::stalled_seconds()
  ServedInputs served;                    ///< to workers
};

/// Has the workers compute `plan`, of which this rank merges its share (see merger_plan()): the
/// ranks behind RunOptions::mergers mergers (see run_merger()), of which worker i is rank
/// mergers + 1 + i.
/// `served` are the inputs of those that have RemoteInputs; the plan then has cache blocks. Sinks
/// are written as far as the plan has this rank merge, and not committed; when this returns the
/// mergers have written their parts. A worker that fails, or is lost where MPI can go on, is told
/// of on standard error, and its subproblems go to the others; a merger that is lost ends all.
/// With RunOptions::tuning, whenever a head group (with groups_inner: a batch entry) has been
/// handed out, the rest may be planned again: then all ranks end what is under way and go on by the
/// new plan, with the same output bits. `warn` is told.
///
/// `ready` is called when this rank is, before any message: until then workers need not be there,
/// and what is thrown concerns this rank alone. Only the calling thread sends and receives. Throws
/// Error when merging or writing fails, here or at a merger, or no worker is left; the others are
/// stopped before that.
MasterResult run_master(const Plan& plan, const Outputs& outputs, const RunOptions& options,
                        Telemetry& telemetry, Communicator& communicator,
                        const std::function<void()>& ready, const Inputs* served = nullptr);

}  // namespace stream_cqsa
