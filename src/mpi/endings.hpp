// How the ranks of a run end, by what stopped the master.
#pragma once

#include <cstdint>

#include "engine/monitor.hpp"
#include "mpi/protocol.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

/// What the other ranks are told.
Ending ending_of(const Abort& abort, bool all_merged);

/// As Abort::rethrow_if_failed(); what Stopped says is merged includes `scores_of_mergers`: a
/// checkpoint is what all ranks have made durable.
void rethrow_if_failed(const Abort& abort, const Plan& plan, std::uint64_t scores_of_mergers);

}  // namespace stream_cqsa
