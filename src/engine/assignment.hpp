// What a worker is given to compute.
#pragma once

#include <cstdint>
#include <vector>

namespace stream_cqsa {

/// A subproblem, or those of its query chunks that are still wanted.
struct Assignment {
  std::int64_t id = 0;
  std::vector<bool> wanted;  ///< by position in Plan::work(id).chunks; empty: all of them
  std::int64_t order = 0;    ///< by which it was given: what may be withdrawn as one
};

}  // namespace stream_cqsa
