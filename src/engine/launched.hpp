// A subproblem, or a part of one, on its way through the compute lane.
#pragma once

#include <cstdint>
#include <vector>

#include "stream_cqsa/backend.hpp"
#include "stream_cqsa/plan.hpp"

namespace stream_cqsa {

struct Launched {
  std::int64_t id = 0;
  SubproblemKey key;
  QuorumWork work;
  Ticket ticket;
  std::vector<std::int32_t> state_slots;  ///< by position in work.chunks, -1 where none
  bool last = true;                       ///< part of its subproblem
};

/// Live scores of one head that the subproblem adds to `queries`, a part of the query chunk at
/// `position` in work.chunks.
std::int64_t scores_of(const Plan& plan, const Launched& launched, std::int32_t position,
                       Range queries);

}  // namespace stream_cqsa
