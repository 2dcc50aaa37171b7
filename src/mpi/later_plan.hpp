// The plan by which the ranks of a run go on when they have ended the one before.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mpi/communicator.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

struct LaterPlan {
  Plan plan;                ///< whose groups_done are finished by those before
  std::vector<int> absent;  ///< ranks that compute no more
};

/// Tells it to the ranks that wait for it, mergers and those workers that have no failure (by
/// worker: why it takes no part any more, or empty); without `plan`, that the run does not go on.
void send_later_plan(Communicator& communicator, int mergers,
                     const std::vector<std::string>& failures, const Plan* plan);

/// Waits for that; none where the run does not go on. Throws LostRank where the master is lost.
std::optional<LaterPlan> receive_later_plan(Communicator& communicator);

}  // namespace stream_cqsa
