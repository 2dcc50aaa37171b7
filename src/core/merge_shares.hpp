// Which rank merges which query chunks.
#pragma once

#include <cstdint>
#include <vector>

#include "stream_cqsa/plan.hpp"
#include "stream_cqsa/range.hpp"

namespace stream_cqsa {

/// The query chunks of a plan shared out to the ranks that merge: the master, rank 0, and the
/// mergers, ranks 1 to `mergers`. Each has a run of chunks; the runs have about equal numbers of
/// partials, counted by rows. Where there are more ranks than chunks some have none. The same on
/// every rank.
///
/// Example: 13 chunks of equal length without a mask, 2 mergers: [0, 5) [5, 9) [9, 13).
class MergeShares {
 public:
  MergeShares(const Plan& plan, int mergers);

  /// Ranks that merge.
  int ranks() const { return static_cast<int>(begins_.size()) - 1; }

  Range chunks(int rank) const {
    const auto at = static_cast<std::size_t>(rank);
    return {begins_[at], begins_[at + 1]};
  }

  int rank_of(std::int64_t chunk) const;

 private:
  std::vector<std::int64_t> begins_;  ///< first chunk of each rank, then all chunks
};

}  // namespace stream_cqsa
