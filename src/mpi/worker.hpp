// A rank that computes what the master gives it.
#pragma once

#include <string>

#include "mpi/communicator.hpp"
#include "mpi/remote_inputs.hpp"
#include "stream_cqsa/engine.hpp"

namespace stream_cqsa {

struct WorkerBudgets {
  std::int64_t device = 0;  ///< bytes
  std::int64_t host = 0;    ///< bytes
};

struct WorkerResult {
  std::string failure;  ///< why the worker gave up, or empty
  std::uint64_t scores_computed = 0;
  // Of several plans, one after another, the largest of each.
  std::int64_t device_bytes = 0;
  std::int64_t device_in_use = 0;
  std::int64_t host_bytes = 0;
};

/// Computes subproblems of `plan`, and of those that the master plans after it, for the ranks 0 to
/// RunOptions::mergers, which merge, with the arenas of worker_plan() for the budgets given, until
/// the master says stop, with the backend, which is prepared here; within less device memory where
/// others have taken it. Failures are told
/// to the master and returned, once all partials that were offered have been sent. Only the calling
/// thread sends and receives; reader threads read through MPI I/O. With `remote`, `inputs` read
/// from there. Throws LostRank when the master is lost, and Error when messages fail otherwise.
WorkerResult run_worker(const Plan& plan, const WorkerBudgets& budgets, const Inputs& inputs,
                        Backend& backend, const RunOptions& options, Telemetry& telemetry,
                        Communicator& communicator, RemoteInputs* remote = nullptr);

}  // namespace stream_cqsa
